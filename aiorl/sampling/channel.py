"""The bounded, closeable hand-off between the rollout and the learner.

| what                 | waits for                  | unblocked by        | when closed                          |
|----------------------|----------------------------|---------------------|--------------------------------------|
| `put`, channel full  | a free place               | `get`               | `ChannelClosed`                      |
| `put_nowait`, full   | nothing: `RuntimeError`    |                     | `ChannelClosed`                      |
| `get`, channel empty | an item                    | `put`, `put_nowait` | what is left, then `ChannelClosed`   |

Memory is bounded by ``capacity`` items, and one for each `put` that waits. For use on one event loop; not thread-safe.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from aiorl.errors import ChannelClosed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """What went through a channel, and which of its ends kept the other waiting.

    Attributes:
        capacity: Places.
        num_items: Items in the channel now.
        max_items: The most that it ever held.
        num_put: Items put in.
        num_got: Items taken out.
        put_wait_s: Time that `put` spent waiting for a free place, in all.
        get_wait_s: Time that `get` spent waiting for an item, in all.
        closed: Whether it is closed.
    """

    capacity: int
    num_items: int
    max_items: int
    num_put: int
    num_got: int
    put_wait_s: float
    get_wait_s: float
    closed: bool


class Channel(Generic[T]):
    """Hands items over in the order in which they were put, ``capacity`` of them at most.

    Each item goes to one reader. Neither `put` nor `get` gives up its turn where it need not wait.

    Raises:
        ValueError: From the constructor, where ``capacity`` is below 1.
    """

    def __init__(self, capacity: int, *, name: str = "channel") -> None:
        if capacity < 1:
            raise ValueError(f"a channel needs a capacity of at least 1, not {capacity}")
        self.name = name
        self.capacity = capacity
        self._items: deque[T] = deque()
        self._getters: deque[asyncio.Future[None]] = deque()
        self._putters: deque[asyncio.Future[None]] = deque()
        self._closed = False
        self._max_items = self._num_put = self._num_got = 0
        self._put_wait_s = self._get_wait_s = 0.0

    def put_nowait(self, item: T) -> None:
        """Puts an item where the caller knows that there is a place.

        Raises:
            RuntimeError: There is none: whoever counts the places has miscounted.
            ChannelClosed: The channel is closed.
        """
        if self._closed:
            raise ChannelClosed(f"{self.name} is closed")
        if len(self._items) >= self.capacity:
            raise RuntimeError(f"{self.name} already holds its {self.capacity} items")
        self._items.append(item)
        self._num_put += 1
        self._max_items = max(self._max_items, len(self._items))
        _wake_one(self._getters)

    async def put(self, item: T) -> None:
        """Puts an item, waiting for a free place. Cancelled, it has not put it.

        Raises:
            ChannelClosed: The channel was closed before there was a place; the item was not put.
        """
        if len(self._items) >= self.capacity and not self._closed:
            started = time.perf_counter()
            try:
                while len(self._items) >= self.capacity and not self._closed:
                    await _wait_in(self._putters)
            except asyncio.CancelledError:
                if len(self._items) < self.capacity:
                    _wake_one(self._putters)  # the place that was offered here is another's now
                raise
            finally:
                self._put_wait_s += time.perf_counter() - started
        self.put_nowait(item)

    async def get(self) -> T:
        """Takes the oldest item, waiting for one. Cancelled, it has taken none.

        Raises:
            ChannelClosed: The channel is closed, and what was left in it has been taken.
        """
        if not self._items and not self._closed:
            started = time.perf_counter()
            try:
                while not self._items and not self._closed:
                    await _wait_in(self._getters)
            except asyncio.CancelledError:
                if self._items:
                    _wake_one(self._getters)  # the item that was offered here is another's now
                raise
            finally:
                self._get_wait_s += time.perf_counter() - started
        if not self._items:
            raise ChannelClosed(f"{self.name} is closed")
        item = self._items.popleft()
        self._num_got += 1
        _wake_one(self._putters)
        return item

    def items(self) -> tuple[T, ...]:
        """What is in the channel now, the oldest first."""
        return tuple(self._items)

    def close(self) -> None:
        """Ends the channel: all that wait are woken, readers still get what is left in it. Idempotent."""
        self._closed = True
        for waiters in (self._getters, self._putters):
            while waiters:
                _wake_one(waiters)

    def statistics(self) -> ChannelStatistics:
        """What has gone through until now; also after closing."""
        return ChannelStatistics(
            capacity=self.capacity,
            num_items=len(self._items),
            max_items=self._max_items,
            num_put=self._num_put,
            num_got=self._num_got,
            put_wait_s=self._put_wait_s,
            get_wait_s=self._get_wait_s,
            closed=self._closed,
        )


async def _wait_in(waiters: deque[asyncio.Future[None]]) -> None:
    """Waits in a queue until woken; a cancelled wait leaves the queue."""
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiters.append(waiter)
    try:
        await waiter
    finally:
        with suppress(ValueError):  # it is not in there where it was woken
            waiters.remove(waiter)


def _wake_one(waiters: deque[asyncio.Future[None]]) -> None:
    """Wakes the first in a queue that is still waiting."""
    while waiters:
        waiter = waiters.popleft()
        if not waiter.done():
            waiter.set_result(None)
            return
