"""What a user watches: a live display on a terminal, plain ``key=value`` lines elsewhere.

There is no thread and no timer: an epoch's record is shown when it comes, at most every `interval_s` (and at most
four times a second on a terminal), and the last one when the display ends. Where the reader is slow (a stopped
terminal, a full pipe), an update is left out, since writing would hold up the loop.
"""

from __future__ import annotations

import logging
import math
import select
import sys
import time
from collections import deque
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Self, TextIO, cast

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from rich.console import RenderableType
    from rich.live import Live

    from aiorl.monitoring.config import LoggerConfig
    from aiorl.monitoring.metrics import EpochRecord

_SHORTEST_LIVE_INTERVAL_S: Final = 0.25  # a refresh costs the loop milliseconds
_RATE_WINDOW: Final = 20


@dataclass(frozen=True, slots=True)
class Goals:
    """Where a run ends, as far as it is known beforehand; None for what does not end it."""

    max_samples: int | None = None
    max_epochs: int | None = None
    max_steps: int | None = None
    max_seconds: float | None = None


class Outlook:
    """How much of a run is done and how long the rest will take, from the pace of the last epochs."""

    def __init__(self, goals: Goals) -> None:
        self._goals: dict[str, float] = {
            field.name: limit for field in fields(goals) if (limit := getattr(goals, field.name)) is not None
        }
        self._history: deque[tuple[float, dict[str, float]]] = deque(maxlen=_RATE_WINDOW)

    def add(self, record: EpochRecord) -> None:
        """Take an epoch into account."""
        counts = {
            "max_samples": float(record.num_samples),
            "max_epochs": float(record.epoch),
            "max_steps": float(record.metrics.get("learner/num_steps") or 0),
            "max_seconds": record.time_s,
        }
        self._history.append((record.time_s, counts))

    @property
    def share_done(self) -> float | None:
        """Share of the way to the nearest goal, in [0, 1]; None for a run without one."""
        if not self._goals:
            return None
        if not self._history:
            return 0.0
        _, counts = self._history[-1]
        return min(1.0, max(counts[name] / limit if limit else 1.0 for name, limit in self._goals.items()))

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the first goal is reached; None while nothing can be said."""
        if len(self._history) < 2:
            return None
        (first_s, first), (last_s, last) = self._history[0], self._history[-1]
        estimates = [
            max(0.0, limit - last[name]) * (last_s - first_s) / (last[name] - first[name])
            for name, limit in self._goals.items()
            if last[name] > first[name]
        ]
        return min(estimates, default=None)


class ProgressDisplay:
    """Shows how a run goes on. A context manager, for use on one loop.

    On a terminal the display stays below whatever is written: while it is up, `sys.stderr` (and `sys.stdout`, where
    that is a terminal too) and the terminal handlers of the loggers ``aiorl`` and root write above it. Nothing that
    it does raises: when its stream breaks, it falls silent.

    Args:
        config: ``[logger]``.
        name: What the run is called.
        goals: Where it ends.
        file: Where to write; standard error by default.
    """

    def __init__(self, config: LoggerConfig, *, name: str, goals: Goals, file: TextIO | None = None) -> None:
        self._config = config
        self._name = name
        self._outlook = Outlook(goals)
        self._file = file
        self._live: Live | None = None
        self._latest: EpochRecord | None = None
        self._shown: EpochRecord | None = None
        self._shown_at = -math.inf
        self._is_silent = True
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        self._file = self._file or sys.stderr
        self._is_silent = not self._config.terminal
        if not self._is_silent and self._file.isatty():
            self._live = self._exit.enter_context(_live(self._file))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show()
        self._live = None
        self._is_silent = True
        with suppress(OSError, ValueError):
            self._exit.close()

    def update(self, record: EpochRecord) -> None:
        """Show an epoch, unless the last one was shown a moment ago: then it is kept for the next time."""
        self._latest = record
        self._outlook.add(record)
        interval_s = self._config.interval_s
        if self._live is not None:
            interval_s = max(_SHORTEST_LIVE_INTERVAL_S, interval_s)
        if time.monotonic() - self._shown_at >= interval_s:
            self._show()

    def _show(self) -> None:
        record, file = self._latest, self._file
        if self._is_silent or record is None or file is None or record is self._shown or not _takes_output(file):
            return
        self._shown, self._shown_at = record, time.monotonic()
        try:
            if self._live is not None:
                self._live.update(_panel(self._name, record, self._outlook), refresh=True)
            else:
                file.write(plain_line(record, self._outlook) + "\n")
                file.flush()
        except (OSError, ValueError):  # the reader is gone, or the stream was closed
            self._is_silent = True


def plain_line(record: EpochRecord, outlook: Outlook) -> str:
    """A record as ``key=value`` pairs, without what is missing: what is shown where there is no terminal."""
    metrics = record.metrics
    values = {
        "epoch": f"{record.epoch}",
        "samples": f"{record.num_samples}",
        "samples_per_s": _number(metrics.get("sampling/samples_per_s"), 0),
        "return_mean": _number(metrics.get("episode/return_mean"), 2),
        "episodes": _number(metrics.get("episode/num_episodes"), 0),
        "lag_mean": _number(metrics.get("sampling/lag_mean"), 2),
        "batch_size_mean": _number(metrics.get("sampling/batch_size_mean"), 1),
        "time_s": f"{record.time_s:.1f}",
        "eta_s": _number(outlook.remaining_s, 0),
    }
    return " ".join(f"{key}={value}" for key, value in values.items() if value is not None)


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _panel(name: str, record: EpochRecord, outlook: Outlook) -> RenderableType:
    """Three lines: how far, how good, how fast."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    metrics = record.metrics
    head = Table.grid(padding=(0, 1))
    head.add_column(no_wrap=True)
    cells: list[RenderableType] = [f"[bold]{_escaped(name)}[/]"]
    share_done = outlook.share_done
    if share_done is not None:
        head.add_column(no_wrap=True)
        head.add_column(no_wrap=True)
        cells += [ProgressBar(total=1.0, completed=share_done, width=30), f"{share_done:4.0%}"]
        if outlook.remaining_s is not None:
            head.add_column(no_wrap=True)
            cells.append(f"[dim]eta[/] {_clock(outlook.remaining_s)}")
    head.add_row(*cells)
    good = _words(
        ("return", _number(metrics.get("episode/return_mean"), 1)),
        ("best", _number(metrics.get("episode/return_max"), 1)),
        ("length", _number(metrics.get("episode/length_mean"), 0)),
        ("episodes", _thousands(metrics.get("episode/num_episodes"))),
        ("epoch", _thousands(record.epoch)),
    )
    fast = _words(
        ("samples", _thousands(record.num_samples)),
        ("per second", _thousands(metrics.get("sampling/samples_per_s"))),
        ("batch", _number(metrics.get("sampling/batch_size_mean"), 1)),
        ("lag", _number(metrics.get("sampling/lag_mean"), 2)),
        ("time", _clock(record.time_s)),
    )
    return Group(head, good, fast)


