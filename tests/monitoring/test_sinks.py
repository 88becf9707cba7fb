from __future__ import annotations

import asyncio
import json
import logging
import threading
from typing import TYPE_CHECKING

import pytest

from aiorl.monitoring.config import LoggerConfig
from aiorl.monitoring.metrics import EpochRecord
from aiorl.monitoring.sinks import CAPACITY, Recorder

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio

QUIET = LoggerConfig(tensorboard=False)


def record(epoch: int) -> EpochRecord:
    return EpochRecord.make(epoch=epoch, num_samples=epoch * 100, time_s=epoch * 0.5, metrics={"learner/lr": 0.5})


def epochs(path: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in path.read_text().splitlines()]


class Gated:
    """A sink that takes its first record only when it is let."""

    name = "gated"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.seen: list[int] = []
        self.calls: list[str] = []

    def open(self, last: EpochRecord | None) -> None:
        self.calls.append(f"open {None if last is None else last.epoch}")

    def write(self, record: EpochRecord) -> None:
        self.entered.set()
        self.gate.wait()
        self.seen.append(record.epoch)

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")


class Broken:
    """A sink that cannot do anything."""

    name = "broken"

    def open(self, last: EpochRecord | None) -> None:
        del last

    def write(self, record: EpochRecord) -> None:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise OSError(28, "No space left on device")


async def test_records_reach_both_files(tmp_path: Path) -> None:
    metrics, logs = tmp_path / "metrics.jsonl", tmp_path / "logs"
    async with Recorder(metrics, logs, LoggerConfig()) as recorder:
        for epoch in range(1, 4):
            await recorder.record(record(epoch))
        await recorder.flush()
        assert epochs(metrics) == [1, 2, 3]
        [events] = logs.iterdir()
        assert events.stat().st_size > 0
    assert recorder.statistics().num_records == 3
    assert recorder.statistics().num_queued == 0
    assert recorder.statistics().num_failures == {}


async def test_leaving_writes_everything(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    async with Recorder(metrics, tmp_path, QUIET) as recorder:
        for epoch in range(1, CAPACITY + 1):
            await recorder.record(record(epoch))
    assert epochs(metrics) == list(range(1, CAPACITY + 1))
    with pytest.raises(RuntimeError, match="not open"):
        await recorder.record(record(1))
    with pytest.raises(RuntimeError, match="not open"):
        await recorder.flush()


async def test_a_resumed_run_appends_after_its_checkpoint(tmp_path: Path) -> None:
    metrics, sink = tmp_path / "metrics.jsonl", Gated()
    sink.gate.set()
    async with Recorder(metrics, tmp_path, QUIET) as recorder:
        for epoch in range(1, 6):
            await recorder.record(record(epoch))
    with metrics.open("a") as file:
        file.write('{"epoch": 6, "num_sam')
    async with Recorder(metrics, tmp_path, QUIET, resume_epoch=3, sinks=[sink]) as recorder:
        await recorder.record(record(4))
    assert epochs(metrics) == [1, 2, 3, 4]
    assert sink.calls == ["open 3", "close"]


async def test_when_the_queue_is_full_record_waits_and_a_cancelled_one_is_not_taken(tmp_path: Path) -> None:
    sink = Gated()
    async with Recorder(tmp_path / "metrics.jsonl", tmp_path, QUIET, sinks=[sink]) as recorder:
        for epoch in range(1, CAPACITY + 1):
            await recorder.record(record(epoch))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await recorder.record(record(CAPACITY + 1))
        assert recorder.statistics().num_queued == CAPACITY
        async with asyncio.TaskGroup() as group:
            group.create_task(recorder.record(record(CAPACITY + 2)))
            sink.gate.set()
    expected = [*range(1, CAPACITY + 1), CAPACITY + 2]
    assert sink.seen == expected
    assert epochs(tmp_path / "metrics.jsonl") == expected


async def test_a_cancelled_flush_harms_nothing(tmp_path: Path) -> None:
    sink = Gated()
    async with Recorder(tmp_path / "metrics.jsonl", tmp_path, QUIET, sinks=[sink]) as recorder:
        await recorder.record(record(1))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await recorder.flush()
        sink.gate.set()
        await recorder.record(record(2))
        await recorder.flush()
    assert sink.seen == [1, 2]


async def test_a_failing_sink_is_reported_once_and_harms_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").write_text("in the way of TensorBoard")
    metrics = tmp_path / "metrics.jsonl"
    async with Recorder(metrics, tmp_path / "logs", LoggerConfig(), sinks=[Broken()]) as recorder:
        for epoch in range(1, 6):
            await recorder.record(record(epoch))
        await recorder.flush()
        assert recorder.statistics().num_failures == {"TensorBoard": 1, "broken": 6}
        assert [(entry.levelname, entry.getMessage()) for entry in caplog.records] == [
            ("WARNING", "TensorBoard cannot be written (failure 1); training goes on without it"),
            ("WARNING", "broken cannot be written (failure 1); training goes on without it"),
        ]
    assert caplog.records[-1].getMessage() == "broken cannot be written (failure 7); what it lacks is lost"
    assert epochs(metrics) == [1, 2, 3, 4, 5]


async def test_the_truth_that_cannot_be_written_is_an_error(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.symlink_to("/dev/full")
    async with Recorder(metrics, tmp_path, QUIET) as recorder:
        await recorder.record(record(1))
        await recorder.record(record(2))
        await recorder.flush()
        [entry] = caplog.records
        assert entry.levelno == logging.ERROR
        assert "metrics.jsonl cannot be written" in entry.getMessage()
        assert "No space left on device" in caplog.text
    assert [entry.levelname for entry in caplog.records] == ["ERROR", "ERROR"]
    assert "what it lacks is lost" in caplog.text


async def test_a_run_whose_truth_cannot_be_opened_does_not_begin(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        async with Recorder(tmp_path / "nowhere" / "metrics.jsonl", tmp_path, QUIET):
            pytest.fail("it was entered")


async def test_cancelled_while_leaving_it_still_writes_and_then_is_cancelled(tmp_path: Path) -> None:
    sink, metrics, entered, left = Gated(), tmp_path / "metrics.jsonl", asyncio.Event(), []

    async def run() -> None:
        try:
            async with Recorder(metrics, tmp_path, QUIET, sinks=[sink]) as recorder:
                await recorder.record(record(1))
                await recorder.record(record(2))
                entered.set()
        except asyncio.CancelledError:
            left.append(list(sink.seen))
            raise

    async with asyncio.TaskGroup() as group:
        task = group.create_task(run())
        await entered.wait()
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        sink.gate.set()
    assert task.cancelled()
    assert left == [[1, 2]]
    assert epochs(metrics) == [1, 2]


async def test_a_writer_that_hangs_is_reported_and_abandoned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = Gated()
    async with Recorder(tmp_path / "metrics.jsonl", tmp_path, QUIET, sinks=[sink], close_timeout_s=0.05) as recorder:
        await recorder.record(record(1))
        await recorder.record(record(2))
    assert "did not end within 0.05 s; 2 records may be missing" in caplog.text
    sink.gate.set()
