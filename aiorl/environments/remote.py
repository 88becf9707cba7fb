"""A worker as the trainer knows it: its handshake, its groups, and what each of them is owed.

Sends through a function and is handed what arrives, so that it knows no sockets and no processes.

==========  ======================  ==========================================  =====================
state       a message that belongs  what it leads to                            what else may arrive
==========  ======================  ==========================================  =====================
STARTING    Hello                   Setup is sent; BUILDING                     nothing
BUILDING    Ready                   its slab is sized; READY                    Failed
READY       Observed                the group's waiter is answered              Failed
STOPPING    Hello                   Stop is sent                                anything, not looked at
==========  ======================  ==========================================  =====================

Messages of an earlier incarnation, and answers to what a later ``Reset`` has superseded, are dropped and counted. An
answer that nobody asked for, or a second one, breaks the protocol. Dimensions: K environments of a group.
"""

from __future__ import annotations

import asyncio
import enum
import hmac
from typing import TYPE_CHECKING, Any

import numpy as np

from aiorl.environments.wire import (
    PROTOCOL_VERSION,
    Failed,
    Hello,
    Observed,
    Ready,
    Reset,
    Setup,
    Step,
    Stop,
    decode,
    encode,
    tick_of,
)
from aiorl.errors import GroupLost, LinkClosed, MalformedMessage, ProtocolMismatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from aiorl.environments.make import Tick
    from aiorl.environments.slab import Exchange, Slab
    from aiorl.environments.spaces import EnvironmentInfo


class State(enum.Enum):
    """How far a worker is."""

    STARTING = enum.auto()
    BUILDING = enum.auto()
    READY = enum.auto()
    STOPPING = enum.auto()


class RemoteGroup:
    """A group in a worker; satisfies ``Group``, whose methods say what they do.

    Attributes:
        num_envs: K.
        first_env: Global index of the environment in row 0.
        name: For messages.
        exchange: Where its observations lie; None where they are in its messages.
    """

    def __init__(self, worker: RemoteWorker, index: int, num_envs: int, first_env: int) -> None:
        self.num_envs = num_envs
        self.first_env = first_env
        self.name = f"worker {worker.number} group {index}"
        self.exchange: Exchange | None = None
        self._worker = worker
        self._index = index
        self._sequence = 0
        self._is_answered = True
        self._has_row = False
        self._waiter: asyncio.Future[Tick] | None = None
        self._loss: BaseException | None = None

    async def reset(self) -> NDArray[Any]:
        """Starts an episode in every environment."""
        if self._waiter is not None:
            raise RuntimeError(f"{self.name} is waited for already")
        sequence = self._next()
        tick = await self._ask(Reset(self._worker.incarnation, self._index, sequence))
        return tick.observations

    async def step(self, actions: NDArray[Any]) -> Tick:
        """Steps every environment once."""
        if not self._has_row:
            raise RuntimeError(f"{self.name} has no observations to act on: reset it first")
        if not self._is_answered:
            raise RuntimeError(f"{self.name} has not answered its last step")
        if actions.shape != (self.num_envs,) or actions.dtype != np.int64:
            raise ValueError(f"{self.name} takes int64 [{self.num_envs}] actions, not {actions.dtype} {actions.shape}")
        sequence = self._next()
        return await self._ask(Step(self._worker.incarnation, self._index, sequence, actions))

    def _next(self) -> int:
        """The next sequence number. Whoever asks for it has copied the last rows, which were to lie still until now."""
        if self.exchange is not None and self._is_answered and self._loss is None:
            try:
                self.exchange.check(self._sequence)
            except MalformedMessage as error:
                self._worker.fail(error)
        self._has_row = False
        self._sequence += 1
        return self._sequence

    async def _ask(self, message: Reset | Step) -> Tick:
        if self._loss is not None:
            raise self._lost() from self._loss
        self._is_answered = False
        waiter: asyncio.Future[Tick] = asyncio.get_running_loop().create_future()
        self._waiter = waiter
        self._worker.send(message)
        try:
            tick = await waiter
        except GroupLost:
            raise self._lost() from self._loss
        finally:
            self._waiter = None
            if waiter.done() and not waiter.cancelled():
                waiter.exception()  # looked at, also where a cancellation came first
        self._has_row = True
        return tick

    def answer(self, message: Observed) -> bool:
        """Gives an answer to whoever waits for it; False where it was superseded, or nobody waits any more.

        Raises:
            MalformedMessage: It was not asked for, or is not what the group's environments look like.
        """
        if message.sequence < self._sequence:
            return False
        if message.sequence > self._sequence or self._is_answered:
            raise MalformedMessage(f"{self.name} sent an answer {message.sequence} that it does not owe")
        if len(message.outcomes) != self.num_envs:
            raise MalformedMessage(f"{self.name} sent {len(message.outcomes)} rows instead of {self.num_envs}")
        tick = self._unpack(message) if self.exchange is None else self._read(message, self.exchange)
        self._is_answered = True
        if self._waiter is None or self._waiter.done():
            return False
        self._waiter.set_result(tick)
        return True

    def _read(self, message: Observed, exchange: Exchange) -> Tick:
        """A tick whose observations lie in the slab."""
        if message.observations is not None:
            raise MalformedMessage(f"{self.name} sent observations, which were to lie in its slab")
        exchange.check(message.sequence)
        return tick_of(message, exchange.observations, exchange.final_observations[: message.num_ended])

    def _unpack(self, message: Observed) -> Tick:
        """A tick whose observations are in the message: as a writable copy, since torch warns of others."""
        info, rows = self._worker.info, message.observations
        if rows is None:
            raise MalformedMessage(f"{self.name} sent no observations, and has no slab where they could lie")
        if info is None or rows.shape[1:] != info.observation.shape or rows.dtype != info.observation.dtype:
            raise MalformedMessage(f"{self.name} sent observations {rows.dtype.name} {rows.shape} instead of {info}")
        return tick_of(message, rows[: self.num_envs].copy(), rows[self.num_envs :])

    def lose(self, loss: BaseException) -> None:
        """The worker is gone, for this reason: whoever waits, and whoever asks from now on, gets ``GroupLost``."""
        if self._loss is None:
            self._loss = loss
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_exception(self._lost())

    def _lost(self) -> GroupLost:
        cause = str(self._loss).partition("\n")[0]
        return GroupLost(f"{self.name} is lost: {cause}", worker=self._worker.number)


