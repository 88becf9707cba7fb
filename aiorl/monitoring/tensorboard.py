"""TensorBoard events: a view of ``metrics.jsonl``, written by tensorboardX."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from aiorl.monitoring.metrics import EpochRecord


class TensorBoardSink:
    """Scalars by name over `num_samples`, in a TensorBoard event file of its own for each start of the run.

    The events are written by tensorboardX's file writer, without its queue and thread: an error is raised to the
    caller.

    Args:
        folder: The folder of event files; made where it is missing.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._event: Callable[..., Any] | None = None

    def open(self, last: EpochRecord | None) -> None:
        """Start a new event file; what older ones hold beyond `last` is marked as void, since it will be made again."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._folder.mkdir(parents=True, exist_ok=True)
        is_resumed = any(self._folder.glob("events.*"))
        self._event = Event
        self._writer = EventsWriter(str(self._folder / "events"), filename_suffix=f".{time.time_ns()}")
        if is_resumed:
            step = 0 if last is None else last.num_samples + 1
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=step, session_log=start))

    def write(self, record: EpochRecord) -> None:
        """Append one event with every metric of the record that has a value."""
        assert self._event is not None, "open comes first"
        values = [{"tag": name, "simple_value": value} for name, value in record.metrics.items() if value is not None]
        event = self._event(wall_time=time.time(), step=record.num_samples, summary={"value": values})
        self._writer.write_event(event)

    def flush(self) -> None:
        """Wait for the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
