"""Blocking work beside the loop, that never outlives whoever awaits it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

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
