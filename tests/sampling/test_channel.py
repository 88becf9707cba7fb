from __future__ import annotations

import asyncio

import pytest

from aiorl.errors import ChannelClosed
from aiorl.sampling.channel import Channel

pytestmark = pytest.mark.anyio


async def turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def test_items_come_out_in_the_order_in_which_they_went_in() -> None:
    channel = Channel[int](3)
    for item in range(3):
        await channel.put(item)
    assert [await channel.get() for _ in range(3)] == [0, 1, 2]


async def test_put_waits_for_a_free_place_and_get_for_an_item() -> None:
    channel = Channel[int](1)
    async with asyncio.TaskGroup() as tasks:
        reader = tasks.create_task(channel.get())
        await turns()
        assert not reader.done()
        await channel.put(1)
        assert await reader == 1
        await channel.put(2)
        writer = tasks.create_task(channel.put(3))
        await turns()
        assert not writer.done()
        assert channel.statistics().num_items == 1
        assert await channel.get() == 2
        await writer
        assert await channel.get() == 3
    statistics = channel.statistics()
    assert (statistics.num_put, statistics.num_got, statistics.max_items) == (3, 3, 1)
    assert statistics.put_wait_s > 0
    assert statistics.get_wait_s > 0


async def test_put_nowait_raises_where_there_is_no_place() -> None:
    channel = Channel[int](1, name="epochs")
    channel.put_nowait(1)
    with pytest.raises(RuntimeError, match="epochs already holds its 1 items"):
        channel.put_nowait(2)
    assert await channel.get() == 1
    channel.put_nowait(2)
    assert await channel.get() == 2


async def test_a_capacity_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Channel[int](0)


async def test_closing_wakes_all_and_leaves_readers_what_is_left() -> None:
    full, empty = Channel[int](1), Channel[int](1)
    full.put_nowait(1)
    writers = [asyncio.Task(full.put(item)) for item in (2, 3)]
    readers = [asyncio.Task(empty.get()) for _ in range(2)]
    await turns()
    for _ in range(2):
        full.close()
        empty.close()
    await asyncio.wait([*writers, *readers])
    assert all(isinstance(task.exception(), ChannelClosed) for task in [*writers, *readers])
    assert full.statistics().closed
    for put in (full.put, empty.put):
        with pytest.raises(ChannelClosed):
            await put(4)
    with pytest.raises(ChannelClosed):
        full.put_nowait(4)
    assert await full.get() == 1
    with pytest.raises(ChannelClosed):
        await full.get()


async def test_no_item_is_lost_when_a_get_is_cancelled_while_it_is_handed_one() -> None:
    channel = Channel[int](2)
    async with asyncio.TaskGroup() as tasks:
        cancelled, other = (tasks.create_task(channel.get()) for _ in range(2))
        await turns()
        channel.put_nowait(1)  # wakes the first reader, which has no turn before it is cancelled
        cancelled.cancel()
        assert await other == 1
    assert cancelled.cancelled()
    assert channel.statistics().num_items == 0


async def test_no_place_is_lost_when_a_put_is_cancelled_while_it_is_offered_one() -> None:
    channel = Channel[int](1)
    channel.put_nowait(1)
    async with asyncio.TaskGroup() as tasks:
        cancelled, other = (tasks.create_task(channel.put(item)) for item in (2, 3))
        await turns()
        assert await channel.get() == 1
        cancelled.cancel()
        await other
        assert await channel.get() == 3
    assert cancelled.cancelled()


async def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    channel = Channel[int](1)
    reader = asyncio.Task(channel.get())
    await turns()
    reader.cancel()
    await asyncio.wait([reader])
    channel.put_nowait(1)
    writer = asyncio.Task(channel.put(2))
    await turns()
    writer.cancel()
    await asyncio.wait([writer])
    assert await channel.get() == 1
    await channel.put(3)
    assert await channel.get() == 3


async def test_many_readers_and_writers_with_cancellations_lose_and_repeat_nothing() -> None:
    channel = Channel[int](2)
    got: list[int] = []
    put: list[int] = []

    async def write(item: int) -> None:
        await channel.put(item)
        put.append(item)

    async def read() -> None:
        while True:
            item = await channel.get()
            got.append(item)

    async def read_all() -> None:
        try:
            await read()
        except ChannelClosed:
            return

    async with asyncio.TaskGroup() as tasks:
        readers = [tasks.create_task(read_all()) for _ in range(4)]
        writers = [tasks.create_task(write(item)) for item in range(200)]
        for number, writer in enumerate(writers):
            if number % 7 == 0:
                writer.cancel()
            if number % 50 == 49:
                readers[number // 50 - 1].cancel()
                readers[number // 50 - 1] = tasks.create_task(read_all())
            await asyncio.sleep(0)
        await asyncio.wait(writers)
        channel.close()
    assert sorted(got) == sorted(put)
    assert len(got) == len(set(got)) == channel.statistics().num_got
