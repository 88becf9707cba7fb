"""The workers of a run: started, watched and closed; or no workers, where environments step in the trainer's process.

    open_workers ──► spawn all ──► Hello/Setup/Ready of each ──► Workers ──► Stop ──► lifeline ──► SIGKILL
                                   │                             │           │        │
                                   first failure ends it         watch       env_cleanup_time

==========================  ========================================  ================================================
what happens to a worker    how it is seen                            what ``watch`` raises
==========================  ========================================  ================================================
an environment raises       ``Failed`` on the link                    ``EnvironmentRaised``, with its traceback
its process ends            pidfd on the loop, in about 1 ms          ``WorkerDied``
it breaks the protocol      a message or slab without sense           ``MalformedMessage`` or ``ProtocolMismatch``
==========================  ========================================  ================================================

The first of these is the run's cause; the groups of that worker raise ``GroupLost`` from it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import psutil

from aiorl.environments.link import LinkServer
from aiorl.environments.local import open_local
from aiorl.environments.make import seed_of
from aiorl.environments.preflight import preflight
from aiorl.environments.process import WorkerProcess, WorkerThread
from aiorl.environments.remote import RemoteWorker, State
from aiorl.environments.wire import TOKEN_BYTES, Setup, encode
from aiorl.errors import (
    ConfigError,
    EnvironmentRaised,
    Fault,
    LinkError,
    MalformedMessage,
    ProtocolMismatch,
    WorkerDied,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from aiorl.environments.config import EnvironmentConfig, LinkConfig
    from aiorl.environments.make import Group
    from aiorl.environments.process import Host
    from aiorl.environments.spaces import EnvironmentInfo, EnvironmentSpec
    from aiorl.environments.wire import Failed
    from aiorl.errors import AiorlError

__all__ = ["Workers", "open_workers", "preflight"]

logger = logging.getLogger(__name__)

_TERMINATE_S: Final = 0.5
"""How long interrupted environments may clean up before they are killed."""

_KILL_S: Final = 2.0


class Workers(Protocol):
    """The environments of a run, wherever they are.

    Attributes:
        info: What each of them looks like.
        groups: All groups, in the order of their first environments.
        num_envs: Of all groups.
        num_workers: Processes or threads; in the trainer's own process, the parts that would be workers.
        on_loop: Whether a step is the loop's own work from beginning to end, so that nothing of it goes on beside the loop.
    """

    info: EnvironmentInfo
    groups: list[Group]
    num_envs: int
    num_workers: int
    on_loop: bool

    async def watch(self) -> None:
        """Waits until a worker fails, or it is cancelled.

        Raises:
            WorkerDied: A worker's process ended.
            EnvironmentRaised: An environment raised in a worker.
            LinkError: A worker broke the protocol.
        """

    def statistics(self) -> dict[str, float]:
        """Messages, live workers and their memory; empty in the trainer's own process."""

    def link_idle(self) -> bool:
        """Whether no message of a worker waits to be received."""

    def hurry(self) -> None:
        """Closing waits for no environment from now on, also where it is under way."""


@asynccontextmanager
async def open_workers(
    spec: EnvironmentSpec,
    config: EnvironmentConfig,
    link: LinkConfig,
    *,
    env_seed: int,
    incarnation: int,
    force_sync: bool,
) -> AsyncIterator[Workers]:
    """Starts a run's environments, and closes them at the end of the context, whatever happens in it.

    Closing asks the workers, and ends within ``env_cleanup_time`` and 2.5 s, also where an environment never comes back.
    A cancellation during closing ends what is left at once. Nothing remains: no process, no socket, no folder. Only a
    worker that is a thread, and does not come back, is left to itself with a warning.

    Args:
        spec: Of every environment.
        config: How many, and where.
        link: How the trainer talks to workers.
        env_seed: From which every environment's own seed is derived.
        incarnation: Of all workers, above that of an earlier run that this one continues.
        force_sync: Whether to step everything in this process, with the same environments and seeds.

    Raises:
        ConfigError: The endpoint is in use, or the environment's keyword arguments cannot be sent to a worker.
        WorkerDied, EnvironmentRaised, LinkError: A worker failed before all were ready.
    """
    num_env_workers, envs_per_worker = config.numbers()
    is_local = force_sync or num_env_workers == 0
    sizes = [group_sizes(config, force_sync=force_sync)] * max(1, num_env_workers)
    if is_local:
        local = await open_local(
            spec, sizes, env_seed=env_seed, incarnation=incarnation, env_cleanup_time=config.env_cleanup_time
        )
        try:
            yield local
        finally:
            await local.aclose()
        return
    setups = []
    for number, of_worker in enumerate(sizes):
        envs = range(number * envs_per_worker, (number + 1) * envs_per_worker)
        seeds = tuple(seed_of(env_seed, env, incarnation) for env in envs)
        setups.append(Setup(incarnation, spec, of_worker, seeds, envs.start))
    _check_sendable(setups[0])
    remote = RemoteWorkers(config, link)
    try:
        remote.start(setups)
        await remote.until_ready()
        yield remote
    finally:
        await remote.aclose()


