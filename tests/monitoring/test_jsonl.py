from __future__ import annotations

import resource
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from aiorl.monitoring.jsonl import JsonlSink, trim_records
from aiorl.monitoring.metrics import EpochRecord

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def record(epoch: int, **metrics: float) -> EpochRecord:
    return EpochRecord.make(
        epoch=epoch,
        num_samples=epoch * 100,
        time_s=epoch * 0.5,
        metrics={name.replace("__", "/"): value for name, value in metrics.items()},
    )


def epochs(path: Path) -> list[int]:
    return [EpochRecord.from_json(line).epoch for line in path.read_bytes().splitlines()]


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """A disk that fills up: a write beyond the limit is cut short, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_is_with_the_system_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.open(None)
    sink.write(record(1, learner__lr=0.5))
    assert path.read_text() == record(1, learner__lr=0.5).to_json() + "\n"
    sink.write(record(2))
    sink.close()
    sink.close()
    assert epochs(path) == [1, 2]


def test_a_disk_that_is_full_for_a_while_leaves_neither_a_gap_nor_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.open(None)
    sink.write(record(1))
    size = path.stat().st_size
    with files_limited_to(size + size // 2):
        for epoch in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                sink.write(record(epoch))
        with pytest.raises(OSError, match="File too large"):
            sink.flush()
        assert epochs(path) == [1]
    sink.write(record(4))
    sink.close()
    assert epochs(path) == [1, 2, 3, 4]


def test_closing_says_what_could_not_be_written_and_lets_go(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.open(None)
    with files_limited_to(10):
        with pytest.raises(OSError, match="File too large"):
            sink.write(record(1))
        with pytest.raises(OSError, match="File too large"):
            sink.close()
    sink.close()


def test_an_unopened_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is not open"):
        JsonlSink(tmp_path / "metrics.jsonl").write(record(1))


def test_trimming_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert trim_records(path, 3) is None
    path.touch()
    assert trim_records(path, None) is None


@pytest.mark.parametrize(("last_epoch", "kept"), [(None, 4), (9, 4), (4, 4), (2, 2), (0, 0)])
def test_lines_beyond_the_checkpoint_and_a_torn_line_are_cut_off(
    tmp_path: Path, last_epoch: int | None, kept: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [record(epoch).to_json() + "\n" for epoch in range(1, 5)]
    path.write_text("".join(lines) + record(5).to_json()[:40])
    last = trim_records(path, last_epoch)
    assert path.read_text() == "".join(lines[:kept])
    assert last == (record(kept) if kept else None)


def test_a_line_that_was_damaged_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([record(1).to_json(), "garbage", record(2).to_json(), record(3).to_json()]) + "\n")
    assert trim_records(path, 2) == record(2)
    assert path.read_text().splitlines() == [record(1).to_json(), "garbage", record(2).to_json()]


def test_a_device_has_nothing_to_trim(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/zero")
    assert trim_records(path, 3) is None