class RemoteWorker:
    """One incarnation of a worker.

    Args:
        number: Of the worker.
        setup: What it is to build.
        token: What it has to show.
        send: Sends frames to it; False where they cannot be delivered.
        breach: Told that the worker broke the protocol, where no message shows it.
        slab: Shared with its process, and nobody else's to release; None where its observations come in messages.

    Attributes:
        groups: Its groups.
        info: What its environments look like; None until it is ready.
        state: How far it is.
        num_dropped: Messages that came too late to be of use.
    """

    def __init__(
        self,
        number: int,
        setup: Setup,
        *,
        token: bytes,
        send: Callable[[list[bytes]], bool],
        breach: Callable[[MalformedMessage], None],
        slab: Slab | None = None,
    ) -> None:
        self.number = number
        self.incarnation = setup.incarnation
        self.info: EnvironmentInfo | None = None
        self.state = State.STARTING
        self.num_dropped = 0
        self._setup = setup
        self._token = token
        self._send = send
        self._breach = breach
        self._slab = slab
        self.groups: list[RemoteGroup] = []
        first_env = setup.first_env
        for index, num_envs in enumerate(setup.group_sizes):
            self.groups.append(RemoteGroup(self, index, num_envs, first_env))
            first_env += num_envs

    def send(self, message: Setup | Reset | Step | Stop) -> None:
        """Sends a message. One that cannot be delivered goes to a worker that has ended, which its supervisor sees."""
        self._send(encode(message))

    def receive(self, frames: list[bytes]) -> Failed | None:
        """Takes what the worker sent.

        Returns:
            The worker's failure, where that is what it sent.

        Raises:
            ProtocolMismatch: The worker speaks another version.
            MalformedMessage: It sent something that it should not have.
        """
        message = decode(frames)
        if message.incarnation != self.incarnation:
            self.num_dropped += 1
            return None
        if isinstance(message, Observed) and self.state is State.READY:
            if message.group >= len(self.groups):
                raise MalformedMessage(f"worker {self.number} has no group {message.group}")
            if not self.groups[message.group].answer(message):
                self.num_dropped += 1
        elif isinstance(message, Hello) and self.state in (State.STARTING, State.STOPPING):
            self._greet(message)
        elif isinstance(message, Failed) and self.state in (State.BUILDING, State.READY):
            return message
        elif isinstance(message, Ready) and self.state is State.BUILDING:
            self._become_ready(message.info)
        elif self.state is not State.STOPPING:
            raise MalformedMessage(f"worker {self.number} sent {type(message).__name__} while {self.state.name}")
        return None

    def _become_ready(self, info: EnvironmentInfo) -> None:
        self.info = info
        self.state = State.READY
        if self._slab is not None:
            exchanges = self._slab.share(info.observation, self._setup.group_sizes)
            for group, exchange in zip(self.groups, exchanges, strict=False):  # all of them, or none
                group.exchange = exchange

    def _greet(self, message: Hello) -> None:
        if message.protocol != PROTOCOL_VERSION:
            raise ProtocolMismatch(
                f"worker {self.number} speaks version {message.protocol} of the protocol, the trainer {PROTOCOL_VERSION}: "
                "the two have different versions of aiorl"
            )
        if message.worker != self.number or not hmac.compare_digest(message.token, self._token):
            raise ProtocolMismatch(f"what connected as worker {self.number} does not have that worker's token")
        if self.state is State.STOPPING:
            self.send(Stop(self.incarnation))
        else:
            self.state = State.BUILDING
            self.send(self._setup)

    def stop(self) -> None:
        """Asks it to close its environments and end; nobody is answered from now on."""
        if self.state is not State.STOPPING:
            self.state = State.STOPPING
            self.send(Stop(self.incarnation))
        self.lose(LinkClosed("the workers are being closed"))

    def fail(self, error: MalformedMessage) -> None:
        """It broke the protocol where no message shows it: its groups are lost, and its supervisor is told."""
        self.lose(error)
        self._breach(error)

    def lose(self, loss: BaseException) -> None:
        """It is gone, for this reason."""
        for group in self.groups:
            group.lose(loss)
