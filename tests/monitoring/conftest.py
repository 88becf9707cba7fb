"""A terminal as a user sees it: a pseudo-terminal, what was written to it, and the screen that this makes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import struct
import termios
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_PARTS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|\x08|[^\x1b\r\n\x08]+")


class Screen:
    """The far side of a pseudo-terminal of 40 rows and 100 columns; `near` is what a program is given."""

    def __init__(self) -> None:
        self.far, self.near = os.openpty()
        fcntl.ioctl(self.near, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        os.set_blocking(self.far, False)
        self.sent = ""
        self._row = 0

    @property
    def attributes(self) -> list[Any]:
        """Echo, signals and so on, as the terminal's driver has them now."""
        return termios.tcgetattr(self.near)

    def type(self, text: str) -> None:
        os.write(self.far, text.encode())

    def expect(self, pattern: str, *, anywhere: bool = False, timeout_s: float = 10.0) -> None:
        """Wait for a line of the screen that `pattern` matches as a whole, below the last one that was expected."""
        deadline = time.monotonic() + timeout_s
        while True:
            lines = self.lines()
            for row in range(0 if anywhere else self._row, len(lines)):
                if re.fullmatch(pattern, lines[row]):
                    self._row = row + 1
                    return
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"{pattern!r} did not come, but {lines}, of which {self._row} were expected"
            select.select([self.far], [], [], left_s)

    def lines(self) -> list[str]:
        """The lines of the screen, as they are now."""
        self._read()
        lines, row, column = [""], 0, 0
        for part in _PARTS.findall(self.sent):
            number = int(digits.group()) if (digits := re.search(r"\d+", part)) and part[0] == "\x1b" else 1
            if part == "\r":
                column = 0
            elif part == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif part == "\x08":
                column -= 1
            elif part[0] != "\x1b":
                lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
                column += len(part)
            elif part[-1] == "A":
                row -= number
            elif part[-1] == "B":
                row += number
            elif part[-1] == "C":
                column += number
            elif part[-1] == "D":
                column -= number
            elif part[-1] == "J":
                lines[row:] = [lines[row][:column]]
            elif part[-1] == "K":
                lines[row] = "" if number == 2 else lines[row][:column]
            else:
                assert part[-1] in "mhln", f"{part!r} is not understood"
        return [line.rstrip() for line in lines]

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            while data := os.read(self.far, 65536):
                self.sent += data.decode()

    def hang_up(self) -> None:
        """Close the terminal's window."""
        if self.far >= 0:
            os.close(self.far)
            self.far = -1


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    screen = Screen()
    yield screen
    screen.hang_up()
    os.close(screen.near)
