"""Blocking work beside the loop, that never outlives whoever awaits it, but where the whole process is left."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NoReturn, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

P = ParamSpec("P")
T = TypeVar("T")


async def joined(future: Future[T]) -> T:
    """The result of work in another thread.

    Cancelling waits until the work has ended, since nobody may touch what it works on before; then the cancellation goes on.
    """
    waiting = asyncio.wrap_future(future)
    cancelled: asyncio.CancelledError | None = None
    while not waiting.done():
        try:
            await asyncio.wait({waiting})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        waiting.exception()  # seen, and given way to the cancellation
        raise cancelled
    return waiting.result()


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls `function` in a thread of its own, which has ended when this returns or raises; cancelling waits for it."""
    with ThreadPoolExecutor(1, thread_name_prefix="aiorl-blocking") as executor:
        return await joined(executor.submit(partial(function, *args, **kwargs)))


def held_up() -> bool:
    """Whether the end of the process would have to wait for a thread of aiorl's: user code may never come back from there."""
    return any(thread.name.startswith("aiorl-") and not thread.daemon for thread in threading.enumerate())


def leave(status: int) -> NoReturn:
    """Ends the process with what was printed, and without waiting for its threads: nothing else is cleaned up."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # broken, closed, or none
            stream.flush()
    os._exit(status)
