"""Where computations run, what is set around them, and that nothing computes after the end."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest
import torch

from aiorl.compute.device import LOOP_BUDGET_S, Placement, TorchSettings, faster_threads

pytestmark = pytest.mark.anyio

PATIENCE_S = 10.0
WARM_UP_CALLS = 5


def where() -> int:
    """The thread that runs it; takes no time."""
    return threading.get_ident()


def where_else() -> int:
    """Another kind."""
    return threading.get_ident()


def slowly() -> int:
    """The thread that runs it; takes longer than the loop may be held up for."""
    compute(5 * LOOP_BUDGET_S)
    return threading.get_ident()


def compute(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def threads_of_torch() -> tuple[int, int]:
    return threading.get_ident(), torch.get_num_threads()


def one_more_than_torch_takes() -> TorchSettings:
    return TorchSettings(num_threads=torch.get_num_threads() + 1)


async def test_what_is_short_moves_to_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    here = threading.get_ident()
    with caplog.at_level(logging.DEBUG, "aiorl.compute.device"):
        async with Placement("short", TorchSettings(num_threads=1)) as place:
            idents = [await place.call(where) for _ in range(WARM_UP_CALLS + 3)]
    assert here not in idents[:WARM_UP_CALLS]
    assert len(set(idents[:WARM_UP_CALLS])) == 1
    assert idents[WARM_UP_CALLS:] == [here] * 3
    assert caplog.text.count("where takes") == 1
    assert "on the event loop" in caplog.text


async def test_what_is_long_stays_on_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "aiorl.compute.device"):
        async with Placement("long", TorchSettings(num_threads=1)) as place:
            idents = {await place.call(slowly) for _ in range(WARM_UP_CALLS + 2)}
    assert len(idents) == 1
    assert threading.get_ident() not in idents
    assert "on a thread of its own" in caplog.text


async def test_what_waits_goes_back_to_the_thread() -> None:
    def waiting() -> int:
        time.sleep(2 * LOOP_BUDGET_S)  # the length of the wait is what is tested
        return threading.get_ident()

    here = threading.get_ident()
    async with Placement("waiting", TorchSettings(num_threads=1)) as place:
        idents = [await place.call(waiting) for _ in range(3 * WARM_UP_CALLS)]
    assert [ident == here for ident in idents] == [False] * WARM_UP_CALLS + [True] * WARM_UP_CALLS + [
        False
    ] * WARM_UP_CALLS


async def test_what_becomes_long_moves_to_the_thread() -> None:
    long = threading.Event()

    def growing() -> int:
        if long.is_set():
            time.sleep(5 * LOOP_BUDGET_S)  # the length of the computation is what is tested
        return threading.get_ident()

    here = threading.get_ident()
    async with Placement("growing", TorchSettings(num_threads=1)) as place:
        for _ in range(2 * WARM_UP_CALLS):
            await place.call(growing)
        long.set()
        idents = [await place.call(growing) for _ in range(WARM_UP_CALLS + 2)]
    assert [ident == here for ident in idents] == [True] * WARM_UP_CALLS + [False] * 2


async def test_a_busy_loop_does_not_make_a_computation_seem_long() -> None:
    """The thread waits for the interpreter while the loop works."""

    def in_pieces() -> int:
        for _ in range(4):
            compute(0.0002)
            time.sleep(0)  # gives the interpreter away, as torch's kernels do
        return threading.get_ident()

    async with Placement("busy", TorchSettings(num_threads=1)) as place:
        for _ in range(WARM_UP_CALLS):
            async with asyncio.TaskGroup() as tasks:
                call = tasks.create_task(place.call(in_pieces))
                while not call.done():
                    await asyncio.sleep(0)
                    compute(0.001)
        assert await place.call(in_pieces) == threading.get_ident()


async def test_the_first_call_does_not_count() -> None:
    """It is the one that imports, compiles and allocates."""
    first = threading.Event()

    def late_starter() -> int:
        if not first.is_set():
            first.set()
            compute(10 * LOOP_BUDGET_S)
        return threading.get_ident()

    async with Placement("late", TorchSettings(num_threads=1)) as place:
        for _ in range(WARM_UP_CALLS):
            await place.call(late_starter)
        assert await place.call(late_starter) == threading.get_ident()


async def test_each_kind_has_its_own_place() -> None:
    here = threading.get_ident()
    async with Placement("kinds", TorchSettings(num_threads=1)) as place:
        for _ in range(WARM_UP_CALLS):
            await place.call(where)
            await place.call(slowly)
        assert await place.call(where) == here
        assert await place.call(slowly) != here
        assert await place.call(where_else) != here  # not known yet


class Counter:
    def where(self) -> int:
        return threading.get_ident()


async def test_a_method_is_one_kind_whatever_it_is_bound_to() -> None:
    async with Placement("methods", TorchSettings(num_threads=1)) as place:
        for _ in range(WARM_UP_CALLS):
            await place.call(Counter().where)
        assert await place.call(Counter().where) == threading.get_ident()


async def test_settings_are_applied_in_both_places_and_put_back() -> None:
    before = torch.get_num_threads()
    settings = one_more_than_torch_takes()
    async with Placement("settings", settings) as place:
        for _ in range(WARM_UP_CALLS):
            ident, num_threads = await place.call(threads_of_torch)
            assert ident != threading.get_ident()
            assert num_threads == settings.num_threads
            assert torch.get_num_threads() == before
        assert await place.call(threads_of_torch) == (threading.get_ident(), settings.num_threads)
        assert torch.get_num_threads() == before
        assert await place.call(torch.get_num_threads) == settings.num_threads  # a new kind, on the thread again


def _fail() -> None:
    raise LookupError("no such thing")


async def test_settings_are_put_back_after_a_failure() -> None:
    before = torch.get_num_threads()
    async with Placement("failing", one_more_than_torch_takes()) as place:
        for _ in range(WARM_UP_CALLS):
            with pytest.raises(LookupError, match="no such thing"):
                await place.call(_fail)
            assert torch.get_num_threads() == before
        assert (await place.call(threads_of_torch))[1] == before + 1
    with pytest.raises(LookupError), one_more_than_torch_takes().applied():
        assert torch.get_num_threads() == before + 1
        _fail()
    assert torch.get_num_threads() == before


async def test_arguments_are_handed_over_in_both_places() -> None:
    async with Placement("arguments", TorchSettings(num_threads=1)) as place:
        for _ in range(WARM_UP_CALLS + 1):
            assert await place.call(_add, 1, second=2) == 3


def _add(first: int, *, second: int) -> int:
    return first + second


async def test_a_cancellation_waits_for_the_call() -> None:
    loop = asyncio.get_running_loop()
    begun, let_go = asyncio.Event(), threading.Event()
    ended: list[int] = []

    def blocks() -> None:
        loop.call_soon_threadsafe(begun.set)
        assert let_go.wait(PATIENCE_S)
        ended.append(1)

    async with Placement("cancelled", TorchSettings(num_threads=1)) as place, asyncio.TaskGroup() as tasks:
        task = tasks.create_task(place.call(blocks))
        await begun.wait()
        task.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not task.done()
        assert not ended
        let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended
        assert await place.call(where) != threading.get_ident()  # it still works


async def test_the_thread_is_joined_at_the_end() -> None:
    async with Placement("joined", TorchSettings(num_threads=1)) as place:
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("aiorl-joined")]
        await place.call(where)
        assert [thread for thread in threading.enumerate() if thread.name.startswith("aiorl-joined")]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("aiorl-joined")]


def test_the_faster_number_of_threads_is_one_of_two() -> None:
    """Whichever it is, torch's own is as before, and the function ran with both."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen: list[int] = []

        def slow_with_two() -> None:
            seen.append(torch.get_num_threads())
            if seen[-1] == 2:
                time.sleep(0.002)

        def slow_with_one() -> None:
            if torch.get_num_threads() == 1:
                time.sleep(0.002)

        assert faster_threads(slow_with_two) == 1
        assert set(seen) == {1, 2}
        assert faster_threads(slow_with_one) == 2
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        seen.clear()
        assert faster_threads(slow_with_two) == 1
        assert not seen  # there is nothing to choose from
    finally:
        torch.set_num_threads(before)