def group_sizes(config: EnvironmentConfig, *, force_sync: bool) -> tuple[int, ...]:
    """K of each group of a worker, or of its part in the trainer's process: nearly equal, the larger ones first."""
    num_env_workers, num_envs = config.numbers()
    by_rule = 1 if force_sync or num_env_workers == 0 else 2
    num_groups = min(num_envs, by_rule if config.groups_per_worker == "auto" else config.groups_per_worker)
    size, more = divmod(num_envs, num_groups)
    return tuple(size + (index < more) for index in range(num_groups))


def _check_sendable(setup: Setup) -> None:
    try:
        encode(setup)
    except MalformedMessage as error:
        remedy = "have the constructor make it itself, or step in the trainer's process with num_env_workers = 0"
        fault = Fault("task.environment.kwargs", f"cannot be sent to a worker: {error}", remedy=remedy)
        raise ConfigError([fault]) from error


class RemoteWorkers:
    """Workers that are processes, or threads that are spoken to in the same way; see ``Workers``."""

    info: EnvironmentInfo

    def __init__(self, config: EnvironmentConfig, link: LinkConfig) -> None:
        self.groups: list[Group] = []
        self.num_envs = 0
        self.num_workers = 0
        self.on_loop = False
        self._host_kind = WorkerThread if config.env_worker_mode == "thread" else WorkerProcess
        self._env_cleanup_time = config.env_cleanup_time
        endpoint = link.endpoint
        if endpoint == "auto" and config.env_worker_mode == "thread":
            endpoint = "inproc://aiorl"
        self._workers: dict[bytes, tuple[RemoteWorker, Host]] = {}
        self._num_strangers = 0
        self._failure: AiorlError | None = None
        self._failed = asyncio.Event()
        self._settled = asyncio.Event()
        self._is_closing = False
        self._link = LinkServer(endpoint, self._receive, asyncio.get_running_loop())

    def start(self, setups: Sequence[Setup]) -> None:
        """Starts every worker; their start-up overlaps."""
        for number, setup in enumerate(setups):
            identity = b"%d.%d." % (number, setup.incarnation) + secrets.token_hex(8).encode()
            token = secrets.token_bytes(TOKEN_BYTES)
            host = self._host_kind(
                self._link,
                worker=number,
                incarnation=setup.incarnation,
                identity=identity,
                token=token,
                on_end=partial(self._ended, identity),
            )
            worker = RemoteWorker(
                number,
                setup,
                token=token,
                send=partial(self._link.send, identity),
                breach=partial(self._breached, identity),
                slab=host.slab,
            )
            self._workers[identity] = worker, host
            self.groups += worker.groups
            self.num_envs += len(setup.seeds)
            self.num_workers += 1

    async def until_ready(self) -> None:
        """Waits until every worker has built its environments; raises the first failure."""
        await self._settled.wait()
        if self._failure is not None:
            raise self._failure

    def _receive(self, identity: bytes, frames: list[bytes]) -> None:
        """Takes one message from the link; whoever is not one of the workers is not listened to."""
        if identity not in self._workers:
            self._num_strangers += 1
            return
        worker, host = self._workers[identity]
        try:
            failed = worker.receive(frames)
        except LinkError as error:
            self._fail(worker, error)
            return
        if failed is not None:
            self._fail(worker, _failure_of(worker, host, failed))
        elif worker.state is State.READY and not self._settled.is_set():
            self._compare()

    def _compare(self) -> None:
        """Settles once all are ready; they have to agree on what their environments look like."""
        first: EnvironmentInfo | None = None
        for worker, _ in self._workers.values():
            if worker.info is None:
                return
            first = first or worker.info
            if worker.info != first:
                text = f"worker {worker.number} has other environments than worker 0: {worker.info}, not {first}"
                self._fail(worker, ProtocolMismatch(text))
                return
            self.info = first
        self._settled.set()

    def _ended(self, identity: bytes) -> None:
        if identity not in self._workers or self._is_closing:
            return
        worker, host = self._workers[identity]
        self._link.receive_now()  # it may have said why
        returncode, how = host.describe_end()
        tail = host.read_tail()
        self._fail(worker, WorkerDied(worker=worker.number, returncode=returncode, how=how, stderr_tail=tail))

    def _breached(self, identity: bytes, error: MalformedMessage) -> None:
        self._fail(self._workers[identity][0], error)

    def _fail(self, worker: RemoteWorker, error: AiorlError) -> None:
        if self._is_closing:
            return
        if self._failure is None:
            self._failure = error
            self._failed.set()
            self._settled.set()
        worker.lose(error)

    async def watch(self) -> None:
        """Raises the first failure as soon as there is one."""
        await self._failed.wait()
        if self._failure is not None:
            raise self._failure

    def statistics(self) -> dict[str, float]:
        """``link/*`` messages, ``workers/*`` live ones and their resident memory in bytes."""
        memory = []
        for _, host in self._workers.values():
            if host.pid is not None:
                with suppress(psutil.Error):
                    memory.append(psutil.Process(host.pid).memory_info().rss)
        return {
            "link/messages_received": self._link.num_received,
            "link/messages_sent": self._link.num_sent,
            "link/messages_dropped": self._num_strangers + sum(w.num_dropped for w, _ in self._workers.values()),
            "workers/live": sum(not host.ended.is_set() for _, host in self._workers.values()),
            "workers/rss_bytes_sum": sum(memory),
            "workers/rss_bytes_max": max(memory, default=0),
        }

    def link_idle(self) -> bool:
        """Whether no message waits to be received."""
        return self._link.is_idle

    def hurry(self) -> None:
        """Closing waits for nobody from now on, also where it is under way."""
        self._env_cleanup_time = 0.0
        if self._is_closing:
            for _, host in self._workers.values():
                host.kill()

    async def aclose(self) -> None:
        """Asks every worker to end, waits ``env_cleanup_time``, interrupts, kills; further calls do nothing."""
        if self._is_closing:
            return
        self._is_closing = True
        hosts = [host for _, host in self._workers.values()]
        try:
            for worker, host in self._workers.values():
                if worker.state is State.STARTING:
                    host.kill()  # it has built nothing yet
                worker.stop()
            await _wait_for(hosts, self._env_cleanup_time)
            for host in _alive(hosts):
                host.terminate()
            await _wait_for(hosts, _TERMINATE_S)
            for host in _alive(hosts):
                host.kill()
            await _wait_for([host for host in hosts if host.pid is not None], _KILL_S)
        finally:
            stuck = [host.thread for host in hosts if not host.close() and isinstance(host, WorkerThread)]
            self._link.close(release=not stuck)
            if stuck:
                # A context ends when the last of its sockets is closed, and these threads still have theirs.
                threading.Thread(target=_release, args=(self._link, stuck), name="aiorl release", daemon=True).start()


def _failure_of(worker: RemoteWorker, host: Host, failed: Failed) -> AiorlError:
    """What a worker's own report is to the trainer."""
    if failed.where == "link":
        return ProtocolMismatch(
            f"worker {worker.number} could not follow the trainer: {failed.cause}\n{failed.traceback}"
        )
    return EnvironmentRaised(
        worker=worker.number,
        where=failed.where,
        cause=failed.cause,
        traceback_text=failed.traceback,
        stderr_tail=host.read_tail(),
    )


def _alive(hosts: Sequence[Host]) -> list[Host]:
    return [host for host in hosts if not host.ended.is_set()]


async def _wait_for(hosts: Sequence[Host], patience_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(patience_s):
            for host in hosts:
                await host.ended.wait()


def _release(link: LinkServer, threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join()
    link.release()
