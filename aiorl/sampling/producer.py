"""Producers: those whose next rows a batch waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType

    from aiorl.sampling.batch_queue import BatchQueue
    from aiorl.sampling.batcher import MicroBatcher
    from aiorl.sampling.rows import Rows


class Producer:
    """Somebody who submits rows again and again, each time after the answer; made by `MicroBatcher.producer`.

        with batcher.producer() as producer:
            producer.expect()
            observations = await reset()
            while True:
                observations = await step(await producer.submit(observations))

    It has an answer *outstanding* from the moment its submit is answered until it submits again, parks or leaves, and
    after `expect`. When none of the producers has, nothing more can arrive, and what is queued is flushed at once. So
    a producer that waits for anything but its own next rows has to `park`, or the others wait with it. A submit that
    failed or was cancelled leaves its producer parked.
    """

    __slots__ = ("_batcher", "_queue", "_submitting")

    def __init__(self, batcher: MicroBatcher, queue: BatchQueue) -> None:
        self._batcher = batcher
        self._queue = queue
        self._submitting = False

    def __enter__(self) -> Self:
        """Joins, at any time, with nothing outstanding."""
        self._queue.producers.add(self)
        self._batcher._pump()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leaves: nobody waits for it any more."""
        self._queue.producers.discard(self)
        self.park()

    async def submit(self, rows: Rows) -> Any:
        """As `MicroBatcher.submit`. While the rows are queued nothing is outstanding; once they are answered, it is.

        Raises:
            RuntimeError: The producer has not joined, or has left, or its last submit still waits.
        """
        if self._submitting:
            raise RuntimeError("a producer submits one request at a time; join with another for the other coroutine")
        self._submitting = True
        try:
            return await self._batcher._submit(rows, self)
        finally:
            self._submitting = False

    def expect(self) -> None:
        """Says that rows will come although no answer of the batcher leads to them: an environment is being reset.

        Raises:
            RuntimeError: The producer has not joined, or has left.
        """
        if self not in self._queue.producers:
            raise RuntimeError("a producer expects rows only between joining and leaving")
        self._queue.outstanding.add(self)

    def park(self) -> None:
        """Says that it waits for something else now, until it submits or expects again: no batch waits for it."""
        self._queue.outstanding.discard(self)
        self._batcher._pump()
