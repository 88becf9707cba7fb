from __future__ import annotations

import asyncio
import threading

import pytest

from aiorl.monitoring.threads import OwnedThread

pytestmark = pytest.mark.anyio


async def test_it_runs_calls_back_and_is_joined() -> None:
    said: list[str] = []

    def work() -> None:
        thread.call(lambda: said.append(threading.current_thread().name))

    thread = OwnedThread(work, name="worker")
    thread.start()
    assert await thread.join(10.0)
    assert said == [threading.current_thread().name]
    assert await thread.join(0.0)


async def test_one_that_does_not_end_is_given_up_after_the_time() -> None:
    gate = threading.Event()
    thread = OwnedThread(gate.wait, name="worker")
    thread.start()
    assert not await thread.join(0.01)
    gate.set()
    assert await thread.join(10.0)


async def test_cancellation_waits_for_the_thread_and_is_raised_then() -> None:
    gate, begun = threading.Event(), asyncio.Event()
    thread = OwnedThread(gate.wait, name="worker")
    thread.start()

    async def leave() -> None:
        begun.set()
        await thread.join(10.0)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(leave())
        await begun.wait()
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        gate.set()
    assert task.cancelled()


async def test_cancellation_does_not_wait_longer_than_the_time() -> None:
    gate, begun = threading.Event(), asyncio.Event()
    thread = OwnedThread(gate.wait, name="worker")
    thread.start()

    async def leave() -> None:
        begun.set()
        await thread.join(0.01)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(leave())
        await begun.wait()
        task.cancel()
    assert task.cancelled()
    gate.set()
    assert await thread.join(10.0)
