"""``metrics.jsonl``: the truth about a run, one line for each complete epoch."""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from aiorl.monitoring.metrics import EpochRecord

if TYPE_CHECKING:
    from pathlib import Path

_KEPT_LINES: Final = 10_000


class JsonlSink:
    """One line for each record, handed to the operating system at once; `flush` also waits for the disk.

    Args:
        path: The file; made where it is missing, appended to where it exists.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._size = 0
        self._unwritten: deque[bytes] = deque(maxlen=_KEPT_LINES)

    def open(self, last: EpochRecord | None) -> None:
        """Open the file for appending."""
        del last
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._size = os.fstat(self._file).st_size

    def write(self, record: EpochRecord) -> None:
        """Append the record, and before it whatever could not be written until now."""
        self._unwritten.append(record.to_json().encode() + b"\n")
        self._write_out()

    def flush(self) -> None:
        """Write what could not be written until now, and wait for the disk."""
        self._write_out()
        os.fsync(self._descriptor())

    def close(self) -> None:
        """Flush and close the file."""
        if self._file is None:
            return
        try:
            self.flush()
        finally:
            os.close(self._file)
            self._file = None

    def _write_out(self) -> None:
        while self._unwritten:
            line = self._unwritten[0]
            try:
                written = os.write(self._descriptor(), line)
                if written < len(line):
                    written += os.write(self._descriptor(), line[written:])  # says why the first one fell short
            except OSError:
                with suppress(OSError):  # the reason counts, not what followed from it
                    os.ftruncate(self._descriptor(), self._size)  # half a line would spoil the next one
                raise
            self._size += written
            self._unwritten.popleft()

    def _descriptor(self) -> int:
        if self._file is None:
            raise OSError(f"{self._path} is not open")
        return self._file


def trim_records(path: Path, last_epoch: int | None) -> EpochRecord | None:
    """Cut off the end of a ``metrics.jsonl`` that does not belong to the run that goes on.

    That is a line that was being written when an earlier process was killed, and, where a run resumes from a
    checkpoint, every line beyond its epoch. Blocks.

    Args:
        path: The file; it may be missing.
        last_epoch: Epoch of the checkpoint; None to keep every complete line.

    Returns:
        The last record that was kept.

    Raises:
        OSError: The file cannot be read or cut.
    """
    last: EpochRecord | None = None
    if not path.is_file():  # missing, or a device such as /dev/null, which has no end
        return None
    with path.open("r+b") as file:
        end = 0
        for line in file:
            try:
                record = EpochRecord.from_json(line)
            except ValueError:
                record = None
            if not line.endswith(b"\n") or (record and last_epoch is not None and record.epoch > last_epoch):
                file.truncate(end)
                break
            end += len(line)
            last = record or last
    return last
