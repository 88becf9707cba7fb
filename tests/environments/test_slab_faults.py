"""Shared memory with real processes: killed, stopped and continued at either end, and written out of turn."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

from aiorl.environments.config import EnvironmentConfig, LinkConfig
from aiorl.environments.link import LinkServer
from aiorl.environments.process import WorkerProcess
from aiorl.environments.remote import RemoteGroup
from aiorl.environments.slab import attach
from aiorl.environments.spaces import EnvironmentSpec
from aiorl.environments.supervisor import Workers, open_workers
from aiorl.errors import GroupLost, MalformedMessage, WorkerDied

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiorl.environments.make import Group

pytestmark = pytest.mark.anyio

IMAGES = EnvironmentSpec("walks:Grains", {"shape": [84, 84, 4], "dtype": "uint8"})
TRAINER = """
import asyncio, sys
sys.path.insert(0, {folder!r})
import numpy as np
from aiorl.environments.config import EnvironmentConfig, LinkConfig
from aiorl.environments.spaces import EnvironmentSpec
from aiorl.environments.supervisor import open_workers

async def play(group):
    await group.reset()
    print("stepping", flush=True)
    while True:
        await group.step(np.zeros(group.num_envs, np.int64))

async def main():
    spec = EnvironmentSpec("walks:Grains", {{"shape": [84, 84, 4], "dtype": "uint8"}})
    config = EnvironmentConfig(num_env_workers=2, envs_per_worker=4)
    async with open_workers(spec, config, LinkConfig(), env_seed=1, incarnation=0, force_sync=False) as workers:
        assert all(group.exchange is not None for group in workers.groups)
        async with asyncio.TaskGroup() as tasks:
            for group in workers.groups:
                tasks.create_task(play(group))

asyncio.run(main())
"""


@asynccontextmanager
async def workers_of(*, incarnation: int = 0, **more: Any) -> AsyncIterator[Workers]:
    """Four environments of images in two groups."""
    config = EnvironmentConfig(num_env_workers=1, envs_per_worker=4, env_cleanup_time=10.0, **more)
    async with open_workers(
        IMAGES, config, LinkConfig(), env_seed=5, incarnation=incarnation, force_sync=False
    ) as workers:
        yield workers


def share(workers: Workers) -> list[bool]:
    """Whether each group's rows lie in shared memory."""
    return [isinstance(group, RemoteGroup) and group.exchange is not None for group in workers.groups]


async def play(group: Group, num_ticks: int) -> list[Any]:
    """What a group brings, to the bit."""
    found: list[Any] = [(await group.reset()).tobytes()]
    for _ in range(num_ticks):
        tick = await group.step(np.zeros(group.num_envs, np.int64))
        found.append((tick.observations.tobytes(), tick.final_observations.tobytes(), tick.terminated.tolist()))
    return found


async def play_all(workers: Workers, num_ticks: int = 20) -> list[Any]:
    async with asyncio.TaskGroup() as tasks:
        played = [tasks.create_task(play(group, num_ticks)) for group in workers.groups]
    return [task.result() for task in played]


async def play_on(group: Group) -> None:
    """Steps a group until it is lost or the test is over."""
    with suppress(GroupLost):
        await group.reset()
        while True:
            await group.step(np.zeros(group.num_envs, np.int64))


def worker_processes() -> set[psutil.Process]:
    return {child for child in psutil.Process().children() if "--slab" in child.cmdline()}


def slab_of(process: psutil.Process) -> Path:
    """Where a worker's memory can be opened."""
    command = process.cmdline()
    return Path(f"/proc/{process.pid}/fd", command[command.index("--slab") + 1])


