"""Random interleavings of everything that can happen to a batcher, against a model of its rules."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import uvloop
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from aiorl.errors import BatcherError, MalformedRows
from aiorl.sampling.batcher import MicroBatcher

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from numpy.typing import NDArray

    from aiorl.sampling.batcher import Producer

NUM_PRODUCERS = 3


class PoisonedError(Exception):
    """What the inference raises where a row of its batch is poisoned."""


@dataclass(eq=False)
class Client:
    """One submit: what it sent, and what came of it."""

    number: int
    rows: NDArray[np.int64]  # [n, 3]: number of the client, number of the row, whether it is poisoned
    producer: int | None
    submitted: bool = False
    answer: NDArray[np.int64] | None = None
    error: BaseException | None = None
    expected_error: BaseException | None = None
    cancelled: bool = False
    num_computed: int = 0
    task: asyncio.Task[None] | None = None

    @property
    def num_queued(self) -> int:
        """Rows that are in the queue by the rules, whatever the batcher says."""
        gone = not self.submitted or self.cancelled or self.expected_error is not None
        return 0 if gone else len(self.rows) - self.num_computed


@dataclass
class Model:
    """Who is outstanding, what was asked for, and every batch as the inference saw it."""

    max_batch_size: int | None
    min_batch_size: int
    max_wait_time: float | None
    clients: list[Client] = field(default_factory=list)
    joined: set[int] = field(default_factory=set)
    outstanding: set[int] = field(default_factory=set)
    computing: bool = False
    last: tuple[int, int] = (-1, -1)  # the last row computed: client, row
    num_rows: int = 0
    num_batches: int = 0
    num_malformed: int = 0

    @property
    def num_queued(self) -> int:
        return sum(client.num_queued for client in self.clients)

    @property
    def has_rule(self) -> bool:
        return self.max_batch_size is not None or self.max_wait_time is not None or bool(self.joined)

    def must_flush(self) -> bool:
        """Whether, after enough turns of the loop, rows that are still queued are rows forgotten."""
        queued = self.num_queued
        if not queued or self.computing:
            return False
        full = self.max_batch_size is not None and queued >= self.max_batch_size
        expired = self.max_wait_time is not None and queued >= self.min_batch_size
        nothing_more = not self.outstanding and (bool(self.joined) or not self.has_rule)
        begun = any(client.num_computed and client.num_queued for client in self.clients)
        return full or expired or nothing_more or begun

    def began(self, batch: NDArray[np.int64]) -> list[Client]:
        """Checks a batch against the limits, and moves its rows out of the queue."""
        assert not self.computing, "two batches at a time"
        self.num_batches += 1
        self.num_rows += len(batch)
        if self.max_batch_size is not None:
            assert len(batch) <= self.max_batch_size
        members = [self.clients[number] for number in dict.fromkeys(batch[:, 0].tolist())]
        for client in members:
            left = client.num_queued
            taken = int((batch[:, 0] == client.number).sum())
            assert 0 < taken <= left, "rows of a request that is not queued"
            if taken < left:
                assert len(members) == 1, "a split request shares its batch"
                assert taken == self.max_batch_size, "a request was split that would have fitted"
            client.num_computed += taken
        order = [self.last, *((client, row) for client, row, _ in batch.tolist())]
        assert order == sorted(set(order)), "rows out of order, or computed twice"
        self.last = order[-1]
        return members

    def ended(self, members: list[Client], error: BaseException | None) -> None:
        for client in members:
            if client.cancelled:
                continue
            if error is not None:
                client.expected_error = error
            elif client.num_computed == len(client.rows) and client.producer in self.joined:
                self.outstanding.add(client.producer)


class BatcherMachine(RuleBasedStateMachine):
    """Drives one batcher; each rule acts, and then gives the loop a few turns."""

    loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop

    @initialize(
        asynchronous=st.booleans(),
        max_batch_size=st.one_of(st.none(), st.integers(1, 6)),
        min_batch_size=st.integers(1, 4),
        max_wait_time=st.sampled_from([None, 0.0]),
    )
    def open(
        self, asynchronous: bool, max_batch_size: int | None, min_batch_size: int, max_wait_time: float | None
    ) -> None:
        min_batch_size = min(min_batch_size, max_batch_size or min_batch_size)
        self.loop = type(self).loop_factory()
        self.model = Model(max_batch_size, min_batch_size, max_wait_time)
        self.gate = asyncio.Event()
        self.done = asyncio.Event()
        self.held = True
        self.batcher = MicroBatcher(
            self.infer_later if asynchronous else self.infer,
            max_batch_size=max_batch_size,
            min_batch_size=min_batch_size,
            max_wait_time=max_wait_time,
        )
        self.producers: list[Producer] = [self.batcher.producer() for _ in range(NUM_PRODUCERS)]
        self.host = asyncio.Task(self.keep_open(), loop=self.loop)
        self.turns(2)

    # ------------------------------------------------------------ the system

    async def keep_open(self) -> None:
        async with self.batcher:
            await self.done.wait()

    def infer(self, batch: NDArray[np.int64]) -> NDArray[np.int64]:
        members = self.model.began(batch)
        return self.finish(batch, members)

    def infer_later(self, batch: NDArray[np.int64]) -> Coroutine[Any, Any, NDArray[np.int64]]:
        members = self.model.began(batch)
        self.model.computing = True
        return self.hold(batch, members)

    async def hold(self, batch: NDArray[np.int64], members: list[Client]) -> NDArray[np.int64]:
        while self.held and not self.gate.is_set():
            await self.gate.wait()
        self.gate.clear()
        self.model.computing = False
        return self.finish(batch, members)

    def finish(self, batch: NDArray[np.int64], members: list[Client]) -> NDArray[np.int64]:
        if batch[:, 2].any():
            error = PoisonedError(self.model.num_batches)
            self.model.ended(members, error)
            raise error
        self.model.ended(members, None)
        return batch[:, :2].copy()

    async def run_client(self, client: Client) -> None:
        submit = self.batcher.submit if client.producer is None else self.producers[client.producer].submit
        client.submitted = True
        self.model.outstanding.discard(-1 if client.producer is None else client.producer)
        try:
            client.answer = await submit(client.rows)
        except (PoisonedError, BatcherError) as error:
            client.error = error

    async def take_turns(self, number: int) -> None:
        for _ in range(number):
            await asyncio.sleep(0)

    def turns(self, number: int) -> None:
        self.loop.run_until_complete(self.take_turns(number))

    def call(self, function: Callable[[], object]) -> None:
        """Calls it from within the loop, as everything that touches a batcher is."""

        async def calling() -> None:
            function()

        coroutine: Coroutine[Any, Any, None] = calling()
        self.loop.run_until_complete(coroutine)

    def pending(self) -> list[Client]:
        return [client for client in self.model.clients if client.task is not None and not client.task.done()]

    # ------------------------------------------------------------ the rules

    @rule(
        sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
        producers=st.lists(st.one_of(st.none(), st.integers(0, NUM_PRODUCERS - 1)), min_size=3, max_size=3),
        poisoned=st.sampled_from([False, False, False, True]),
        turns=st.integers(0, 3),
    )
    def submit(self, sizes: list[int], producers: list[int | None], poisoned: bool, turns: int) -> None:
        busy = {client.producer for client in self.pending()}
        for size, producer in zip(sizes, producers, strict=False):
            if producer in busy or producer not in self.model.joined:
                producer = None
            if producer is None and not self.model.has_rule:
                continue
            busy.add(producer)
            busy.discard(None)
            number = len(self.model.clients)
            rows = np.array([[number, row, 0] for row in range(size)])
            rows[-1, 2] = poisoned
            client = Client(number, rows, producer)
            self.model.clients.append(client)
            client.task = asyncio.Task(self.run_client(client), loop=self.loop)
        self.turns(1)  # each begins, in order, before anybody leaves
        self.turns(turns)

    @rule(producer=st.integers(0, NUM_PRODUCERS - 1), turns=st.integers(0, 2))
    def malformed(self, producer: int, turns: int) -> None:
        if producer not in self.model.joined or any(client.producer == producer for client in self.pending()):
            return
        self.model.outstanding.discard(producer)
        self.model.num_malformed += 1

        async def submit() -> None:
            try:
                await self.producers[producer].submit(np.zeros((0, 3), np.int64))
            except MalformedRows:
                return
            raise AssertionError("no rows were accepted")

        self.loop.run_until_complete(submit())
        self.turns(turns)

    @precondition(lambda self: self.pending())
    @rule(which=st.integers(0, 100), turns=st.integers(0, 2))
    def cancel(self, which: int, turns: int) -> None:
        pending = self.pending()
        client = pending[which % len(pending)]
        assert client.task is not None
        if client.expected_error is None:  # else the exception may win, if it is there already
            client.cancelled = True
        client.task.cancel()
        if client.producer is not None:
            self.model.outstanding.discard(client.producer)
        self.turns(1 + turns)

    @rule(turns=st.integers(1, 4))
    def release(self, turns: int) -> None:
        if self.model.computing:
            self.gate.set()
        self.turns(turns)

    @rule(producer=st.integers(0, NUM_PRODUCERS - 1))
    def join(self, producer: int) -> None:
        def joining() -> None:
            self.model.joined.add(producer)
            self.producers[producer].__enter__()

        self.call(joining)

    @rule(producer=st.integers(0, NUM_PRODUCERS - 1))
    def leave(self, producer: int) -> None:
        def leaving() -> None:
            self.model.joined.discard(producer)
            self.model.outstanding.discard(producer)
            self.producers[producer].__exit__(None, None, None)

        self.call(leaving)

    @rule(producer=st.integers(0, NUM_PRODUCERS - 1))
    def park(self, producer: int) -> None:
        def parking() -> None:
            self.model.outstanding.discard(producer)
            self.producers[producer].park()

        self.call(parking)

    @rule(producer=st.integers(0, NUM_PRODUCERS - 1))
    def expect(self, producer: int) -> None:
        def expecting() -> None:
            if producer in self.model.joined and not any(client.producer == producer for client in self.pending()):
                self.model.outstanding.add(producer)
                self.producers[producer].expect()

        self.call(expecting)

    @rule()
    def flush(self) -> None:
        self.call(self.batcher.flush)
        self.turns(20)
        assert self.model.computing or not self.model.num_queued

    @rule(max_batch_size=st.one_of(st.none(), st.integers(1, 6)))
    def change_maximum(self, max_batch_size: int | None) -> None:
        def changing() -> None:
            self.model.max_batch_size = max_batch_size
            self.batcher.set_max_batch_size(max_batch_size)

        self.call(changing)

    @rule()
    def settle(self) -> None:
        """Whenever nothing is on its way any more, no row is queued that a rule would flush."""
        self.turns(30)
        assert not self.model.must_flush()
        assert self.batcher.statistics().num_queued_rows == self.model.num_queued
        assert self.batcher.idle is (not self.pending() and not self.model.computing)

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        try:
            self.settle()
        finally:
            self.held = False
            self.gate.set()
            self.done.set()
            self.loop.run_until_complete(self.host)
            self.turns(3)
            self.loop.close()
        assert not self.pending()
        self.check()

    def check(self) -> None:
        """Every request got its own rows, its own batch's exception, or was cancelled; and all of them were counted."""
        model = self.model
        num_cancelled = num_failed = 0
        for client in model.clients:
            assert client.task is not None
            if client.task.cancelled():
                num_cancelled += client.expected_error is None
                num_failed += client.expected_error is not None
            elif client.expected_error is not None:
                assert client.error is client.expected_error
                num_failed += 1
            else:
                assert client.task.exception() is None
                assert client.answer is not None
                assert client.answer.tolist() == client.rows[:, :2].tolist()
        statistics = self.batcher.statistics()
        assert (statistics.num_requests, statistics.num_malformed) == (len(model.clients), model.num_malformed)
        assert (statistics.num_cancelled, statistics.num_failed) == (num_cancelled, num_failed)
        assert (statistics.num_rows, statistics.num_batches) == (model.num_rows, model.num_batches)
        assert (statistics.num_pending, statistics.num_queued_rows) == (0, 0)
        assert sum(statistics.flushes.values()) == statistics.batch_rows.count == model.num_batches


uvloop.new_event_loop().close()  # libuv opens a pipe with its first loop, and keeps it as long as the process


class UvloopBatcherMachine(BatcherMachine):
    loop_factory = uvloop.new_event_loop


_settings = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
BatcherMachine.TestCase.settings = _settings
UvloopBatcherMachine.TestCase.settings = _settings
TestOnAsyncio = BatcherMachine.TestCase
TestOnUvloop = UvloopBatcherMachine.TestCase
