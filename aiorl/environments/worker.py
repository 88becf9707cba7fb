"""A worker: builds groups of environments, and steps them as it is told, one message at a time.

consumes       ``Setup`` once, then ``Reset`` and ``Step`` of its groups
waits for      the trainer's next message, and for nothing else
unblocked by   the trainer; by the end of the trainer, which ends the process
ends when      ``Stop`` arrives

``serve`` runs in a process of its own (``python -m aiorl.environments.worker``) or in a thread of the trainer's. A
process ends with its trainer, however that ends: the kernel kills it (PDEATHSIG), and where there is no such kernel, or
while the process still starts, the *lifeline* does, a pipe whose other end closes with the trainer. Signals that a
terminal or a service manager sends to all processes at once are left to the trainer, which asks its workers to stop
after it has drained.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

import msgpack
import numpy as np
import zmq

from aiorl.environments.link import WorkerLink
from aiorl.environments.make import EnvironmentGroup, Tick
from aiorl.environments.slab import Exchange, attach
from aiorl.environments.wire import (
    PROTOCOL_VERSION,
    Failed,
    Hello,
    Message,
    Observed,
    Ready,
    Reset,
    Setup,
    Step,
    Stop,
    observed,
)
from aiorl.errors import MalformedMessage

if TYPE_CHECKING:
    from types import FrameType

    from numpy.typing import NDArray

EXIT_ORPHANED: Final = 3
"""Exit status of a worker whose trainer is gone."""

TERMINATE: Final = b"t"
"""Written on the lifeline by a trainer that has lost patience."""

_PR_SET_PDEATHSIG: Final = 1


class _Terminated(BaseException):
    """The trainer no longer waits for the environments."""


class _Groups:
    """The groups of one worker, the last sequence number of each, and where its observations are to lie."""

    def __init__(self, incarnation: int, slab: int | None) -> None:
        self.where = "constructor"
        self._incarnation = incarnation
        self._slab = slab
        self._groups: list[EnvironmentGroup] = []
        self._seeds: list[tuple[int, ...] | None] = []
        self._sequences: list[int] = []
        self._exchanges: list[Exchange] | None = None

    def build(self, setup: Setup) -> Ready:
        first = 0
        for num_envs in setup.group_sizes:
            self._groups.append(EnvironmentGroup(setup.spec, num_envs, setup.first_env + first))
            self._seeds.append(setup.seeds[first : first + num_envs])
            self._sequences.append(0)
            first += num_envs
        return Ready(self._incarnation, self._groups[0].info, os.getpid())

    def reset(self, message: Reset) -> Observed:
        group = self._next(message)
        exchange = self._exchange(message.group)
        self.where = "reset"
        out = None if exchange is None else exchange.begin(message.sequence)
        observations = group.reset(self._seeds[message.group], out)
        self._seeds[message.group] = None
        flags = np.zeros(len(observations), np.bool_)
        tick = Tick(observations, np.zeros(len(observations), np.float32), flags, flags, observations[:0])
        return self._answer(message, tick, exchange)

    def step(self, message: Step) -> Observed:
        group = self._next(message)
        exchange = self._exchange(message.group)
        actions: NDArray[np.int64] = message.actions
        self.where = "step"
        out = None if exchange is None else exchange.begin(message.sequence)
        return self._answer(message, group.step(actions, out), exchange)

    def _answer(self, message: Reset | Step, tick: Tick, exchange: Exchange | None) -> Observed:
        if exchange is not None:
            exchange.finish(message.sequence, tick.final_observations)
        return observed(self._incarnation, message.group, message.sequence, tick, in_slab=exchange is not None)

    def _exchange(self, group: int) -> Exchange | None:
        """Where a group's observations are to lie; before the first message of a group the trainer has decided that."""
        if self._exchanges is None:
            sizes = [each.num_envs for each in self._groups]
            observation = self._groups[0].info.observation
            self._exchanges = [] if self._slab is None else attach(self._slab, observation, sizes)
        return self._exchanges[group] if self._exchanges else None

    def _next(self, message: Reset | Step) -> EnvironmentGroup:
        """The group of a message that is the next one of that group."""
        if message.group >= len(self._groups) or message.sequence != self._sequences[message.group] + 1:
            raise MalformedMessage(f"group {message.group} has no message {message.sequence} to come")
        self._sequences[message.group] += 1
        return self._groups[message.group]

    def close(self) -> None:
        """Closes every group; what an environment raises in its close goes to standard error and no further."""
        for group in self._groups:
            try:
                group.close()
            except (Exception, SystemExit):  # noqa: BLE001 - user code, and the other groups have to be closed
                traceback.print_exc()