def _words(*pairs: tuple[str, str | None]) -> RenderableType:
    from rich.text import Text

    line = Text(no_wrap=True, overflow="ellipsis")
    for name, value in pairs:
        line.append(f"{name} ", style="dim")
        line.append(f"{'-' if value is None else value}  ")
    return line


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _thousands(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"


def _clock(duration_s: float) -> str:
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


@contextmanager
def _live(file: TextIO) -> Iterator[Live | None]:
    """The live region of a terminal; None where it has no cursor to move."""
    from rich.console import Console
    from rich.file_proxy import FileProxy
    from rich.live import Live

    console = Console(file=file)
    if console.is_dumb_terminal or not console.is_terminal:
        yield None
        return
    live = Live(
        console=console,
        auto_refresh=False,
        redirect_stdout=_is_terminal(sys.stdout),  # one that is a file or a pipe keeps what belongs to it
        redirect_stderr=_is_terminal(sys.stderr),
    )
    above = cast("TextIO", FileProxy(console, file))
    with live, terminal_handlers_writing_to(above):
        console.show_cursor(True)  # a killed run must not leave a terminal without one
        yield live


@contextmanager
def terminal_handlers_writing_to(stream: TextIO) -> Iterator[None]:
    """Let the log handlers that write to the terminal write to `stream`, which knows what else is on the screen.

    Touched are the stream handlers of the loggers ``aiorl`` and root whose stream is a terminal; each gets its own
    stream back.
    """
    changed: list[tuple[logging.StreamHandler[Any], Any]] = []
    for handler in [*logging.getLogger("aiorl").handlers, *logging.getLogger().handlers]:
        if isinstance(handler, logging.StreamHandler) and _is_terminal(handler.stream):
            changed.append((handler, handler.stream))
            handler.setStream(stream)
    try:
        yield
    finally:
        for handler, before in changed:
            if handler.stream is stream:
                handler.setStream(before)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def _takes_output(file: TextIO) -> bool:
    """Whether a write would not block: the terminal is not stopped, the pipe not full. True where nobody can tell."""
    try:
        poll = select.poll()
        poll.register(file.fileno(), select.POLLOUT)
        return bool(poll.poll(0))
    except (OSError, ValueError):
        return True
