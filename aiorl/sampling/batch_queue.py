"""The micro-batcher's queue and the rules by which it is flushed. It starts no timer and computes nothing.

Queued rows are flushed, oldest first and at most ``max_batch_size`` together, when

- size: there are ``max_batch_size`` of them;
- time: the oldest has waited ``max_wait_time``, and there are ``min_batch_size`` (an expired wait stays expired);
- producers: nothing more can arrive, since a producer is registered and none has an answer outstanding;
- flush: `MicroBatcher.flush` was called after they were queued;
- drain: the batcher is closing.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from aiorl.sampling import rows as rowwise
from aiorl.sampling.histogram import Histogram

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiorl.sampling.rows import Rows

FlushReason: TypeAlias = Literal["size", "time", "producers", "flush", "drain"]


class Request(asyncio.Future[Any]):
    """Rows that wait for their answer, and the future of that answer, in one.

    Cancelling a task cancels the future that it awaits, within the call: so a cancelled request's rows leave the queue
    before any rule can count them, not a turn of the loop later.

    Attributes:
        rows: What was submitted.
        num_rows: How many they are.
        num_taken: How many of them were taken into batches.
        answers: Answers to the parts taken, where the request is split.
        producer: Who submitted it; None where no producer did.
        due: Why it is to be flushed, whatever the other rules say.
        queued_at: `time.perf_counter` when it was submitted.
    """

    __slots__ = ("_on_cancel", "answers", "due", "num_rows", "num_taken", "producer", "queued_at", "rows")

    def __init__(
        self,
        rows: Rows,
        num_rows: int,
        producer: object | None,
        on_cancel: Callable[[Request], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(loop=loop)
        self.rows = rows
        self.num_rows = num_rows
        self.num_taken = 0
        self.answers: list[Rows] = []
        self.producer = producer
        self.due: FlushReason | None = None
        self.queued_at = time.perf_counter()
        self._on_cancel = on_cancel

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancels as every future does; where that takes effect, ``on_cancel`` has been called on return."""
        cancelled = super().cancel(msg)
        if cancelled:
            self._on_cancel(self)
        return cancelled


Batch: TypeAlias = list[tuple[Request, int]]
"""Requests, each with the number of its rows that are in the batch."""


def checked_size(name: str, size: int) -> int:
    """A number of rows, as it is.

    Raises:
        TypeError: It is no int.
        ValueError: It is below 1.
    """
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name} must be an int, not {size!r}")
    if size < 1:
        raise ValueError(f"{name} must be at least 1, not {size}")
    return size


class BatchQueue:
    """Requests in the order of their arrival, who may add to them, and when the oldest are to be flushed.

    Attributes:
        max_batch_size: Rows; None for no limit.
        min_batch_size: Rows.
        max_wait_time: Seconds; None for no limit.
        num_rows: Rows in the queue.
        num_taken_rows: Rows that were taken from it.
        expired: Whether the oldest row has waited ``max_wait_time``; set by the owner of the timer.
        closing: Whether everything is to be flushed.
        producers: Those registered.
        outstanding: Those of them that have an answer outstanding.
        flushes: Batches taken, by reason.
        batch_rows: Rows of the batches taken.
        wait_s: Seconds from a request's arrival until its first rows were taken.
    """

    def __init__(self, max_batch_size: int | None, min_batch_size: int, max_wait_time: float | None) -> None:
        checked_size("min_batch_size", min_batch_size)
        if max_batch_size is not None and checked_size("max_batch_size", max_batch_size) < min_batch_size:
            raise ValueError(f"max_batch_size = {max_batch_size} is below min_batch_size = {min_batch_size}")
        given: object = max_wait_time
        if isinstance(given, bool) or not isinstance(given, int | float | None):
            raise TypeError(f"max_wait_time must be None or a number of seconds, not {max_wait_time!r}")
        if max_wait_time is not None and not 0 <= max_wait_time < math.inf:
            raise ValueError(f"max_wait_time must be None or a number of seconds from 0 up, not {max_wait_time}")
        self.max_batch_size = max_batch_size
        self.min_batch_size = min_batch_size
        self.max_wait_time = max_wait_time
        self.num_rows = self.num_taken_rows = 0
        self.expired = False
        self.closing = False
        self.producers: set[object] = set()
        self.outstanding: set[object] = set()
        self.flushes: dict[FlushReason, int] = dict.fromkeys(get_args(FlushReason), 0)
        self.batch_rows = Histogram()
        self.wait_s = Histogram()
        self._requests: OrderedDict[Request, None] = OrderedDict()  # left from its middle in constant time

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def oldest(self) -> Request:
        """The request at the head; there must be one."""
        return next(iter(self._requests))

    @property
    def has_rule(self) -> bool:
        """Whether a queued row can count on being flushed: by size, by time, or since a producer is registered."""
        return self.max_batch_size is not None or self.max_wait_time is not None or bool(self.producers)

    def add(self, request: Request) -> None:
        """Puts a request at the end."""
        self._requests[request] = None
        self.num_rows += request.num_rows

    def discard(self, request: Request) -> None:
        """Takes a request out, if it is in there."""
        if request in self._requests:
            if self.expired and request is self.oldest:
                self.expired = False
            del self._requests[request]
            self.num_rows -= request.num_rows - request.num_taken

    def requests(self) -> list[Request]:
        """All that is queued, oldest first."""
        return list(self._requests)

    def reason(self) -> FlushReason | None:
        """Why the oldest rows are to be flushed now; None where there are none, or no rule says so."""
        if not self._requests:
            return None
        if self.max_batch_size is not None and self.num_rows >= self.max_batch_size:
            return "size"
        if self.closing:
            return "drain"
        due = self.oldest.due
        if due is not None:
            return due
        if not self.outstanding and (self.producers or not self.has_rule):  # the last producer may have left rows
            return "producers"
        if self.expired and self.num_rows >= self.min_batch_size:
            return "time"
        return None

    def take(self, reason: FlushReason) -> tuple[Batch, list[Rows]]:
        """Takes the rows of a batch: of whole requests while they fit, or a part of one that alone exceeds the maximum.

        A request that is split stays at the head and is due: begun, it is finished.

        Returns:
            The requests and their rows, request by request.
        """
        now = time.perf_counter()
        size = room = self.num_rows if self.max_batch_size is None else self.max_batch_size
        batch: Batch = []
        parts: list[Rows] = []
        while self._requests and room:
            request = self.oldest
            start = request.num_taken
            num_rows = request.num_rows - start
            if num_rows > room:
                if batch:
                    break
                num_rows = room
                request.due = reason
            else:
                del self._requests[request]
            if start == 0:
                self.wait_s.add(now - request.queued_at)
            whole = num_rows == request.num_rows
            parts.append(request.rows if whole else rowwise.cut(request.rows, start, start + num_rows))
            request.num_taken += num_rows
            room -= num_rows
            batch.append((request, num_rows))
        self.num_rows -= size - room
        self.num_taken_rows += size - room
        self.expired = False
        self.flushes[reason] += 1
        self.batch_rows.add(size - room)
        return batch, parts