def serve(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: str,
    *,
    worker: int,
    incarnation: int,
    identity: bytes,
    token: bytes,
    slab: int | None = None,
) -> None:
    """Serves one worker's groups until the trainer says stop.

    Observations lie in the shared memory of descriptor ``slab``, where the trainer has given it a size.

    Whatever an environment raises is sent to the trainer as ``Failed``; the worker then only waits for ``Stop``, so
    that the message is not lost to the end of the process.
    """
    groups = _Groups(incarnation, slab)
    with WorkerLink(context, endpoint, identity) as link:
        try:
            link.send(Hello(incarnation, PROTOCOL_VERSION, worker, token))
            try:
                _serve_until_stop(link, groups, incarnation)
            except _Terminated:
                raise
            except BaseException as error:  # noqa: BLE001 - also SystemExit: the trainer is told whatever it is
                _fail(link, groups.where, error, incarnation)
        finally:
            groups.close()


def _serve_until_stop(link: WorkerLink, groups: _Groups, incarnation: int) -> None:
    while True:
        groups.where = "link"
        message: Message = link.receive()
        if message.incarnation != incarnation:
            continue
        if isinstance(message, Step):
            answer: Message = groups.step(message)
        elif isinstance(message, Reset):
            answer = groups.reset(message)
        elif isinstance(message, Setup):
            groups.where = "constructor"
            answer = groups.build(message)
        elif isinstance(message, Stop):
            return
        else:
            raise MalformedMessage(f"a trainer sends no {type(message).__name__}")
        link.send(answer)


def _fail(link: WorkerLink, where: str, error: BaseException, incarnation: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    cause = traceback.format_exception_only(error)[-1].strip()
    link.send(Failed(incarnation, where, cause, "".join(traceback.format_exception(error))))
    while not isinstance(link.receive(), Stop):
        pass


def end_with_parent(parent: int) -> None:
    """Has the kernel kill this process when the thread that started it ends; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be bound to
        os._exit(EXIT_ORPHANED)


def _hold(lifeline: BinaryIO) -> None:
    """Waits in a thread until the trainer loses patience or ends; ends this process, whatever its main thread does."""
    is_impatient = False

    def leave(signum: int, frame: FrameType | None) -> None:
        if is_impatient:
            raise _Terminated

    def hold() -> None:
        nonlocal is_impatient
        if lifeline.read(1) == TERMINATE:
            is_impatient = True
            # A signal also interrupts what the environment waits in; its own clean-up then still runs.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            lifeline.read(1)
        os._exit(EXIT_ORPHANED)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=hold, name="lifeline", daemon=True).start()


def read_boot(lifeline: BinaryIO) -> dict[str, Any]:
    """What the trainer wrote on the lifeline first: identity, token and import path, which argv would show to all."""
    size = int.from_bytes(lifeline.read(4), "big")
    boot = lifeline.read(size)
    if not size or len(boot) != size:
        os._exit(EXIT_ORPHANED)
    return cast("dict[str, Any]", msgpack.unpackb(boot))


def main() -> int:
    """The process: parses its arguments, binds its life to the trainer's, and serves."""
    parser = argparse.ArgumentParser(prog="python -m aiorl.environments.worker", allow_abbrev=False)
    parser.add_argument("--connect", required=True, help="the trainer's endpoint")
    parser.add_argument("--worker", type=int, required=True, help="this worker's number")
    parser.add_argument("--incarnation", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True, help="the trainer's process")
    parser.add_argument("--lifeline", type=int, required=True, help="descriptor of a pipe that closes with the trainer")
    parser.add_argument("--slab", type=int, default=-1, help="descriptor of memory shared with the trainer; -1: none")
    arguments = parser.parse_args()
    end_with_parent(arguments.parent)
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with open(arguments.lifeline, "rb", buffering=0) as lifeline:  # noqa: PTH123 - a descriptor, not a path
        boot = read_boot(lifeline)
        sys.path[:] = boot["path"]
        _hold(lifeline)
        with zmq.Context() as context:
            try:
                serve(
                    context,
                    arguments.connect,
                    worker=arguments.worker,
                    incarnation=arguments.incarnation,
                    identity=boot["identity"],
                    token=boot["token"],
                    slab=arguments.slab if arguments.slab >= 0 else None,
                )
            except _Terminated:
                return 128 + signal.SIGTERM
    return 0


if __name__ == "__main__":
    sys.exit(main())
