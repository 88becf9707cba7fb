"""One inference at a time: a plain function is called, and what returns an awaitable is awaited in one owned task."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from aiorl.sampling.rows import Rows


class Inference:
    """Calls ``infer``; where it returns an awaitable, awaits that in a task which is started by the first such call.

    Whether ``infer`` is asynchronous is read from what it returns, not from how it is written, so that partials,
    callable objects, and plain functions that return a coroutine or a future are all taken for what they are.

    Args:
        infer: Gets rows, returns answers or an awaitable of them.
        on_done: Called with the answers and the error, one of them None, at the end of each inference that was awaited;
            a cancellation is an error too. It may start the next.
        name: Of the task.
    """

    def __init__(
        self,
        infer: Callable[[Any], Rows | Awaitable[Rows]],
        on_done: Callable[[Any, BaseException | None], None],
        name: str,
    ) -> None:
        self._infer = infer
        self._on_done = on_done
        self._name = name
        self._tasks = asyncio.TaskGroup()
        self._worker: asyncio.Task[None] | None = None
        self._wake: asyncio.Future[None] | None = None  # the worker waits on it for a job
        self._job: Awaitable[Any] | None = None  # not begun
        self._closed = False
        self.pending = False

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        await self._tasks.__aexit__(None, None, None)

    def start(self, rows: Rows) -> Any:
        """Computes, and returns the answers; or, with ``pending`` set, begins to, and ``on_done`` will be called.

        Raises:
            BaseException: What ``infer`` raised when it was called.
        """
        answers = self._infer(rows)
        if isinstance(answers, (np.ndarray, tuple)) or not inspect.isawaitable(answers):
            return answers
        self._job = answers
        self.pending = True
        if self._worker is None or self._worker.done():
            self._worker = self._tasks.create_task(self._work(), name=self._name)
        else:
            self._wake_worker()
        return None

    def cancel(self) -> None:
        """Cancels the inference that is awaited, if any; ``on_done`` is told, before or after the return."""
        if self._job is not None:
            self._drop_job()
            self._done(None, asyncio.CancelledError())
        elif self.pending and self._worker is not None and not self._worker.cancelling():
            self._worker.cancel()

    def close(self) -> None:
        """Ends the task as soon as nothing is awaited."""
        self._closed = True
        self._wake_worker()

    async def _work(self) -> None:
        """Consumes jobs; waits for one, then for its answers. Ends when closed, or cancelled: the next job starts it anew."""
        try:
            while self._job is not None or not self._closed:
                if self._job is None:
                    self._wake = asyncio.get_running_loop().create_future()
                    await self._wake
                else:
                    await self._attend(self._job)
        except BaseException as error:
            self._worker = None
            self._drop_job()
            if self.pending:
                self._done(None, error)
            raise

    async def _attend(self, job: Awaitable[Any]) -> None:
        self._job = None
        try:
            answers = await job
        except Exception as error:  # noqa: BLE001 # it is the submitters'
            self._done(None, error)
        else:
            self._done(answers, None)

    def _done(self, answers: Any, error: BaseException | None) -> None:
        self.pending = False
        self._on_done(answers, error)

    def _drop_job(self) -> None:
        job, self._job = self._job, None
        if inspect.iscoroutine(job):
            job.close()
        elif isinstance(job, asyncio.Future):
            job.cancel()

    def _wake_worker(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
