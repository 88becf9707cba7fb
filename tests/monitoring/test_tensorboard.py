from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from aiorl.monitoring.metrics import EpochRecord
from aiorl.monitoring.tensorboard import TensorBoardSink

if TYPE_CHECKING:
    from pathlib import Path


def record(epoch: int, **metrics: float) -> EpochRecord:
    return EpochRecord.make(
        epoch=epoch,
        num_samples=epoch * 100,
        time_s=epoch * 0.5,
        metrics={name.replace("__", "/"): value for name, value in metrics.items()},
    )


def events(folder: Path) -> list[list[Any]]:
    """Every event file of a folder, oldest first, as the events in it."""
    files = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at, found = path.read_bytes(), 0, []
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
        files.append(found)
    return files


def test_tensorboard_shows_names_over_samples_and_leaves_out_what_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    sink = TensorBoardSink(folder)
    sink.open(None)
    sink.write(record(1, learner__lr=0.5, mine__own=2.0))
    sink.write(record(2, learner__lr=0.25))
    sink.flush()
    [(version, *written)] = events(folder)
    sink.close()
    sink.close()
    assert version.file_version == "brain.Event:2"
    assert [event.step for event in written] == [100, 200]
    assert {value.tag: value.simple_value for value in written[0].summary.value} == {"learner/lr": 0.5, "mine/own": 2.0}


def test_a_resumed_run_has_an_event_file_of_its_own_that_voids_what_lies_beyond(tmp_path: Path) -> None:
    for last in (None, record(1), None):  # all within a second; the last one had no checkpoint to go on from
        sink = TensorBoardSink(tmp_path)
        sink.open(last)
        sink.write(record(2))
        sink.close()
    first, second, third = events(tmp_path)
    assert [event.step for event in first] == [0, 200]
    assert [event.step for event in second] == [0, 101, 200]
    assert [event.step for event in third] == [0, 0, 200]
    assert second[1].session_log.status == third[1].session_log.status == SessionLog.START


def test_tensorboard_in_a_place_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    sink = TensorBoardSink(tmp_path / "logs")
    with pytest.raises(FileExistsError):
        sink.open(None)
    sink.close()
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
