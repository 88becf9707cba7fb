"""Work in other threads never outlives who awaits it, whatever happens to either."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from aiorl.compute.threads import in_thread, joined

pytestmark = pytest.mark.anyio

PATIENCE_S = 10.0


class Work:
    """A call that has begun, and ends when it is let."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun = asyncio.Event()
        self.let_go = threading.Event()
        self.ended = False
        self._error = error
        self._loop = asyncio.get_running_loop()

    def __call__(self) -> str:
        self._loop.call_soon_threadsafe(self.begun.set)
        assert self.let_go.wait(PATIENCE_S)
        self.ended = True
        if self._error is not None:
            raise self._error
        return threading.current_thread().name


def refuse(reason: str, *, detail: str) -> None:
    raise LookupError(f"{reason}: {detail}")


async def some_turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_in_thread_returns_what_was_returned_and_has_ended_its_thread() -> None:
    here = threading.current_thread()
    name, ident = await in_thread(lambda: (threading.current_thread().name, threading.get_ident()))
    assert name.startswith("aiorl-blocking")
    assert ident != here.ident
    assert not any(thread.name == name for thread in threading.enumerate())


async def test_in_thread_hands_arguments_over_and_raises_what_was_raised() -> None:
    assert await in_thread(int, "20", base=16) == 32
    with pytest.raises(LookupError, match="no: really"):
        await in_thread(refuse, "no", detail="really")


async def test_the_loop_goes_on_meanwhile() -> None:
    work = Work()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(in_thread(work))
        await work.begun.wait()
        await some_turns()
        assert not task.done()
        work.let_go.set()
    assert task.result().startswith("aiorl-blocking")


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("error", [None, ValueError("lost")])
async def test_a_cancellation_waits_for_the_work_and_then_goes_on(error: Exception | None, times: int) -> None:
    """However often it is asked; and what the work raised gives way to it."""
    work = Work(error)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(in_thread(work))
        await work.begun.wait()
        for _ in range(times):
            task.cancel()
            await some_turns()
        assert not task.done()
        assert not work.ended
        work.let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert work.ended
    assert task.cancelled()
    assert task.cancelling() == times


async def test_a_deadline_ends_as_a_timeout_after_the_work() -> None:
    work = Work()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as deadline:
            async with asyncio.TaskGroup() as tasks:
                task = tasks.create_task(in_thread(work))
                await work.begun.wait()
                deadline.reschedule(asyncio.get_running_loop().time())
                tasks.create_task(_when_cancelling(task, work))
    assert work.ended


async def _when_cancelling(task: asyncio.Task[str], work: Work) -> None:
    """Lets the work end once its task was told to."""
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        assert not task.done()
        work.let_go.set()


async def test_joined_takes_the_result_of_any_executor() -> None:
    with ThreadPoolExecutor(1) as executor:
        assert await joined(executor.submit(lambda: 3)) == 3
        with pytest.raises(ZeroDivisionError):
            await joined(executor.submit(lambda: 1 // 0))
        done = executor.submit(lambda: 4)
        done.result()
        assert await joined(done) == 4
        assert await joined(executor.submit(lambda: 5)) == 5  # and the executor is as it was


async def test_a_cancellation_that_was_there_before_the_await_waits_too() -> None:
    work = Work()
    work.let_go.set()
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(work)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await joined(future)
        assert future.done()
        task.uncancel()
