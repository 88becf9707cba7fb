"""Shared memory between trainer and worker: what passes through it, and what can go wrong at either end."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorl.environments import slab as slabs
from aiorl.environments.link import LinkServer
from aiorl.environments.remote import RemoteGroup, RemoteWorker, State
from aiorl.environments.slab import Slab, attach, open_slab
from aiorl.environments.spaces import ArraySpec, EnvironmentInfo, EnvironmentSpec
from aiorl.environments.wire import PROTOCOL_VERSION, Hello, Observed, Ready, Setup, encode
from aiorl.environments.worker import serve
from aiorl.errors import GroupLost, MalformedMessage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from aiorl.environments.slab import Exchange

TOKEN = b"0123456789abcdef"
ROW = ArraySpec((5, 2), "float32")
INFO = EnvironmentInfo(ROW, ArraySpec((), "int64"), 2, "same_step", None)


@pytest.fixture(autouse=True)
def everything_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "MIN_BYTES", 1)


@contextmanager
def opened() -> Iterator[Slab]:
    slab = Slab()
    try:
        yield slab
    finally:
        slab.release()


def both_ends(slab: Slab, *sizes: int) -> tuple[list[Exchange], list[Exchange]]:
    """The trainer's and the worker's."""
    return slab.share(ROW, sizes), attach(slab.descriptor, ROW, sizes)


def shown(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    """All of an array, to the bit."""
    return str(array.dtype), array.shape, array.tobytes()


# ------------------------------------------------------------------ the memory
def test_what_one_end_writes_the_other_reads() -> None:
    with opened() as slab:
        trainer, worker = both_ends(slab, 3, 2)
        for size, mine, theirs in zip((3, 2), trainer, worker, strict=True):
            theirs.begin(7)[:] = np.arange(size * 10).reshape(size, 5, 2)
            with pytest.raises(MalformedMessage, match="stamped 7 and 0 instead of 7"):
                mine.check(7)
            theirs.finish(7, np.full((1, 5, 2), 9.0, np.float32))
            mine.check(7)
        assert [exchange.observations.ravel().tolist() for exchange in trainer] == [[*range(30)], [*range(20)]]
        assert trainer[0].final_observations.ravel().tolist() == [9.0] * 10 + [0.0] * 20
        assert trainer[0].observations.flags.writeable  # torch warns of others


def test_small_rows_and_incredible_ones_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "MIN_BYTES", 200)
    for row, sizes in ((ROW, (4, 3)), (ArraySpec((2**28,) * 8, "float64"), (2**20,)), (ArraySpec((0,), "uint8"), (1,))):
        with opened() as slab:
            assert slab.share(row, sizes) == []
            assert attach(slab.descriptor, row, sizes) == []
    with opened() as slab:
        assert len(slab.share(ROW, (5, 4))) == 2  # 5 rows of 40 bytes


def test_no_end_can_pull_memory_away_under_the_other() -> None:
    with opened() as slab:
        both_ends(slab, 3)
        size = os.fstat(slab.descriptor).st_size
        for other in (0, size - 1, size + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(slab.descriptor, other)
        for seal in (fcntl.F_SEAL_WRITE, 0x10):  # 0x10: F_SEAL_FUTURE_WRITE
            with pytest.raises(PermissionError):
                fcntl.fcntl(slab.descriptor, fcntl.F_ADD_SEALS, seal)


def test_a_descriptor_that_the_worker_has_spoilt_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    with opened() as slab:
        fcntl.fcntl(slab.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        assert slab.share(ROW, (3,)) == []
        assert attach(slab.descriptor, ROW, (3,)) == []
    assert "cannot be shared" in caplog.text


def test_a_worker_takes_no_memory_that_is_too_small() -> None:
    with opened() as slab:
        slab.share(ROW, (1,))
        with pytest.raises(ValueError, match="greater than file size"):
            attach(slab.descriptor, ROW, (1000,))


def test_rows_that_are_still_viewed_outlive_their_slab() -> None:
    with opened() as slab:
        (trainer,) = slab.share(ROW, (2,))
        trainer.observations[:] = 3.0
        view = trainer.observations
        slab.release()
        slab.release()
        assert (view == 3.0).all()
    assert "/memfd:aiorl-slab (deleted)" in Path("/proc/self/maps").read_text()
    del view
    assert "/memfd:aiorl-slab (deleted)" not in Path("/proc/self/maps").read_text()


def test_where_there_is_no_memfd_there_is_no_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int) -> int:
        raise PermissionError(name)

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert open_slab() is None
    monkeypatch.delattr(os, "memfd_create")
    assert open_slab() is None


# ------------------------------------------------------------------ what passes through it
@asynccontextmanager
async def hosted(setup: Setup, slab: Slab | None) -> AsyncIterator[list[RemoteGroup]]:
    """The groups of a worker in a thread, which has the slab's descriptor as a process would inherit it."""
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()

    def receive(identity: bytes, frames: list[bytes]) -> None:
        assert worker.receive(frames) is None
        if worker.state is State.READY:
            ready.set()

    server = LinkServer("inproc://slab", receive, loop)
    worker = RemoteWorker(
        0, setup, token=TOKEN, send=partial(server.send, b"w"), breach=lambda error: pytest.fail(str(error)), slab=slab
    )
    about: dict[str, Any] = {"worker": 0, "incarnation": 0, "identity": b"w", "token": TOKEN}
    about["slab"] = None if slab is None else slab.descriptor
    thread = threading.Thread(target=serve, args=(server.context, server.endpoint), kwargs=about)
    thread.start()
    try:
        async with asyncio.timeout(20):
            await ready.wait()
        yield worker.groups
    finally:
        worker.stop()
        thread.join()
        server.close()


