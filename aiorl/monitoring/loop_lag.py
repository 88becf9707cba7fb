"""How late the event loop is: a callback that is due every few milliseconds, and by how much it comes later.

A loop that stands still misses several of them; each is counted with the time that it had to wait, so that one long
hold-up weighs as much as it lasts.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np

if TYPE_CHECKING:
    from types import TracebackType

PERIOD_S: Final = 0.002
_MAX_LATE: Final = 1_000_000  # the newest count; half an hour of them
_GRAIN_S: Final = 0.001  # uvloop's timers count whole milliseconds


@dataclass(frozen=True, slots=True)
class LagStatistics:
    """Lateness of the periodic callback in seconds; 0 where it never was due.

    Attributes:
        p50: The median.
        p99: Of a hundred callbacks, 99 were no later.
        max: The largest.
        num_due: Callbacks that were due.
    """

    p50: float
    p99: float
    max: float
    num_due: int


class LoopLag:
    """Measures the lag of the running loop between `start` and `stop`, or while its context is open.

    Costs the loop a callback every 2 ms. Lateness below a millisecond is the timers' own.
    """

    def __init__(self) -> None:
        self._late_s: list[float] = []
        self._due = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Measures from now on, until `stop`."""
        self._due = time.perf_counter() + PERIOD_S
        self._arm(PERIOD_S)

    def stop(self) -> None:
        """Stops measuring; what was measured stays."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
            self._count(time.perf_counter())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _arm(self, delay_s: float) -> None:
        self._handle = asyncio.get_running_loop().call_later(max(delay_s, _GRAIN_S), self._tick)

    def _tick(self) -> None:
        now = time.perf_counter()
        self._count(now)
        self._arm(self._due - now)

    def _count(self, now: float) -> None:
        """Notes every callback that was due until now."""
        while self._due <= now:
            self._late_s.append(now - self._due)
            self._due += PERIOD_S
        if len(self._late_s) > _MAX_LATE:
            del self._late_s[: _MAX_LATE // 2]

    def statistics(self) -> LagStatistics:
        """What was measured until now."""
        if not self._late_s:
            return LagStatistics(0.0, 0.0, 0.0, 0)
        p50, p99 = np.percentile(self._late_s, (50, 99))
        return LagStatistics(float(p50), float(p99), max(self._late_s), len(self._late_s))
