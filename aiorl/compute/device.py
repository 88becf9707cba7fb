"""Where torch computes: process-wide settings for one synchronous stretch, and the choice between the loop and a thread.

Every process-wide torch setting is set around each synchronous stretch of torch code and put back after it, never across an await, so
that a host application and a second run in the same process keep theirs.
"""

from __future__ import annotations

import contextlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

from aiorl.compute.threads import joined

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

LOOP_BUDGET_S = 0.005
_TRIAL_BUDGET_S = 4 * LOOP_BUDGET_S
_WARM_UP_CALLS = 5


def faster_threads(function: Callable[[], object], *, repeats: int = 3) -> int:
    """Torch's intra-op threads with which `function` is faster: 1, or as many as torch would take."""
    most = torch.get_num_threads()
    if most == 1:
        return 1
    times = {}
    for num_threads in (1, most):
        with TorchSettings(num_threads=num_threads).applied():
            function()
            runs = []
            for _ in range(repeats):
                started = time.perf_counter()
                function()
                runs.append(time.perf_counter() - started)
            times[num_threads] = median(runs)
    return min(times, key=lambda num_threads: times[num_threads])


class TorchSettings:
    """The torch settings of one run.

    Args:
        num_threads: Intra-op threads.
    """

    def __init__(self, *, num_threads: int) -> None:
        self.num_threads = num_threads

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Applies the settings to the calling thread's stretch of torch code, without an await inside."""
        before = torch.get_num_threads()
        if before == self.num_threads:
            yield
            return
        torch.set_num_threads(self.num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class Placement:
    """Runs each kind of computation on the loop while it is short, and on one thread of its own while it is long.

    A kind is a function. Its first calls run on the thread, where they cannot hold the loop up. By the clock they seem long wherever
    the loop works meanwhile, for which the thread waits up to the interpreter's switch interval of 5 ms, and even by processor time
    they seem so several times over. So unless that says otherwise clearly, the next calls are tried on the loop and timed by the
    clock, and the kind stays there if they are short, for as long as it does not hold the loop up for 20 ms again and again. Each
    decision is logged.

    Args:
        name: What it computes, for the log and the thread's name.
        settings: Applied around every call.
    """

    def __init__(self, name: str, settings: TorchSettings) -> None:
        self.name = name
        self._settings = settings
        self._inline: dict[object, bool] = {}
        self._durations: dict[object, list[float]] = {}
        self._num_long: dict[object, int] = {}  # calls in a row that held the loop up for long
        self._executor: ThreadPoolExecutor | None = None

    async def __aenter__(self) -> Placement:
        """Nothing is started before the first call needs it."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Joins the thread: nothing computes any more when this returns."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls `function` in its place and returns what it returns.

        Cancelling waits until the call has ended, since nobody may touch what it works on before; then the cancellation goes on.
        """
        kind = getattr(function, "__func__", function)
        if self._inline.get(kind):
            result, duration_s = self._timed(time.perf_counter, function, *args, **kwargs)
            self._watch(kind, duration_s)
        else:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"aiorl-{self.name}")
            timed = partial(self._timed, time.thread_time, function, *args, **kwargs)
            result, duration_s = await joined(self._executor.submit(timed))
        durations = self._durations.setdefault(kind, [])
        if len(durations) < 2 * _WARM_UP_CALLS:
            durations.append(duration_s)
            if len(durations) == _WARM_UP_CALLS:
                self._place(kind, median(durations[1:]), _TRIAL_BUDGET_S)
            elif len(durations) == 2 * _WARM_UP_CALLS and self._inline[kind]:
                self._place(kind, min(durations[_WARM_UP_CALLS:]), LOOP_BUDGET_S)
        return result

    def _watch(self, kind: object, duration_s: float) -> None:
        """Moves to the thread what has become long: a batch that acts may have more rows than those that were tried."""
        self._num_long[kind] = self._num_long.get(kind, 0) + 1 if duration_s > _TRIAL_BUDGET_S else 0
        if self._num_long[kind] == _WARM_UP_CALLS:
            self._place(kind, duration_s, LOOP_BUDGET_S)

    def _place(self, kind: object, typical_s: float, budget_s: float) -> None:
        self._inline[kind] = typical_s <= budget_s
        what = getattr(kind, "__name__", str(kind)).strip("_")
        where = "on the event loop" if self._inline[kind] else "on a thread of its own"
        logger.debug("%s: %s takes %.1f ms, and runs %s", self.name, what, 1000 * typical_s, where)

    def _timed(
        self, clock: Callable[[], float], function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[T, float]:
        started = clock()
        with self._settings.applied():
            result = function(*args, **kwargs)
        return result, clock() - started
