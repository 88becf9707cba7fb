"""The trainer's knowledge of a worker, without a worker: what it sends is caught, what it receives is made up here."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from aiorl.environments.make import Tick
from aiorl.environments.remote import RemoteWorker, State
from aiorl.environments.spaces import ArraySpec, EnvironmentInfo, EnvironmentSpec
from aiorl.environments.wire import (
    PROTOCOL_VERSION,
    Failed,
    Hello,
    Message,
    Ready,
    Reset,
    Setup,
    Step,
    Stop,
    decode,
    encode,
    observed,
)
from aiorl.errors import GroupLost, LinkClosed, MalformedMessage, ProtocolMismatch, WorkerDied

pytestmark = pytest.mark.anyio

TOKEN = b"0123456789abcdef"
INFO = EnvironmentInfo(ArraySpec((2,), "float32"), ArraySpec((), "int64"), 2, "same_step", None)
ACTIONS = np.array([0, 1, 0])


class Bench:
    """A worker of two groups of three environments, of incarnation 4, and what is sent to it."""

    def __init__(self, *, ready: bool = True) -> None:
        setup = Setup(4, EnvironmentSpec("walks:Walk"), (3, 3), tuple(range(6)), 6)
        self.sent: list[Message] = []
        self.breaches: list[MalformedMessage] = []
        self.worker = RemoteWorker(1, setup, token=TOKEN, send=self._send, breach=self.breaches.append)
        if ready:
            self.give(Hello(4, PROTOCOL_VERSION, 1, TOKEN))
            self.give(Ready(4, INFO, 1))
        self.group, self.other = self.worker.groups

    def _send(self, frames: list[bytes]) -> bool:
        self.sent.append(decode(frames))
        return True

    def give(self, message: Message) -> Failed | None:
        return self.worker.receive(encode(message))

    def answer(
        self, sequence: int, value: float = 0.0, *, incarnation: int = 4, shape: tuple[int, ...] = (3, 2), **tick: Any
    ) -> None:
        flags = np.zeros(shape[0], bool)
        observations = np.full(shape, value, tick.get("dtype", np.float32))
        rewards = np.zeros(shape[0], np.float32)
        self.give(observed(incarnation, 0, sequence, Tick(observations, rewards, flags, flags, observations[:0])))


async def asked(tasks: asyncio.TaskGroup, call: Any) -> asyncio.Task[Any]:
    """A task that has had its first turn, and so has sent its message."""
    task: asyncio.Task[Any] = tasks.create_task(call)
    await asyncio.sleep(0)
    return task


async def test_the_handshake() -> None:
    bench = Bench(ready=False)
    assert bench.worker.state is State.STARTING
    bench.give(Hello(4, PROTOCOL_VERSION, 1, TOKEN))
    assert isinstance(bench.sent[-1], Setup)
    bench.give(Ready(4, INFO, 1))
    assert (bench.worker.state, bench.worker.info) == (State.READY, INFO)
    assert [(group.name, group.first_env) for group in bench.worker.groups] == [
        ("worker 1 group 0", 6),
        ("worker 1 group 1", 9),
    ]


@pytest.mark.parametrize(
    ("hello", "match"),
    [
        (Hello(4, PROTOCOL_VERSION + 1, 1, TOKEN), "version"),
        (Hello(4, PROTOCOL_VERSION, 2, TOKEN), "token"),
        (Hello(4, PROTOCOL_VERSION, 1, b"x" * 16), "token"),
    ],
)
async def test_what_does_not_fit_is_refused(hello: Hello, match: str) -> None:
    bench = Bench(ready=False)
    with pytest.raises(ProtocolMismatch, match=match):
        bench.give(hello)
    assert bench.sent == []


@pytest.mark.parametrize("message", [Ready(4, INFO, 1), Hello(4, 1, 1, TOKEN), Stop(4), Reset(4, 0, 1)])
async def test_messages_out_of_turn_break_the_protocol(message: Message) -> None:
    with pytest.raises(MalformedMessage, match="while READY"):
        Bench().give(message)


async def test_steps_carry_incarnation_and_sequence() -> None:
    bench = Bench()
    async with asyncio.TaskGroup() as tasks:
        reset = await asked(tasks, bench.group.reset())
        assert bench.sent[-1] == Reset(4, 0, 1)
        bench.answer(1, 5.0)
        observations = await reset
        assert (observations == 5.0).all()
        assert observations.flags.writeable  # torch warns of others
        step = await asked(tasks, bench.group.step(ACTIONS))
        sent = bench.sent[-1]
        assert isinstance(sent, Step)
        assert (sent.incarnation, sent.group, sent.sequence, sent.actions.tolist()) == (4, 0, 2, [0, 1, 0])
        bench.answer(2, 6.0)
        assert ((await step).observations == 6.0).all()


async def test_an_earlier_incarnation_is_not_listened_to() -> None:
    bench = Bench()
    async with asyncio.TaskGroup() as tasks:
        reset = await asked(tasks, bench.group.reset())
        bench.answer(1, 1.0, incarnation=3)
        assert bench.worker.num_dropped == 1
        bench.answer(1, 2.0)
        assert (await reset == 2.0).all()


async def test_a_reset_is_not_answered_by_the_step_that_was_in_flight() -> None:
    bench = Bench()
    async with asyncio.TaskGroup() as tasks:
        reset = await asked(tasks, bench.group.reset())
        bench.answer(1)
        await reset
        step = await asked(tasks, bench.group.step(ACTIONS))
        step.cancel()
        await asyncio.wait([step])
        with pytest.raises(RuntimeError, match="reset it first"):
            await bench.group.step(ACTIONS)
        reset = await asked(tasks, bench.group.reset())
        bench.answer(2, 13.0)  # the step's
        assert not reset.done()
        assert bench.worker.num_dropped == 1
        bench.answer(3, 14.0)
        assert (await reset == 14.0).all()


async def test_an_answer_that_nobody_waits_for_is_dropped() -> None:
    bench = Bench()
    async with asyncio.TaskGroup() as tasks:
        reset = await asked(tasks, bench.group.reset())
        reset.cancel()
        await asyncio.wait([reset])
        bench.answer(1)
        assert bench.worker.num_dropped == 1
        with pytest.raises(RuntimeError, match="reset it first"):
            await bench.group.step(ACTIONS)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        ({"sequence": 2}, "does not owe"),
        ({"sequence": 1, "shape": (2, 2)}, "2 rows"),
        ({"sequence": 1, "shape": (3, 3)}, r"\(3, 3\)"),
        ({"sequence": 1, "dtype": np.float64}, "float64"),
    ],
)
async def test_answers_that_cannot_be_break_the_protocol(answer: dict[str, Any], match: str) -> None:
    bench = Bench()
    async with asyncio.TaskGroup() as tasks:
        reset = await asked(tasks, bench.group.reset())
        with pytest.raises(MalformedMessage, match=match):
            bench.answer(**answer)
        reset.cancel()


async def test_a_peer_with_two_unanswered_steps_breaks_the_protocol() -> None:
    bench = Bench()
    async with asyncio.TaskGroup() as tasks:
        reset = await asked(tasks, bench.group.reset())
        bench.answer(1)
        with pytest.raises(MalformedMessage, match="does not owe"):
            bench.answer(1)
        await reset


async def test_misuse_is_refused() -> None:
    bench = Bench()
    with pytest.raises(RuntimeError, match="reset it first"):
        await bench.group.step(ACTIONS)
    async with asyncio.TaskGroup() as tasks:
        reset = await asked(tasks, bench.group.reset())
        with pytest.raises(RuntimeError, match="waited for"):
            await bench.group.reset()
        bench.answer(1)
        await reset
        with pytest.raises(ValueError, match="float64"):
            await bench.group.step(np.zeros(3))


async def test_a_lost_worker_loses_its_groups_with_the_cause() -> None:
    bench = Bench()
    died = WorkerDied(worker=1, returncode=-9, how="ended by SIGKILL")
    async with asyncio.TaskGroup() as tasks:
        task = await asked(tasks, expect_lost(bench, died))
        bench.worker.lose(died)
        bench.worker.lose(LinkClosed("later"))
        await task
        await expect_lost(bench, died)


async def expect_lost(bench: Bench, cause: BaseException) -> None:
    with pytest.raises(GroupLost, match="worker 1 group 0 is lost: worker 1 died: ended by SIGKILL") as caught:
        await bench.group.reset()
    assert caught.value.__cause__ is cause


async def test_a_loss_that_meets_a_cancellation_is_not_left_over() -> None:
    bench = Bench()
    async with asyncio.TaskGroup() as tasks:
        reset = await asked(tasks, bench.group.reset())
        bench.worker.lose(LinkClosed("gone"))
        reset.cancel()
        await asyncio.wait([reset])
        assert reset.cancelled()


async def test_a_failure_is_handed_on() -> None:
    failed = Failed(4, "step", "ValueError: no", "Traceback")
    assert Bench().give(failed) == failed


async def test_a_stopping_worker_is_told_again_and_not_listened_to() -> None:
    bench = Bench(ready=False)
    bench.worker.stop()
    bench.worker.stop()
    assert bench.sent == [Stop(4)]
    bench.give(Hello(4, PROTOCOL_VERSION, 1, TOKEN))
    assert bench.sent == [Stop(4)] * 2
    assert bench.give(Failed(4, "constructor", "", "")) is None
    with pytest.raises(GroupLost, match="being closed"):
        await bench.group.reset()