async def record(setup: Setup, slab: Slab | None, num_ticks: int) -> list[Any]:
    """Everything that a worker's groups bring, to the bit."""
    found: list[Any] = []
    async with hosted(setup, slab) as groups:
        assert all((group.exchange is not None) == (slab is not None) for group in groups)
        found += [shown(await group.reset()) for group in groups]
        for _ in range(num_ticks):
            for group in groups:
                tick = await group.step(np.zeros(group.num_envs, np.int64))
                arrays = tick.observations, tick.rewards, tick.terminated, tick.truncated, tick.final_observations
                found.append([shown(array) for array in arrays])
    return found


@given(
    dtype=st.sampled_from(["uint8", "float32", "float64"]),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    autoreset=st.sampled_from(["", "SameStep", "NextStep", "Disabled"]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_rows_are_those_that_messages_bring(
    dtype: str, shape: list[int], sizes: list[int], autoreset: str, seed: int
) -> None:
    kwargs: dict[str, Any] = {"shape": shape, "dtype": dtype}
    spec = EnvironmentSpec("walks:Grains", kwargs)
    if autoreset:
        kwargs["autoreset"] = autoreset
        spec = EnvironmentSpec("walks:grains", kwargs, vectorization_mode="vector_entry_point")
    setup = Setup(0, spec, tuple(sizes), tuple(range(seed, seed + sum(sizes))), 0)
    in_messages = asyncio.run(record(setup, None, 12))
    with opened() as slab:
        assert asyncio.run(record(setup, slab, 12)) == in_messages


def test_a_reset_in_flight_takes_the_place_of_a_step() -> None:
    async def run() -> None:
        setup = Setup(0, EnvironmentSpec("walks:Walk"), (2,), (1, 2), 0)
        with opened() as slab:
            async with hosted(setup, slab) as (group,):
                await group.reset()
                async with asyncio.TaskGroup() as tasks:
                    step = tasks.create_task(group.step(np.zeros(2, np.int64)))
                    await asyncio.sleep(0)
                    step.cancel()
                assert (await group.reset())[:, 2].tolist() == [0, 0]
                assert (await group.step(np.zeros(2, np.int64))).rewards.tolist() == [1, 1]

    asyncio.run(run())


# ------------------------------------------------------------------ what the trainer does not believe
class Peer:
    """A worker of one group of three, as the trainer knows it, and the worker's end of its slab in the test's hands."""

    def __init__(self, slab: Slab | None) -> None:
        self.breaches: list[MalformedMessage] = []
        setup = Setup(4, EnvironmentSpec("walks:Walk"), (3,), (1, 2, 3), 0)
        self.worker = RemoteWorker(
            0, setup, token=TOKEN, send=lambda frames: True, breach=self.breaches.append, slab=slab
        )
        self.worker.receive(encode(Hello(4, PROTOCOL_VERSION, 0, TOKEN)))
        self.worker.receive(encode(Ready(4, INFO, 1)))
        (self.group,) = self.worker.groups
        if slab is not None:
            (self.exchange,) = attach(slab.descriptor, ROW, (3,))

    def answer(self, sequence: int, **fields: Any) -> None:
        """Sends an ``Observed``; the rows are the test's business."""
        message = Observed(4, 0, sequence, b"\0\1\0", np.zeros(3, np.float32), None)
        self.worker.receive(encode(replace(message, **fields)))

    def write(self, sequence: int, value: float) -> None:
        self.exchange.begin(sequence)[:] = value
        self.exchange.finish(sequence, np.full((1, *ROW.shape), -value))


@pytest.mark.anyio
async def test_rows_lie_still_until_the_next_step() -> None:
    with opened() as slab:
        peer = Peer(slab)
        async with asyncio.TaskGroup() as tasks:
            reset = tasks.create_task(peer.group.reset())
            await asyncio.sleep(0)
            peer.write(1, 5.0)
            peer.answer(1)
            observations = await reset
            assert (observations == 5.0).all()
            step = tasks.create_task(peer.group.step(np.zeros(3, np.int64)))
            await asyncio.sleep(0)
            peer.write(2, 6.0)
            peer.answer(2)
            tick = await step
            assert (tick.observations == 6.0).all()
            assert shown(tick.final_observations) == shown(np.full((1, 5, 2), -6.0, np.float32))
        assert peer.breaches == []


@pytest.mark.anyio
@pytest.mark.parametrize("call", ["reset", "step"])
async def test_a_worker_that_writes_after_its_answer_is_found(call: str) -> None:
    with opened() as slab:
        peer = Peer(slab)
        async with asyncio.TaskGroup() as tasks:
            reset = tasks.create_task(peer.group.reset())
            await asyncio.sleep(0)
            peer.write(1, 5.0)
            peer.answer(1)
            await reset
        peer.exchange.begin(2)
        with pytest.raises(GroupLost, match="out of turn"):
            await (peer.group.reset() if call == "reset" else peer.group.step(np.zeros(3, np.int64)))
        assert len(peer.breaches) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("shares", [True, False])
async def test_rows_come_one_way_only(shares: bool) -> None:
    with opened() as slab:
        peer = Peer(slab if shares else None)
        async with asyncio.TaskGroup() as tasks:
            reset = tasks.create_task(peer.group.reset())
            await asyncio.sleep(0)
            rows = np.zeros((4, *ROW.shape), np.float32) if shares else None
            with pytest.raises(MalformedMessage, match="lie"):
                peer.answer(1, observations=rows)
            reset.cancel()


@given(
    stamps=st.lists(st.sampled_from([0, 1, 2, 2**64 - 1]) | st.integers(0, 2**64 - 1), min_size=2, max_size=2),
    sequence=st.integers(0, 2),
    outcomes=st.binary(max_size=4) | st.sampled_from([b"\0\0\0", b"\1\2\1"]),
)
def test_stamps_and_messages_of_any_kind_do_no_harm(stamps: list[int], sequence: int, outcomes: bytes) -> None:
    async def run() -> None:
        with opened() as slab:
            peer = Peer(slab)
            async with asyncio.TaskGroup() as tasks:
                reset = tasks.create_task(peer.group.reset())
                await asyncio.sleep(0)
                peer.exchange._stamps[:] = stamps
                with suppress(MalformedMessage):
                    peer.answer(sequence, outcomes=outcomes, rewards=np.zeros(len(outcomes), np.float32))
                await asyncio.sleep(0)
                fits = stamps == [1, 1] and sequence == 1 and len(outcomes) == 3 and max(outcomes) <= 2
                assert reset.done() == fits
                reset.cancel()

    asyncio.run(run())
