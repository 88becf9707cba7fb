"""A thread that belongs to a coroutine: started by it, told to end by it, joined by it."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class OwnedThread:
    """One thread with an owner on the loop.

    The thread is a daemon, so that one that hangs in the operating system (a dead network disk, a wedged driver) cannot
    keep the process from leaving. Apart from that it never outlives `join`.

    Args:
        target: What runs in the thread. It ends soon after its owner told it to, and handles its own exceptions.
        name: Name of the thread, as debuggers and ``py-spy`` show it.
    """

    def __init__(self, target: Callable[[], object], *, name: str) -> None:
        self._target = target
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._ended = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the thread; the loop that runs here is the one that joins it."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def call(self, callback: Callable[[], object]) -> None:
        """Run `callback` on the loop. For the thread's own use; does nothing once the loop is closed."""
        assert self._loop is not None, "the thread was not started"
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    async def join(self, timeout_s: float) -> bool:
        """Wait until the thread has ended.

        Cancellation is held back until the thread has ended or the time is over, since whoever comes next may touch
        what the thread works on; then it is raised.

        Returns:
            Whether the thread ended within `timeout_s` seconds.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        cancelled: asyncio.CancelledError | None = None
        while not self._ended.is_set():
            try:
                async with asyncio.timeout_at(deadline):
                    await self._ended.wait()
            except TimeoutError:
                break
            except asyncio.CancelledError as cancellation:
                cancelled = cancellation
        ended = self._ended.is_set()
        if ended:
            self._thread.join()
        if cancelled is not None:
            raise cancelled
        return ended

    def _run(self) -> None:
        try:
            self._target()
        finally:
            self.call(self._ended.set)
