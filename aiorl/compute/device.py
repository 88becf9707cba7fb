"""Where torch computes: process-wide settings for one synchronous stretch, and the choice between the loop and a thread.

Every process-wide torch setting is set around each synchronous stretch of torch code and put back after it, never across an await, so
that a host application and a second run in the same process keep theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

LOOP_BUDGET_S = 0.005
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
    """Runs one kind of computation on the loop while it is short, and on a thread of its own while it is long.

    The first calls run on the thread, where they cannot hold the loop up; when their median is known the place is fixed and logged.

    Args:
        name: What it computes, for the log and the thread's name.
        settings: Applied around every call.
        inline: True or False fixes the place at once; None measures.
    """

    def __init__(self, name: str, settings: TorchSettings, *, inline: bool | None = None) -> None:
        self.name = name
        self._settings = settings
        self._inline = inline
        self._durations: list[float] = []
        self._executor: ThreadPoolExecutor | None = None

    async def __aenter__(self) -> Placement:
        """Nothing is started before the first call needs it."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Joins the thread: nothing computes any more when this returns."""
        self._close()

    def _close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls `function` in its place and returns what it returns.

        Cancelling waits until the call has ended, since nobody may touch what it works on before; then the cancellation goes on.
        """
        if self._inline:
            return self._timed(function, *args, **kwargs)
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"aiorl-{self.name}")
        future = asyncio.wrap_future(self._executor.submit(partial(self._timed, function, *args, **kwargs)))
        try:
            result = await asyncio.shield(future)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                while not future.done():
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.shield(future)
            raise
        if self._inline is None and len(self._durations) >= _WARM_UP_CALLS:
            typical = median(self._durations[1:])
            self._inline = typical <= LOOP_BUDGET_S
            where = "on the event loop" if self._inline else "on a thread of its own"
            logger.info("%s takes %.1f ms a call: it runs %s", self.name, 1000 * typical, where)
            if self._inline:
                self._close()
        return result

    def _timed(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        started = time.perf_counter()
        with self._settings.applied():
            result = function(*args, **kwargs)
        if self._inline is None:
            self._durations.append(time.perf_counter() - started)
        return result
