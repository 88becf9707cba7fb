"""Awaitable micro-batching: many coroutines submit rows, one inference answers them together.

    submit ──► queue ──(a rule says so)──► infer ──► each submitter gets the answers to its own rows, in order

| what              | waits for                                               | ends otherwise with                 |
|-------------------|---------------------------------------------------------|-------------------------------------|
| `submit`          | its rows to be flushed, and the inference to answer     | infer's exception; `BatcherClosed`  |
| rows in the queue | a rule to hold, and the batch that computes to end      | their submit being cancelled        |
| `aclose`          | nothing queued or computing                             | at once, where it does not drain    |

The queue needs no bound of its own: it holds the rows of the submits that wait, and each of them holds up its caller.
The rules (size, time, producers, flush, drain) are those of `aiorl.sampling.batch_queue`.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from aiorl.errors import BatcherClosed, BatcherError, MalformedRows
from aiorl.sampling import rows as rowwise
from aiorl.sampling.batch_queue import BatchQueue, Request, checked_size
from aiorl.sampling.inference import Inference
from aiorl.sampling.producer import Producer
from aiorl.sampling.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping
    from types import TracebackType

    from aiorl.sampling.batch_queue import Batch, FlushReason
    from aiorl.sampling.histogram import Distribution
    from aiorl.sampling.rows import Layout

__all__ = ["BatcherStatistics", "MicroBatcher", "Producer", "Rows"]

_TIMER_GRAIN_S = 0.001  # uvloop's timers count whole milliseconds, on a clock that may be one behind


@dataclass(frozen=True, slots=True)
class BatcherStatistics:
    """What a batcher has done. ``num_requests - num_pending - num_cancelled - num_failed`` were answered.

    Attributes:
        num_requests: Requests accepted into the queue.
        num_rows: Rows that were computed.
        num_batches: Batches that were computed.
        num_pending: Requests whose submit waits: queued, computing, or with the answer on its way.
        num_queued_rows: Rows in the queue.
        num_cancelled: Requests whose submit was cancelled, while queued or later.
        num_failed: Requests that got an exception: their inference failed, or closing refused them.
        num_malformed: Requests refused as malformed; not among ``num_requests``.
        flushes: Batches by what flushed them: size, time, producers, flush or drain.
        batch_rows: Rows of a batch.
        wait_s: Seconds that a request waited in the queue, until its first rows were flushed.
    """

    num_requests: int
    num_rows: int
    num_batches: int
    num_pending: int
    num_queued_rows: int
    num_cancelled: int
    num_failed: int
    num_malformed: int
    flushes: Mapping[FlushReason, int]
    batch_rows: Distribution
    wait_s: Distribution


class MicroBatcher:
    """Gathers the rows of many coroutines into batches for one inference. Not thread-safe: for use on one event loop.

        async with MicroBatcher(infer, max_batch_size=256, max_wait_time=0.002) as batcher:
            answers = await batcher.submit(rows)

    ``infer`` gets rows as they are submitted, an array ``[B, ...]`` or a tuple of arrays, and returns answers, an array
    or a tuple of arrays whose first dimension is B. It may be a plain function, which runs on the loop without a task
    (one batch at a turn), or return an awaitable (``async def``, a future), which the batcher's own task awaits. It
    must neither keep nor change the rows, nor later the answers: where a batch is a single request, the rows are the
    submitter's own array, and answers are handed out as views of what infer returned.

    Sizes count rows. A batch takes whole requests, in the order of their arrival, while they fit. Only a request that
    alone exceeds the maximum is split: it is answered as one, and once it is begun, the rest of it is due at once.

    Leaving the context drains the queue; where an exception leaves it, a cancellation too, what is queued is refused.

    Args:
        infer: As above. What it raises is raised, unchanged, by the submits of that batch and no others.
        max_batch_size: Rows at which a batch is flushed at once, and the most that one has; None for no limit.
        min_batch_size: Rows below which an expired wait does not flush.
        max_wait_time: Seconds that the oldest row waits, to the resolution of the loop's timers (1 ms); 0 flushes at
            the next turn of the loop; None for no limit. With neither this nor a size, rows are only accepted while a
            producer is registered, since nothing else would ever flush them; the last to leave flushes what is left.
        name: For messages and the name of the task.

    Raises:
        TypeError, ValueError: A size is no int from 1 up, the minimum above the maximum, or the time no finite number from 0 up.
    """

    def __init__(
        self,
        infer: Callable[[Any], Rows | Awaitable[Rows]],
        *,
        max_batch_size: int | None = None,
        min_batch_size: int = 1,
        max_wait_time: float | None = None,
        name: str = "batcher",
    ) -> None:
        self.name = name
        self._inference = Inference(infer, self._finish, f"{name} inference")
        self._queue = BatchQueue(max_batch_size, min_batch_size, max_wait_time)
        self._layout: Layout | None = None  # the first request's
        self._computing: Batch | None = None
        self._timer: asyncio.Handle | None = None  # the only one; set for the oldest row, or for one before it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = asyncio.Event()  # closed, and nothing queued or computing
        self._num_pending = self._num_requests = 0
        self._num_cancelled = self._num_failed = self._num_malformed = 0

    async def __aenter__(self) -> Self:
        if self._queue.closing:
            raise BatcherClosed(f"{self.name} is closed and cannot be opened again")
        if self._loop is not None:
            raise RuntimeError(f"{self.name} is open already")
        self._loop = asyncio.get_running_loop()
        await self._inference.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self.aclose(drain=exc_type is None)
        except asyncio.CancelledError:
            self._refuse()
            raise
        finally:
            await self._inference.__aexit__(None, None, None)

    async def submit(self, rows: Rows) -> Any:
        """Waits for the answers to these rows: ``[n, ...]`` for ``[n, ...]``, in order, as infer returned them.

        The rows must not change meanwhile. Every submit gives the loop at least one turn, so that a coroutine which
        does nothing else does not starve the others. Cancelled, its rows leave the queue; where they are computing
        already, the batch goes on for its neighbours and this answer is dropped.

        Raises:
            MalformedRows: No rows, or rows of another shape or dtype than the first request's.
            BatcherClosed: The batcher is closed or closing, or was closed meanwhile without draining.
            BatcherError: Nothing would ever flush the rows (no size, no time, no producer); or infer was cancelled, or
                answered something else than one row for each row.
            Exception: What infer raised.
        """
        return await self._submit(rows, None)

    def producer(self) -> Producer:
        """A new producer, which joins when entered and leaves when left (``with batcher.producer() as producer``)."""
        return Producer(self, self._queue)

    def flush(self) -> None:
        """Flushes all that is queued now, as soon as nothing computes, in as many batches as the size asks for."""
        for request in self._queue.requests():
            request.due = "flush"
        self._pump()

    @property
    def idle(self) -> bool:
        """Whether nothing is queued, computing, or answered but not yet back with its submitter."""
        return self._num_pending == 0 and self._computing is None

    def set_max_batch_size(self, max_batch_size: int | None) -> None:
        """Changes the maximum from the next batch on. It may be below the minimum, which only holds back the time rule.

        Raises:
            TypeError, ValueError: It is no int, or below 1.
        """
        if max_batch_size is not None:
            checked_size("max_batch_size", max_batch_size)
        self._queue.max_batch_size = max_batch_size
        self._pump()

    async def aclose(self, drain: bool = True) -> None:
        """Refuses further submits, and returns when nothing is queued or computing. Idempotent.

        Cancelled while it drains, the batcher goes on draining.

        Args:
            drain: Whether what is queued is still answered. If not, the submits that wait get `BatcherClosed` and an
                asynchronous inference is cancelled; this may also cut short an `aclose` that drains.
        """
        self._queue.closing = True
        if not drain:
            self._refuse()
        else:
            self._pump()
        await self._stopped.wait()

    def statistics(self) -> BatcherStatistics:
        """What was done until now; also after closing."""
        return BatcherStatistics(
            num_requests=self._num_requests,
            num_rows=self._queue.num_taken_rows,
            num_batches=sum(self._queue.flushes.values()),
            num_pending=self._num_pending,
            num_queued_rows=self._queue.num_rows,
            num_cancelled=self._num_cancelled,
            num_failed=self._num_failed,
            num_malformed=self._num_malformed,
            flushes=MappingProxyType(dict(self._queue.flushes)),
            batch_rows=self._queue.batch_rows.distribution(),
            wait_s=self._queue.wait_s.distribution(),
        )

    async def _submit(self, rows: Rows, producer: Producer | None) -> Any:
        request = self._enqueue(rows, producer)
        try:
            self._pump()
            if request.done():
                await asyncio.sleep(0)
            return await request
        except BaseException as error:
            if request.done() and not request.cancelled() and request.exception() is None:
                self._num_cancelled += 1  # answered, but nobody is there to take it
            if isinstance(error, asyncio.CancelledError):
                self._queue.outstanding.discard(producer)
                self._pump()
            raise
        finally:
            self._num_pending -= 1
            del request  # it holds the exception, whose traceback holds this frame

    def _enqueue(self, rows: Rows, producer: Producer | None) -> Request:
        if self._queue.closing:
            raise BatcherClosed(f"{self.name} is closed")
        if self._loop is None:
            raise RuntimeError(f"{self.name} is not open: use it inside of 'async with'")
        if producer is not None and producer not in self._queue.producers:
            raise RuntimeError(f"the producer has not joined {self.name}: use it inside of 'with'")
        self._queue.outstanding.discard(producer)
        try:
            num_rows = self._check(rows)
        except MalformedRows:
            self._num_malformed += 1
            self._pump()  # its producer has nothing outstanding any more
            raise
        request = Request(rows, num_rows, producer, self._withdraw, self._loop)
        self._queue.add(request)
        self._num_requests += 1
        self._num_pending += 1
        return request

    def _check(self, rows: Rows) -> int:
        """The number of rows of a request that can be accepted."""
        if not self._queue.has_rule:
            raise BatcherError(
                f"{self.name} would never flush these rows: give it a max_batch_size, a max_wait_time or a producer"
            )
        try:
            num_rows = rowwise.count(rows)
        except (TypeError, ValueError) as error:
            raise MalformedRows(f"malformed request to {self.name}: {error}") from error
        if not num_rows:
            raise MalformedRows(f"malformed request to {self.name}: it has no rows")
        layout = rowwise.layout(rows)
        if self._layout is None:
            self._layout = layout
        elif layout != self._layout:
            raise MalformedRows(
                f"malformed request to {self.name}: its rows are {rowwise.describe(layout)}, "
                f"but those of the first request were {rowwise.describe(self._layout)}"
            )
        return num_rows

    def _withdraw(self, request: Request) -> None:
        """Forgets a cancelled request, whose rows may be queued, computing, or both. Its submit pumps."""
        self._num_cancelled += 1
        self._queue.discard(request)

    def _pump(self) -> None:
        """Computes a batch if none computes and a rule says so. Called wherever a rule may have come to hold."""
        if self._computing is not None:
            return
        reason = self._queue.reason()
        if reason is not None:
            self._computing, parts = self._queue.take(reason)
            self._compute(parts)
        elif len(self._queue):
            self._time_oldest()
        elif self._queue.closing:
            self._stop()

    def _time_oldest(self) -> None:
        """Sets the timer for the oldest row; if it is set, then for an earlier row, and it will set itself anew."""
        if self._queue.max_wait_time is not None and self._timer is None and not self._queue.expired:
            self._set_timer(self._queue.oldest.queued_at + self._queue.max_wait_time - time.perf_counter())

    def _set_timer(self, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        if delay_s > 0:
            self._timer = loop.call_later(delay_s, self._on_timer)
        else:
            self._timer = loop.call_soon(self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if len(self._queue) and self._queue.max_wait_time is not None:
            left_s = self._queue.oldest.queued_at + self._queue.max_wait_time - time.perf_counter()
            if left_s > 0:
                self._set_timer(max(left_s, _TIMER_GRAIN_S))
            else:
                self._queue.expired = True
                self._pump()

    def _compute(self, parts: list[Rows]) -> None:
        """Has the batch taken computed. No request is named here: an error's traceback keeps this frame."""
        try:
            answers = self._inference.start(rowwise.join(parts))
        except BaseException as error:
            self._finish(None, error)
            if not isinstance(error, (Exception, asyncio.CancelledError)):
                raise
        else:
            if not self._inference.pending:
                self._finish(answers, None)

    def _finish(self, answers: Any, error: BaseException | None) -> None:
        """Hands out a batch's answers, or its error. The next batch begins at another turn of the loop."""
        batch, self._computing = self._computing or [], None
        if error is not None:
            self._fail([request for request, _ in batch], error)
        else:
            self._deliver(batch, answers)
        if len(self._queue) or self._queue.closing:
            asyncio.get_running_loop().call_soon(self._pump)

    def _deliver(self, batch: Batch, answers: Rows) -> None:
        expected = sum(num_rows for _, num_rows in batch)
        try:
            num_rows = rowwise.count(answers)
            if num_rows != expected:
                raise ValueError(f"{num_rows} rows")
        except (TypeError, ValueError) as error:
            wrong = BatcherError(f"the inference of {self.name} was asked for {expected} rows and answered {error}")
            wrong.__cause__ = error
            self._fail((request for request, _ in batch), wrong)
            return
        if len(batch) == 1:
            self._answer(batch[0][0], answers)
            return
        start = 0
        for request, num_rows in batch:
            self._answer(request, rowwise.cut(answers, start, start + num_rows))
            start += num_rows

    def _answer(self, request: Request, answers: Rows) -> None:
        """Answers a request, or keeps the answers to a part of it until the last part is there."""
        if request.done():
            return
        if request.num_taken < request.num_rows or request.answers:
            request.answers.append(answers)
            if request.num_taken < request.num_rows:
                return
            try:
                answers = rowwise.join(request.answers)
            except ValueError as error:  # the inference answered the parts in different shapes
                self._fail([request], error)
                return
        request.set_result(answers)
        if request.producer in self._queue.producers:
            self._queue.outstanding.add(request.producer)

    def _fail(self, requests: Iterable[Request], error: BaseException) -> None:
        if isinstance(error, StopIteration) or not isinstance(error, Exception):  # no future takes these
            cause, error = error, BatcherError(f"the inference of {self.name} ended with {error!r}")
            error.__cause__ = cause
        for request in requests:
            if not request.done():
                self._queue.discard(request)  # the rest of a split one
                request.set_exception(error)
                self._num_failed += 1

    def _refuse(self) -> None:
        """Closes; fails what is queued or computing, and cancels the inference that is awaited."""
        self._queue.closing = True
        computing = [request for request, _ in self._computing or ()]
        self._fail([*self._queue.requests(), *computing], BatcherClosed(f"{self.name} was closed without draining"))
        self._inference.cancel()
        self._pump()

    def _stop(self) -> None:
        """The batcher has closed, and nothing is queued or computing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._inference.close()
        self._stopped.set()
