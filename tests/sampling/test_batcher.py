from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import math
import time
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from aiorl.errors import BatcherClosed, BatcherError, MalformedRows
from aiorl.sampling.batcher import MicroBatcher

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from numpy.typing import NDArray

pytestmark = pytest.mark.anyio


def rows(*values: float) -> NDArray[np.float32]:
    """One row ``[value, -value]`` for each value."""
    return np.array([[value, -value] for value in values], dtype=np.float32).reshape(len(values), 2)


def firsts(answers: NDArray[Any]) -> list[float]:
    """What `Doubler` answered, row by row."""
    values: list[float] = answers.tolist()
    return values


class Doubler:
    """Answers twice the first column, and notes the first column of each batch."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []

    def __call__(self, batch: NDArray[Any]) -> NDArray[Any]:
        self.batches.append(batch[:, 0].tolist())
        doubled: NDArray[Any] = batch[:, 0] * 2
        return doubled


class Held:
    """An asynchronous `Doubler` whose batches wait for `release`; one that holds a negative value raises instead."""

    def __init__(self) -> None:
        self.doubler = Doubler()
        self.began = asyncio.Event()
        self.gate = asyncio.Event()
        self.answering = asyncio.Event()
        self.num_cancelled = 0

    async def __call__(self, batch: NDArray[Any]) -> NDArray[Any]:
        answers = self.doubler(batch)
        self.began.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        self.began.clear()
        self.gate.clear()
        if (batch[:, 0] < 0).any():
            raise ZeroDivisionError("negative")
        self.answering.set()  # whoever waits for it has its turn before those who get the answers
        return answers


async def turns(number: int = 5) -> None:
    """Gives the loop a few turns, in which everything that can happen without time passing happens."""
    for _ in range(number):
        await asyncio.sleep(0)


async def failure(task: asyncio.Task[Any]) -> BaseException | None:
    await asyncio.wait([task])
    return task.exception()


# ---------------------------------------------------------------- the rules


async def test_rows_are_flushed_when_the_maximum_is_there_and_each_gets_its_own_in_order() -> None:
    infer = Doubler()
    async with MicroBatcher(infer, max_batch_size=4) as batcher, asyncio.TaskGroup() as tasks:
        one = tasks.create_task(batcher.submit(rows(1)))
        two = tasks.create_task(batcher.submit(rows(2, 3)))
        await turns()
        assert infer.batches == []
        three = tasks.create_task(batcher.submit(rows(4)))
    assert infer.batches == [[1, 2, 3, 4]]
    assert [firsts(task.result()) for task in (one, two, three)] == [[2], [4, 6], [8]]
    assert batcher.statistics().flushes == {"size": 1, "time": 0, "producers": 0, "flush": 0, "drain": 0}


async def test_rows_of_a_tuple_and_answers_in_a_tuple_stay_together() -> None:
    def infer(batch: tuple[NDArray[Any], ...]) -> tuple[NDArray[Any], ...]:
        left, right = batch
        return left[:, 0] + right, right

    async with MicroBatcher(infer, max_batch_size=3) as batcher, asyncio.TaskGroup() as tasks:
        one = tasks.create_task(batcher.submit((rows(1, 2), np.array([10, 20]))))
        two = tasks.create_task(batcher.submit((rows(3), np.array([30]))))
    assert [part.tolist() for part in one.result()] == [[11, 22], [10, 20]]
    assert [part.tolist() for part in two.result()] == [[33], [30]]


async def test_a_batch_takes_whole_requests_in_order_while_they_fit() -> None:
    infer = Doubler()
    async with MicroBatcher(infer, max_batch_size=4, max_wait_time=0) as batcher, asyncio.TaskGroup() as tasks:
        for values in ([1, 2, 3], [4, 5], [6]):
            tasks.create_task(batcher.submit(rows(*values)))
    assert infer.batches == [[1, 2, 3], [4, 5, 6]]


async def test_only_a_request_above_the_maximum_is_split_and_it_resolves_once() -> None:
    infer = Doubler()
    async with MicroBatcher(infer, max_batch_size=4) as batcher, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(batcher.submit(rows(1)))
        large = tasks.create_task(batcher.submit(rows(*range(2, 12))))
        last = tasks.create_task(batcher.submit(rows(12, 13)))
    assert infer.batches == [[1], [2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13]]
    assert firsts(first.result()) == [2]
    assert firsts(large.result()) == [2 * value for value in range(2, 12)]
    assert firsts(last.result()) == [24, 26]


async def test_a_split_request_is_finished_although_its_rest_fills_no_batch() -> None:
    infer = Doubler()
    async with MicroBatcher(infer, max_batch_size=4, min_batch_size=3) as batcher:
        assert firsts(await batcher.submit(rows(1, 2, 3, 4, 5))) == [2, 4, 6, 8, 10]
    assert infer.batches == [[1, 2, 3, 4], [5]]


async def test_the_oldest_row_waits_max_wait_time_and_no_longer() -> None:
    infer = Doubler()
    async with MicroBatcher(infer, max_batch_size=100, max_wait_time=0.02) as batcher:
        started = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for value in range(3):
                tasks.create_task(batcher.submit(rows(value)))
        elapsed_s = time.perf_counter() - started
    assert infer.batches == [[0, 1, 2]]
    assert 0.02 <= elapsed_s < 5
    assert batcher.statistics().flushes["time"] == 1
    assert 0.02 <= batcher.statistics().wait_s.max < 5


async def test_a_wait_below_the_resolution_of_timers_ends_too() -> None:
    infer = Doubler()
    async with MicroBatcher(infer, max_wait_time=1e-4) as batcher:
        for value in range(3):
            assert firsts(await batcher.submit(rows(value))) == [2 * value]


async def test_a_timer_set_for_an_earlier_row_waits_on_for_the_later_one() -> None:
    infer = Doubler()
    async with MicroBatcher(infer, max_batch_size=2, max_wait_time=0.02) as batcher, asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.submit(rows(1)))
        await turns()
        await batcher.submit(rows(2))
        queued_at = time.perf_counter()
        await batcher.submit(rows(3))
        assert 0.02 <= time.perf_counter() - queued_at < 5
    assert infer.batches == [[1, 2], [3]]


async def test_no_wait_gathers_what_is_submitted_in_one_turn_time_and_again() -> None:
    infer = Doubler()
    async with MicroBatcher(infer, max_wait_time=0) as batcher:
        for wave in ([0, 1, 2], [3, 4], [5, 6, 7]):
            async with asyncio.TaskGroup() as tasks:
                for value in wave:
                    tasks.create_task(batcher.submit(rows(value)))
    assert infer.batches == [[0, 1, 2], [3, 4], [5, 6, 7]]


async def test_an_expired_wait_stays_expired_until_the_minimum_is_there() -> None:
    infer = Doubler()
    async with MicroBatcher(infer, min_batch_size=3, max_wait_time=0) as batcher, asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.submit(rows(1)))
        await turns()
        tasks.create_task(batcher.submit(rows(2)))
        await turns()
        assert infer.batches == []
        tasks.create_task(batcher.submit(rows(3)))
        await asyncio.sleep(0)
        assert infer.batches == [[1, 2, 3]]  # within the submit itself, without another wait
        tasks.create_task(batcher.submit(rows(4)))
        await turns()
        assert infer.batches == [[1, 2, 3]]
        tasks.create_task(batcher.submit(rows(5, 6)))
    assert infer.batches == [[1, 2, 3], [4, 5, 6]]


async def test_rows_that_arrive_while_a_batch_computes_gather() -> None:
    infer = Held()
    async with MicroBatcher(infer, max_wait_time=0, max_batch_size=3) as batcher, asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.submit(rows(0)))
        await infer.began.wait()
        for value in range(1, 6):
            tasks.create_task(batcher.submit(rows(value)))
        await turns()
        assert infer.doubler.batches == [[0]]
        for _ in range(3):
            await infer.began.wait()
            infer.gate.set()
            await turns(10)
    assert infer.doubler.batches == [[0], [1, 2, 3], [4, 5]]


async def test_flush_sends_what_is_queued_and_nothing_that_comes_later() -> None:
    infer = Doubler()
    async with MicroBatcher(infer, max_batch_size=100) as batcher, asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.submit(rows(1)))
        tasks.create_task(batcher.submit(rows(2)))
        await turns()
        batcher.flush()
        assert infer.batches == [[1, 2]]
        tasks.create_task(batcher.submit(rows(3)))
        await turns()
        assert infer.batches == [[1, 2]]
        batcher.flush()
    assert batcher.statistics().flushes["flush"] == 2


async def test_the_maximum_can_change_while_rows_are_queued() -> None:
    infer = Doubler()
    async with MicroBatcher(infer, max_batch_size=100, min_batch_size=2) as batcher, asyncio.TaskGroup() as tasks:
        for value in range(3):
            tasks.create_task(batcher.submit(rows(value)))
        await turns()
        batcher.set_max_batch_size(1)
        await turns()
        assert infer.batches == [[0], [1], [2]]
        with pytest.raises(ValueError, match="max_batch_size must be"):
            batcher.set_max_batch_size(0)


# ---------------------------------------------------------------- producers


async def test_a_batch_waits_for_every_answer_that_is_outstanding_and_no_longer() -> None:
    infer = Doubler()
    async with MicroBatcher(infer) as batcher:
        with batcher.producer() as one, batcher.producer() as two:
            one.expect()
            two.expect()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(one.submit(rows(1)))
                await turns()
                assert infer.batches == []
                await two.submit(rows(2))
            assert infer.batches == [[1, 2]]
            async with asyncio.TaskGroup() as tasks:  # now both are outstanding, since both were answered
                tasks.create_task(two.submit(rows(3)))
                await turns()
                assert infer.batches == [[1, 2]]
                await one.submit(rows(4))
    assert infer.batches == [[1, 2], [3, 4]]
    assert batcher.statistics().flushes["producers"] == 2


@pytest.mark.parametrize("how", ["park", "leave", "malformed", "cancelled", "failed"])
async def test_a_producer_that_waits_for_something_else_holds_nobody_up(how: str) -> None:
    def infer(batch: NDArray[Any]) -> NDArray[Any]:
        if batch[0, 0] < 0:
            raise ZeroDivisionError
        return batch

    async with MicroBatcher(infer) as batcher, asyncio.TaskGroup() as tasks:
        with batcher.producer() as steady:
            joined = batcher.producer()
            with joined:
                joined.expect()
                waiting = tasks.create_task(steady.submit(rows(1)))
                await turns()
                assert not waiting.done()
                if how == "park":
                    joined.park()
                elif how == "malformed":
                    with pytest.raises(MalformedRows):
                        await joined.submit(np.zeros((1, 3), np.float32))
                elif how == "cancelled":
                    submitted = tasks.create_task(joined.submit(rows(2)))  # it is answered within its own submit
                    await asyncio.sleep(0)
                    submitted.cancel()
                elif how == "failed":
                    waiting.cancel()
                    with pytest.raises(ZeroDivisionError):
                        await joined.submit(rows(-1))
                    waiting = tasks.create_task(steady.submit(rows(3)))
                if how != "leave":
                    await asyncio.wait([waiting])
                    assert len(await steady.submit(rows(5))) == 1
            await asyncio.wait([waiting])


async def test_a_producer_may_join_late_and_is_not_waited_for_until_it_was_answered() -> None:
    infer = Doubler()
    async with MicroBatcher(infer) as batcher, asyncio.TaskGroup() as tasks:
        with batcher.producer() as early:
            await early.submit(rows(1))
            with batcher.producer() as late:
                await early.submit(rows(2))
                early.park()
                await late.submit(rows(3))
                task = tasks.create_task(early.submit(rows(4)))
                await turns()
                assert infer.batches == [[1], [2], [3]]
                await late.submit(rows(5))
                await task
    assert infer.batches == [[1], [2], [3], [4, 5]]


async def test_a_producer_that_left_while_its_rows_computed_is_not_waited_for() -> None:
    infer = Held()
    async with MicroBatcher(infer) as batcher, asyncio.TaskGroup() as tasks:
        with batcher.producer() as steady:
            with batcher.producer() as leaves:
                last = tasks.create_task(leaves.submit(rows(1)))
                await infer.began.wait()
            infer.gate.set()
            assert firsts(await last) == [2]
            following = tasks.create_task(steady.submit(rows(2)))
            await infer.began.wait()
            infer.gate.set()
            assert firsts(await following) == [4]


async def test_joining_flushes_what_others_have_queued() -> None:
    infer = Doubler()
    async with MicroBatcher(infer, max_batch_size=10) as batcher, asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.submit(rows(1)))
        await turns()
        with batcher.producer():
            assert infer.batches == [[1]]


async def test_early_flushing_does_not_wait_for_the_minimum() -> None:
    infer = Doubler()
    async with MicroBatcher(infer, min_batch_size=8, max_wait_time=0) as batcher:
        with batcher.producer() as producer:
            await producer.submit(rows(1))
    assert infer.batches == [[1]]


async def test_the_last_producer_to_leave_flushes_what_nothing_else_would() -> None:
    infer = Doubler()
    async with MicroBatcher(infer) as batcher, asyncio.TaskGroup() as tasks:
        with batcher.producer() as producer:
            producer.expect()
            other = tasks.create_task(batcher.submit(rows(1)))
            await turns()
            assert infer.batches == []
        assert firsts(await other) == [2]


async def test_a_producer_is_refused_what_it_cannot_do() -> None:
    infer = Held()
    async with MicroBatcher(infer, max_batch_size=1) as batcher, asyncio.TaskGroup() as tasks:
        producer = batcher.producer()
        with pytest.raises(RuntimeError, match="not joined"):
            await producer.submit(rows(1))
        with pytest.raises(RuntimeError, match="between joining and leaving"):
            producer.expect()
        with producer:
            tasks.create_task(producer.submit(rows(1)))
            await infer.began.wait()
            with pytest.raises(RuntimeError, match="one request at a time"):
                await producer.submit(rows(2))
            infer.gate.set()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_batch_size": 0}, "min_batch_size must be at least 1"),
        ({"max_batch_size": 2, "min_batch_size": 3}, "max_batch_size = 2 is below min_batch_size = 3"),
        ({"max_batch_size": 0}, "max_batch_size must be at least 1"),
        ({"max_wait_time": -1.0}, "max_wait_time"),
        ({"max_wait_time": math.inf}, "max_wait_time"),
        ({"max_wait_time": math.nan}, "max_wait_time"),
    ],
)
async def test_settings_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MicroBatcher(Doubler(), **arguments)


async def test_rows_that_nothing_would_ever_flush_are_refused() -> None:
    async with MicroBatcher(Doubler()) as batcher:
        with pytest.raises(BatcherError, match="would never flush these rows"):
            await batcher.submit(rows(1))
        with batcher.producer() as producer:
            assert firsts(await producer.submit(rows(1))) == [2]


@pytest.mark.parametrize(
    ("malformed", "message"),
    [
        (
            np.zeros((1, 3), np.float32),
            r"its rows are float32 \(3,\), but those of the first request were float32 \(2,\)",
        ),
        (np.zeros((1, 2), np.float64), "float64"),
        (np.zeros((1, 2, 1), np.float32), r"\(2, 1\)"),
        ((np.zeros((1, 2), np.float32),), "a tuple of float32"),
        (np.zeros((0, 2), np.float32), "it has no rows"),
        (np.float32(1), "neither an array nor a tuple"),
        (np.zeros(()), "without dimensions"),
        ([[1.0, 2.0]], "a list, which is neither"),
        ((np.zeros((1, 2)), np.zeros((2, 2))), "do not share"),
        ((np.zeros((1, 2)), 3), "a tuple with a int in it"),
        ((), "do not share"),
    ],
)
async def test_a_malformed_request_fails_alone(malformed: Any, message: str) -> None:
    infer = Doubler()
    async with MicroBatcher(infer, max_batch_size=2) as batcher, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(batcher.submit(rows(1)))
        await turns()
        with pytest.raises(MalformedRows, match=message):
            await batcher.submit(malformed)
        assert firsts(await batcher.submit(rows(2))) == [4]
        assert firsts(await first) == [2]
    statistics = batcher.statistics()
    assert (statistics.num_requests, statistics.num_malformed, statistics.num_failed) == (2, 1, 0)


async def test_it_is_used_inside_of_its_context_and_once() -> None:
    batcher = MicroBatcher(Doubler(), max_batch_size=1)
    with pytest.raises(RuntimeError, match="not open"):
        await batcher.submit(rows(1))
    async with batcher:
        with pytest.raises(RuntimeError, match="open already"):
            await batcher.__aenter__()
    with pytest.raises(BatcherClosed, match="cannot be opened again"):
        await batcher.__aenter__()


# ---------------------------------------------------------------- inference


async def test_a_failing_inference_fails_its_own_batch_alone_with_the_exception_itself() -> None:
    error = ZeroDivisionError("twelve")

    def infer(batch: NDArray[Any]) -> NDArray[Any]:
        if 12 in batch:
            raise error
        return batch[:, 0]

    async with MicroBatcher(infer, max_batch_size=2) as batcher:
        ours = [asyncio.Task(batcher.submit(rows(value))) for value in (11, 12, 13, 14)]
        assert await failure(ours[0]) is error
        assert await failure(ours[1]) is error
        assert [firsts(await task) for task in ours[2:]] == [[13], [14]]
    assert batcher.statistics().num_failed == 2


async def test_a_split_request_fails_as_a_whole_and_its_rest_leaves_the_queue() -> None:
    infer = Held()
    async with MicroBatcher(infer, max_batch_size=2) as batcher, asyncio.TaskGroup() as tasks:
        large = asyncio.Task(batcher.submit(rows(-1, 2, 3, 4, 5)))
        await infer.began.wait()
        other = tasks.create_task(batcher.submit(rows(6, 7)))
        infer.gate.set()
        assert isinstance(await failure(large), ZeroDivisionError)
        await infer.began.wait()
        infer.gate.set()
        assert firsts(await other) == [12, 14]
    assert infer.doubler.batches == [[-1, 2], [6, 7]]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (np.zeros(3), "asked for 2 rows and answered 3 rows"),
        (np.zeros(()), "without dimensions"),
        ([1, 2], "a list"),
        ((np.zeros(2), np.zeros(1)), "do not share"),
        (None, "a NoneType"),
    ],
)
async def test_an_inference_that_answers_something_else_fails_its_batch(answers: Any, message: str) -> None:
    async with MicroBatcher(lambda _: answers, max_batch_size=2) as batcher:
        with pytest.raises(BatcherError, match=message):
            await batcher.submit(rows(1, 2))
        with pytest.raises(BatcherError, match=message):
            await batcher.submit(rows(1, 2))


async def test_answers_to_the_parts_of_a_request_that_do_not_join_fail_it() -> None:
    widths = iter([1, 2, 3])
    async with MicroBatcher(lambda batch: np.zeros((len(batch), next(widths))), max_batch_size=2) as batcher:
        with pytest.raises(ValueError, match="concatenat"):
            await batcher.submit(rows(1, 2, 3))
        assert (await batcher.submit(rows(1, 2))).shape == (2, 3)


async def test_what_no_future_can_hold_becomes_a_batcher_error() -> None:
    def infer(batch: NDArray[Any]) -> NDArray[Any]:
        empty: list[NDArray[Any]] = []
        return next(iter(empty)) if batch[0, 0] == 0 else _cancelled()

    def _cancelled() -> NDArray[Any]:
        raise asyncio.CancelledError

    async with MicroBatcher(infer, max_batch_size=1) as batcher:
        with pytest.raises(BatcherError, match="StopIteration") as caught:
            await batcher.submit(rows(0))
        assert isinstance(caught.value.__cause__, StopIteration)
        with pytest.raises(BatcherError, match="CancelledError"):
            await batcher.submit(rows(1))


async def test_neighbours_of_a_submit_that_was_interrupted_while_it_computed_do_not_hang() -> None:
    class Stop(BaseException):
        pass

    def infer(batch: NDArray[Any]) -> NDArray[Any]:
        if batch[0, 0] == 0:
            raise Stop
        return batch

    async with MicroBatcher(infer, max_batch_size=2) as batcher:
        neighbour = asyncio.Task(batcher.submit(rows(0)))
        await turns()
        with pytest.raises(Stop):
            await batcher.submit(rows(1))
        error = await failure(neighbour)
        assert isinstance(error, BatcherError)
        assert isinstance(error.__cause__, Stop)
        assert len(await batcher.submit(rows(1, 2))) == 2


async def test_an_asynchronous_inference_that_is_cancelled_from_within_fails_its_batch_alone() -> None:
    held = asyncio.get_running_loop().create_future()

    async def infer(batch: NDArray[Any]) -> NDArray[Any]:
        if batch[0, 0] == 0:
            await held
        return batch

    async with MicroBatcher(infer, max_batch_size=1) as batcher, asyncio.TaskGroup() as tasks:
        ours = asyncio.Task(batcher.submit(rows(0)))
        after = tasks.create_task(batcher.submit(rows(1)))
        await turns()
        held.cancel()
        error = await failure(ours)
        assert isinstance(error, BatcherError)
        assert isinstance(error.__cause__, asyncio.CancelledError)
        assert len(await after) == 1


async def _async_double(batch: NDArray[Any], factor: int) -> NDArray[Any]:
    await asyncio.sleep(0)
    doubled: NDArray[Any] = batch[:, 0] * factor
    return doubled


class _AsyncCall:
    async def __call__(self, batch: NDArray[Any]) -> NDArray[Any]:
        return await _async_double(batch, 2)

    async def method(self, batch: NDArray[Any]) -> NDArray[Any]:
        return await _async_double(batch, 2)


def _as_future(batch: NDArray[Any]) -> asyncio.Future[NDArray[Any]]:
    return asyncio.get_running_loop().run_in_executor(None, np.multiply, batch[:, 0], 2)


@pytest.mark.parametrize(
    "infer",
    [
        functools.partial(_async_double, factor=2),
        _AsyncCall(),
        functools.partial(_AsyncCall()),
        _AsyncCall().method,
        lambda batch: _async_double(batch, 2),
        _as_future,
        Doubler(),
        functools.partial(Doubler()),
    ],
)
async def test_inference_may_be_any_callable_whether_asynchronous_or_not(
    infer: Callable[[Any], NDArray[Any] | Awaitable[NDArray[Any]]],
) -> None:
    async with MicroBatcher(infer, max_batch_size=2) as batcher:
        for _ in range(3):
            assert firsts(await batcher.submit(rows(1, 2))) == [2, 4]
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_a_plain_inference_needs_no_task_and_an_asynchronous_one_has_one() -> None:
    seen: list[str] = []

    def note() -> None:
        seen.extend(sorted(task.get_name() for task in asyncio.all_tasks() if "inference" in task.get_name()))

    def plain(batch: NDArray[Any]) -> NDArray[Any]:
        note()
        return batch

    async def awaited(batch: NDArray[Any]) -> NDArray[Any]:
        note()
        return batch

    async with MicroBatcher(plain, max_batch_size=1) as batcher:
        await batcher.submit(rows(1))
    assert seen == []
    async with MicroBatcher(awaited, max_batch_size=1, name="acting") as batcher:
        for _ in range(3):
            await batcher.submit(rows(1))
    assert seen == ["acting inference"] * 3


async def test_a_batch_of_one_request_is_the_array_itself() -> None:
    seen: list[Any] = []

    def infer(batch: NDArray[Any]) -> NDArray[Any]:
        seen.append(batch)
        return batch

    async with MicroBatcher(infer, max_batch_size=1) as batcher:
        ours = rows(1)
        assert await batcher.submit(ours) is ours
        assert seen[0] is ours


async def test_a_submitter_that_does_nothing_else_does_not_starve_the_loop() -> None:
    async with MicroBatcher(Doubler(), max_batch_size=1) as batcher:
        turned = asyncio.Event()
        asyncio.get_running_loop().call_soon(turned.set)
        await batcher.submit(rows(1))
        assert turned.is_set()


# ---------------------------------------------------------------- cancellation


async def test_the_rows_of_a_cancelled_request_leave_the_queue_at_once() -> None:
    infer = Doubler()
    async with MicroBatcher(infer, max_batch_size=4) as batcher, asyncio.TaskGroup() as tasks:
        one = tasks.create_task(batcher.submit(rows(1)))
        gone = tasks.create_task(batcher.submit(rows(2)))
        await turns()
        gone.cancel()
        assert batcher.statistics().num_queued_rows == 1
        two = tasks.create_task(batcher.submit(rows(3, 4)))  # three rows now, although two and two were submitted
        await turns()
        assert infer.batches == []
        assert firsts(await batcher.submit(rows(5))) == [10]
        assert firsts(await one) == [2]
        assert firsts(await two) == [6, 8]
    assert infer.batches == [[1, 3, 4, 5]]
    assert gone.cancelled()
    assert batcher.statistics().num_cancelled == 1


async def test_cancelling_the_oldest_request_leaves_the_next_one_its_whole_wait() -> None:
    infer = Doubler()
    async with MicroBatcher(infer, min_batch_size=2, max_wait_time=0) as batcher, asyncio.TaskGroup() as tasks:
        oldest = tasks.create_task(batcher.submit(rows(1)))
        await turns()  # its wait has expired
        oldest.cancel()
        await turns()
        for value in (2, 3, 4):
            tasks.create_task(batcher.submit(rows(value)))
    assert infer.batches == [[2, 3, 4]]  # not [2, 3] at once, as were the wait still expired


async def test_cancelling_a_request_that_computes_discards_its_answer_only() -> None:
    infer = Held()
    async with MicroBatcher(infer, max_batch_size=2) as batcher, asyncio.TaskGroup() as tasks:
        stays = tasks.create_task(batcher.submit(rows(1)))
        goes = tasks.create_task(batcher.submit(rows(2)))
        await infer.began.wait()
        goes.cancel()
        await turns()
        assert goes.cancelled()
        assert not batcher.idle
        infer.gate.set()
        assert firsts(await stays) == [2]
        again = tasks.create_task(batcher.submit(rows(3, 4)))
        await infer.began.wait()
        infer.gate.set()
        assert firsts(await again) == [6, 8]
    assert infer.num_cancelled == 0


async def test_cancelling_everything_that_computes_does_not_cancel_the_inference() -> None:
    infer = Held()
    async with MicroBatcher(infer, max_batch_size=1) as batcher:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await batcher.submit(rows(1))
        assert not batcher.idle
        infer.gate.set()
        await turns(10)
        assert batcher.idle
    assert infer.num_cancelled == 0
    statistics = batcher.statistics()
    assert (statistics.num_requests, statistics.num_cancelled, statistics.num_pending) == (1, 1, 0)


@pytest.mark.parametrize("when", ["queued", "computing the first part", "computing the second part"])
async def test_cancelling_a_split_request_takes_its_rest_out_of_the_queue(when: str) -> None:
    infer = Held()
    async with MicroBatcher(infer, max_batch_size=2) as batcher, asyncio.TaskGroup() as tasks:
        ahead = tasks.create_task(batcher.submit(rows(0, 0)))
        large = tasks.create_task(batcher.submit(rows(*range(1, 8))))
        await infer.began.wait()
        for _ in range(["queued", "computing the first part", "computing the second part"].index(when)):
            infer.gate.set()
            await turns(10)
            await infer.began.wait()
        large.cancel()
        assert batcher.statistics().num_queued_rows == 0
        other = tasks.create_task(batcher.submit(rows(8, 9)))
        infer.gate.set()
        await turns(10)
        await infer.began.wait()
        infer.gate.set()
        assert firsts(await other) == [16, 18]
        assert firsts(await ahead) == [0, 0]
    assert batcher.idle


async def test_an_answer_whose_submitter_was_cancelled_on_the_way_is_counted_and_parks_its_producer() -> None:
    infer = Held()
    async with MicroBatcher(infer) as batcher:
        with batcher.producer() as producer, batcher.producer() as other:
            task = asyncio.Task(producer.submit(rows(1)))
            await infer.began.wait()
            infer.gate.set()
            await infer.answering.wait()
            task.cancel()  # it has its answer, but no turn since
            await asyncio.wait([task])
            assert task.cancelled()
            assert batcher.statistics().num_cancelled == 1
            following = asyncio.Task(other.submit(rows(2)))
            await infer.began.wait()
            infer.gate.set()
            assert firsts(await following) == [4]


# ---------------------------------------------------------------- closing


async def test_closing_drains_and_refuses_what_comes_meanwhile() -> None:
    infer = Held()
    async with MicroBatcher(infer, max_batch_size=2) as batcher, asyncio.TaskGroup() as tasks:
        answered = [tasks.create_task(batcher.submit(rows(value))) for value in range(3)]
        await infer.began.wait()
        closing = [tasks.create_task(batcher.aclose()) for _ in range(2)]
        await turns()
        with pytest.raises(BatcherClosed):
            await batcher.submit(rows(9))
        assert not any(task.done() for task in closing)
        for _ in range(2):
            infer.gate.set()
            await turns(10)
    assert [firsts(task.result()) for task in answered] == [[0], [2], [4]]
    await batcher.aclose()
    statistics = batcher.statistics()
    assert statistics.flushes["drain"] == 1
    assert (statistics.num_requests, statistics.num_rows, statistics.num_batches) == (3, 3, 2)


async def test_draining_a_plain_inference_answers_everything() -> None:
    infer = Doubler()
    async with MicroBatcher(infer, max_batch_size=100) as batcher, asyncio.TaskGroup() as tasks:
        answered = [tasks.create_task(batcher.submit(rows(value))) for value in range(3)]
        await turns()
        await batcher.aclose()
        assert [firsts(await task) for task in answered] == [[0], [2], [4]]
    assert infer.batches == [[0, 1, 2]]


async def test_leaving_the_context_drains() -> None:
    infer = Doubler()
    async with asyncio.TaskGroup() as tasks:
        async with MicroBatcher(infer, max_batch_size=2) as batcher:
            answered = [tasks.create_task(batcher.submit(rows(value))) for value in range(5)]
            await asyncio.sleep(0)
        assert [firsts(await task) for task in answered] == [[0], [2], [4], [6], [8]]


@pytest.mark.parametrize("begun", [True, False])
async def test_closing_without_draining_refuses_all_and_cancels_the_inference(begun: bool) -> None:
    infer = Held()
    async with MicroBatcher(infer, max_batch_size=2) as batcher:
        refused = [asyncio.Task(batcher.submit(rows(value))) for value in range(3)]
        await asyncio.sleep(0)  # handed to the batcher's task, which had no turn yet
        if begun:
            await infer.began.wait()
        await batcher.aclose(drain=False)
        for task in refused:
            assert isinstance(await failure(task), BatcherClosed)
        await batcher.aclose(drain=False)
    assert infer.num_cancelled == int(begun)
    assert batcher.statistics().num_failed == 3


async def test_an_inference_may_clean_up_when_it_is_cancelled_and_is_not_cancelled_again() -> None:
    began, cleaning, clean = asyncio.Event(), asyncio.Event(), asyncio.Event()
    cleaned = []

    async def infer(batch: NDArray[Any]) -> NDArray[Any]:
        try:
            began.set()
            await asyncio.get_running_loop().create_future()
        finally:
            cleaning.set()
            await clean.wait()
            cleaned.append(len(batch))
        return batch

    async with MicroBatcher(infer, max_batch_size=1) as batcher, asyncio.TaskGroup() as tasks:
        refused = asyncio.Task(batcher.submit(rows(1)))
        await began.wait()
        closing = [tasks.create_task(batcher.aclose(drain=False))]
        await cleaning.wait()
        closing.append(tasks.create_task(batcher.aclose(drain=False)))
        await turns()
        assert isinstance(await failure(refused), BatcherClosed)
        assert not any(task.done() for task in closing)
        clean.set()
    assert cleaned == [1]


async def test_closing_without_draining_cuts_a_drain_short() -> None:
    infer = Held()
    async with MicroBatcher(infer, max_batch_size=1) as batcher, asyncio.TaskGroup() as tasks:
        refused = asyncio.Task(batcher.submit(rows(1)))
        await infer.began.wait()
        draining = tasks.create_task(batcher.aclose())
        await turns()
        assert not draining.done()
        await batcher.aclose(drain=False)
        await draining
        assert isinstance(await failure(refused), BatcherClosed)


async def test_a_drain_that_is_cancelled_goes_on() -> None:
    infer = Held()
    async with MicroBatcher(infer, max_batch_size=1) as batcher, asyncio.TaskGroup() as tasks:
        answered = tasks.create_task(batcher.submit(rows(1)))
        await infer.began.wait()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await batcher.aclose()
        with pytest.raises(BatcherClosed):
            await batcher.submit(rows(2))
        infer.gate.set()
        assert firsts(await answered) == [2]


async def test_an_exception_leaves_the_context_as_it_is_and_refuses_what_waits() -> None:
    infer = Held()
    batcher = MicroBatcher(infer, max_batch_size=1)
    refused: list[asyncio.Task[Any]] = []

    async def body() -> None:
        async with batcher:
            refused.extend(asyncio.Task(batcher.submit(rows(value))) for value in range(2))
            await infer.began.wait()
            raise ZeroDivisionError("body")

    with pytest.raises(ZeroDivisionError, match="body"):
        await body()
    assert infer.num_cancelled == 1
    for task in refused:
        assert isinstance(await failure(task), BatcherClosed)


async def test_cancelling_the_context_while_it_drains_ends_the_inference() -> None:
    infer = Held()
    batcher = MicroBatcher(infer, max_batch_size=1)
    refused: list[asyncio.Task[Any]] = []

    async def body() -> None:
        async with batcher:
            refused.append(asyncio.Task(batcher.submit(rows(1))))
            await infer.began.wait()

    task = asyncio.Task(body())
    await infer.began.wait()
    await turns()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert infer.num_cancelled == 1
    assert isinstance(await failure(refused[0]), BatcherClosed)
    await batcher.aclose()


async def test_closing_takes_the_timer_away() -> None:
    async with MicroBatcher(Doubler(), max_batch_size=2, max_wait_time=3600.0) as batcher, asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.submit(rows(1)))
        await turns()
        await batcher.submit(rows(2))  # the timer stays for the next row
        await batcher.aclose()


async def test_closing_before_opening_ends_at_once() -> None:
    batcher = MicroBatcher(Doubler(), max_batch_size=1)
    await batcher.aclose()
    with pytest.raises(BatcherClosed):
        await batcher.submit(rows(1))


async def test_an_inference_whose_task_is_cancelled_from_outside_fails_its_batch_and_the_next_one_works() -> None:
    infer = Held()
    async with MicroBatcher(infer, max_batch_size=1, name="acting") as batcher, asyncio.TaskGroup() as tasks:
        ours = asyncio.Task(batcher.submit(rows(1)))
        await infer.began.wait()
        infer.began.clear()
        (worker,) = (task for task in asyncio.all_tasks() if task.get_name() == "acting inference")
        worker.cancel()
        assert isinstance(await failure(ours), BatcherError)
        following = tasks.create_task(batcher.submit(rows(2)))
        await infer.began.wait()
        infer.gate.set()
        assert firsts(await following) == [4]


# ---------------------------------------------------------------- figures


async def test_statistics_are_frozen_and_count_everything() -> None:
    async with MicroBatcher(Doubler(), max_batch_size=4) as batcher, asyncio.TaskGroup() as tasks:
        assert math.isnan(batcher.statistics().wait_s.mean)
        for size in (4, 3, 1, 4):
            tasks.create_task(batcher.submit(rows(*range(size))))
    statistics = batcher.statistics()
    assert (statistics.num_requests, statistics.num_rows, statistics.num_batches) == (4, 12, 3)
    assert (statistics.batch_rows.count, statistics.batch_rows.mean, statistics.batch_rows.max) == (3, 4, 4)
    assert (statistics.batch_rows.p50, statistics.batch_rows.p99) == (4, 4)
    assert statistics.wait_s.count == 4
    assert 0 <= statistics.wait_s.p50 <= statistics.wait_s.max < 1
    with pytest.raises(AttributeError):
        statistics.num_rows = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        statistics.flushes["size"] = 3  # type: ignore[index]


async def test_it_is_idle_only_when_every_answer_is_back_with_its_submitter() -> None:
    infer = Held()
    async with MicroBatcher(infer, max_batch_size=1) as batcher, asyncio.TaskGroup() as tasks:
        assert batcher.idle
        task = tasks.create_task(batcher.submit(rows(1)))
        await infer.began.wait()
        assert not batcher.idle
        infer.gate.set()
        await infer.answering.wait()
        assert not task.done()  # it was answered, but has had no turn since
        assert not batcher.idle
        await task
        assert batcher.idle


async def test_nothing_of_a_request_is_kept_after_its_answer_or_error() -> None:
    def infer(batch: NDArray[Any]) -> NDArray[Any]:
        if batch[0, 0] == 0:
            raise ZeroDivisionError
        return batch.copy()

    gc.collect()
    gc.disable()  # so that what dies here dies without its help
    try:
        async with MicroBatcher(infer, max_batch_size=1) as batcher:
            alive = []
            for value in (0, 1):
                ours = rows(value)
                alive.append(weakref.ref(ours))
                with contextlib.suppress(ZeroDivisionError):
                    await batcher.submit(ours)
                del ours
            assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("value", [2.5, True, "8"])
@pytest.mark.parametrize("name", ["max_batch_size", "min_batch_size", "max_wait_time"])
def test_a_size_is_an_int_and_a_time_a_number(name: str, value: Any) -> None:
    if (name, value) == ("max_wait_time", 2.5):
        return
    with pytest.raises(TypeError, match=f"^{name} must be .*, not {value!r}$"):
        MicroBatcher(lambda rows: rows, **{name: value})
    if name == "max_batch_size":
        batcher = MicroBatcher(lambda rows: rows, max_batch_size=8)
        with pytest.raises(TypeError, match=f"^max_batch_size must be an int, not {value!r}$"):
            batcher.set_max_batch_size(value)