def left() -> tuple[int, list[str]]:
    """Descriptors of this process, and what has a name in shared memory."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir())), sorted(path.name for path in Path("/dev/shm").iterdir())


async def test_the_same_rows_come_in_messages_and_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers_of() as workers:
        assert share(workers) == [True, True]
        shared = await play_all(workers)
    async with workers_of(env_worker_mode="thread") as workers:
        assert share(workers) == [False, False]
        assert await play_all(workers) == shared
    monkeypatch.delattr(os, "memfd_create")
    async with workers_of() as workers:
        assert share(workers) == [False, False]
        assert await play_all(workers) == shared


async def test_opening_and_closing_leaves_nothing() -> None:
    async with workers_of() as workers:
        await play_all(workers, 3)
    before = left()
    for _ in range(4):
        async with workers_of() as workers:
            observations = await workers.groups[0].reset()
        assert observations.any()  # a view outlives the slab
        del observations, workers
        assert left() == before


@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.2, 0.3, 0.5, 0.8])
async def test_a_worker_killed_at_any_moment_leaves_nothing(delay_s: float) -> None:
    before = left()

    async def run() -> None:
        async with workers_of() as workers, asyncio.TaskGroup() as tasks:
            tasks.create_task(workers.watch())
            for group in workers.groups:
                tasks.create_task(play_on(group))

    async def kill() -> None:
        await asyncio.sleep(delay_s)
        worker_processes().pop().kill()

    with pytest.RaisesGroup(pytest.RaisesExc(WorkerDied, match="SIGKILL"), flatten_subgroups=True):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(run())  # whose first turn starts the process
            tasks.create_task(kill())
    assert worker_processes() == set()
    assert left() == before


def children_of(process: subprocess.Popen[bytes]) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.parametrize("delay_s", [None, 0.0, 0.1, 0.3])
def test_a_trainer_killed_at_any_moment_leaves_nothing(delay_s: float | None, tmp_path: Path) -> None:
    named = left()[1]
    command = [sys.executable, "-c", TRAINER.format(folder=str(Path(__file__).parent))]
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # its socket's folder is all that stays behind
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], env=environment) as trainer:
        assert trainer.stdout is not None
        if delay_s is None:
            while len(children_of(trainer)) < 2:
                assert trainer.poll() is None
        else:
            assert trainer.stdout.readline() == b"stepping\n"
            with suppress(subprocess.TimeoutExpired):
                trainer.wait(delay_s)
        trainer.send_signal(signal.SIGSTOP)  # it starts no more of them
        workers = [psutil.Process(child) for child in children_of(trainer)]
        assert len(workers) == 2
        trainer.kill()
        assert psutil.wait_procs(workers, timeout=10)[1] == []
    assert left()[1] == named


async def test_a_worker_stopped_replaced_and_continued_writes_into_nobody_s_rows() -> None:
    async with workers_of(incarnation=1) as workers:
        expected = await play_all(workers, 100)
    async with workers_of(incarnation=0) as old:
        (stopped,) = worker_processes()
        group = old.groups[0]
        await group.reset()
        async with asyncio.TaskGroup() as tasks:
            stopped.suspend()
            step = tasks.create_task(group.step(np.zeros(group.num_envs, np.int64)))
            await asyncio.sleep(0)
            assert not step.done()
            async with workers_of(incarnation=1) as new:
                (other,) = worker_processes() - {stopped}
                assert slab_of(stopped).stat().st_ino != slab_of(other).stat().st_ino
                playing = tasks.create_task(play_all(new, 100))
                stopped.resume()
                await step
                writing = tasks.create_task(play_on(old.groups[1]))
                assert await playing == expected
                writing.cancel()


async def test_memory_is_released_only_after_its_process_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        link = stack.enter_context(closing(LinkServer("auto", lambda *_: None, asyncio.get_running_loop())))
        host = WorkerProcess(link, worker=0, incarnation=0, identity=b"w", token=b"t" * 16, on_end=lambda: None)
        stack.callback(host.close)
        assert host.slab is not None
        descriptor, release = host.slab.descriptor, host.slab.release
        ends: list[int | None] = []

        def note_and_release() -> None:
            ends.append(host._process.returncode)
            release()

        def give_up(timeout: float) -> int:
            raise subprocess.TimeoutExpired("worker", timeout)

        monkeypatch.setattr(host.slab, "release", note_and_release)
        os.kill(host._process.pid, signal.SIGSTOP)
        with monkeypatch.context() as patched:
            patched.setattr(host._process, "wait", give_up)
            assert not host.close()
        assert ends == []
        os.fstat(descriptor)
        assert host.close()
        assert ends == [-signal.SIGKILL]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


async def test_a_worker_that_writes_out_of_turn_is_the_cause() -> None:
    async with workers_of() as workers:
        (process,) = worker_processes()
        sizes = [group.num_envs for group in workers.groups]
        for group in workers.groups:
            await group.reset()
        with slab_of(process).open("r+b") as opened:
            first, _ = attach(opened.fileno(), workers.info.observation, sizes)
            first.begin(2)[:] = 0
            del first, _
        await workers.groups[1].step(np.zeros(2, np.int64))  # whose rows lie still
        with pytest.raises(GroupLost, match="worker 0 group 0 is lost: rows are stamped 2 and 1 instead of 1"):
            await workers.groups[0].step(np.zeros(2, np.int64))
        with pytest.raises(MalformedMessage, match="out of turn"):
            await workers.watch()
