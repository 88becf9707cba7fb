"""Real workers: processes and threads, sockets and signals."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import tempfile
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

from aiorl.environments.config import EnvironmentConfig, LinkConfig
from aiorl.environments.make import load, seed_of
from aiorl.environments.spaces import EnvironmentSpec
from aiorl.environments.supervisor import Workers, open_workers
from aiorl.errors import ConfigError, EnvironmentRaised, GroupLost, ProtocolMismatch, WorkerDied

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aiorl.environments.make import Group

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def workers_of(
    identifier: str = "walks:Walk",
    kwargs: dict[str, Any] | None = None,
    *,
    endpoint: str = "auto",
    force_sync: bool = False,
    incarnation: int = 0,
    **config: Any,
) -> AsyncIterator[Workers]:
    spec = EnvironmentSpec(identifier, kwargs or {})
    settings = EnvironmentConfig(**({"num_env_workers": 2, "envs_per_worker": 3, "env_cleanup_time": 10.0} | config))
    async with open_workers(
        spec, settings, LinkConfig(endpoint=endpoint), env_seed=5, incarnation=incarnation, force_sync=force_sync
    ) as workers:
        yield workers


async def play(group: Group, num_steps: int) -> list[Any]:
    """Everything that each environment of a group shows, one list for each."""
    observations = await group.reset()
    found: list[Any] = [[(group.first_env + row, *observations[row])] for row in range(group.num_envs)]
    for _ in range(num_steps):
        tick = await group.step(observations[:, 1:].sum(1).astype(np.int64) % 2)
        finals = iter(tick.final_observations)
        for row in range(group.num_envs):
            final = tuple(next(finals)) if tick.terminated[row] or tick.truncated[row] else None
            flags = tick.rewards[row], tick.terminated[row], tick.truncated[row], final
            found[row].append((*tick.observations[row], *flags))
        observations = tick.observations
    return found


async def play_all(workers: Workers, num_steps: int = 30) -> list[Any]:
    async with asyncio.TaskGroup() as tasks:
        played = [tasks.create_task(play(group, num_steps)) for group in workers.groups]
    return [environment for task in played for environment in task.result()]


def expected(num_envs: int, num_steps: int = 30, *, incarnation: int = 0) -> list[Any]:
    """The same by a plain loop over single environments."""
    found = []
    for env in range(num_envs):
        walk = load("walks:Walk")()
        observation = tuple(walk.reset(seed=seed_of(5, env, incarnation))[0])
        rows: list[Any] = [(env, *observation)]
        for _ in range(num_steps):
            following, reward, terminated, truncated, _ = walk.step(int(sum(observation[1:])) % 2)
            final = tuple(following) if terminated or truncated else None
            observation = tuple(walk.reset()[0]) if final else tuple(following)
            rows.append((*observation, reward, terminated, truncated, final))
        found.append(rows)
    return found


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="processes"),
        pytest.param({"endpoint": "tcp://127.0.0.1:*", "groups_per_worker": 3}, id="tcp"),
        pytest.param({"env_worker_mode": "thread"}, id="threads"),
        pytest.param({"num_env_workers": 0, "envs_per_worker": 6}, id="in process"),
        pytest.param({"force_sync": True, "groups_per_worker": 2}, id="force_sync"),
    ],
)
async def test_environments_do_the_same_wherever_they_are(config: dict[str, Any]) -> None:
    async with workers_of(incarnation=3, **config) as workers:
        assert workers.num_envs == 6
        assert await play_all(workers) == expected(6, incarnation=3)
        assert workers.link_idle()


async def test_groups_are_numbered_and_split_evenly() -> None:
    async with workers_of(envs_per_worker=5) as workers:
        assert workers.num_workers == 2
        assert [(group.name, group.first_env, group.num_envs) for group in workers.groups] == [
            ("worker 0 group 0", 0, 3),
            ("worker 0 group 1", 3, 2),
            ("worker 1 group 0", 5, 3),
            ("worker 1 group 1", 8, 2),
        ]
        statistics = workers.statistics()
        assert statistics["workers/live"] == 2
        assert statistics["link/messages_received"] == 4  # Hello and Ready of each


async def test_a_reset_in_flight_does_not_shift_what_follows() -> None:
    async with workers_of(num_env_workers=1, envs_per_worker=1) as workers:
        (group,) = workers.groups
        await group.reset()
        async with asyncio.TaskGroup() as tasks:
            step = tasks.create_task(group.step(np.zeros(1, np.int64)))
            await asyncio.sleep(0)
            step.cancel()
        observations = await group.reset()
        assert observations[0, 2] == 0  # the new episode's first, not the step's answer
        for _ in range(20):
            tick = await group.step(np.zeros(1, np.int64))
            before = 0 if tick.rewards[0] == 1 else observations[0, 2]
            assert tick.rewards[0] == before + 1
            observations = tick.observations
        assert workers.statistics()["link/messages_dropped"] == 1


async def test_a_worker_is_small_and_knows_neither_torch_nor_pydantic() -> None:
    async with workers_of("walks:Mirror", num_env_workers=1) as workers:
        knows_torch, knows_pydantic, _, resident = (await workers.groups[0].reset())[0]
        assert (knows_torch, knows_pydantic) == (0, 0)
        assert resident < 80e6
    async with workers_of("CartPole-v1", num_env_workers=1, envs_per_worker=16) as workers:
        for group in workers.groups:
            await group.reset()
            await group.step(np.zeros(group.num_envs, np.int64))
        assert 0 < workers.statistics()["workers/rss_bytes_max"] < 80e6


async def lost(group: Group) -> BaseException | None:
    """What a group is lost of."""
    with pytest.raises(GroupLost) as caught:
        await play(group, 30)
    return caught.value.__cause__


@pytest.mark.parametrize(("mode", "where"), [("process", "step"), ("process", "reset"), ("thread", "step")])
async def test_an_environment_that_raises_is_the_cause(mode: str, where: str) -> None:
    async with workers_of(kwargs={"misbehave": "raise", "where": where}, env_worker_mode=mode) as workers:
        async with asyncio.TaskGroup() as tasks:
            losing = [tasks.create_task(lost(group)) for group in workers.groups]
            with pytest.raises(EnvironmentRaised, match="ValueError: the bridge is out") as caught:
                await workers.watch()
        assert caught.value.where == where
        assert "_act_up" in caught.value.traceback_text
        assert caught.value in [task.result() for task in losing]
        if mode == "process":
            assert "about to raise" in caught.value.stderr_tail
        with pytest.raises(EnvironmentRaised):
            await workers.watch()


@pytest.mark.parametrize("mode", ["process", "thread"])
async def test_a_constructor_that_raises_ends_the_start(mode: str) -> None:
    with pytest.raises(EnvironmentRaised, match="the bridge is out") as caught:
        async with workers_of(kwargs={"misbehave": "raise", "where": "constructor"}, env_worker_mode=mode):
            pytest.fail("it was not to start")
    assert caught.value.where == "constructor"


async def test_sys_exit_in_an_environment_is_reported_like_any_exception() -> None:
    async with workers_of(kwargs={"misbehave": "sys.exit"}, num_env_workers=1) as workers:
        assert isinstance(await lost(workers.groups[0]), EnvironmentRaised)
        with pytest.raises(EnvironmentRaised, match="SystemExit: 9"):
            await workers.watch()


@pytest.mark.parametrize(
    "config", [{}, {"env_worker_mode": "thread"}, {"num_env_workers": 0, "envs_per_worker": 6}, {"force_sync": True}]
)
async def test_an_environment_is_named_alike_wherever_it_is(config: dict[str, Any]) -> None:
    kwargs = {"shape": [3], "where": "step", "only_seed": seed_of(5, 4, 0)}
    told = r"environment 4 gave an observation of shape \(3,\), and its space has shape \(4,\)"
    with pytest.RaisesGroup(pytest.RaisesExc(EnvironmentRaised, match=told), allow_unwrapped=True):
        async with workers_of("walks:Odd", kwargs, **config) as workers, asyncio.TaskGroup() as tasks:
            tasks.create_task(workers.watch())
            for group in workers.groups:
                tasks.create_task(play_unless_lost(group))


async def play_unless_lost(group: Group) -> None:
    with suppress(GroupLost):
        await play(group, 30)


async def test_a_process_that_ends_is_the_cause() -> None:
    async with workers_of(kwargs={"misbehave": "exit"}) as workers:
        async with asyncio.TaskGroup() as tasks:
            for group in workers.groups:
                tasks.create_task(lost_or_stuck(group))
            with pytest.raises(WorkerDied, match="exit status 7") as caught:
                await workers.watch()
        assert caught.value.returncode == 7
        assert "about to exit" in caught.value.stderr_tail


async def lost_or_stuck(group: Group) -> None:
    with pytest.raises(GroupLost):
        await play(group, 30)


@pytest.mark.parametrize("pidfd", [True, False])
async def test_a_killed_worker_is_noticed_at_once(pidfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    async with workers_of() as workers:
        victim = worker_processes()[0]
        group = workers.groups[0]
        await group.reset()
        killed = time.monotonic()
        victim.kill()
        with pytest.raises(WorkerDied, match="SIGKILL"):
            await workers.watch()
        assert time.monotonic() - killed < 1.0  # typically 2 ms
        with pytest.raises(GroupLost, match="is lost: worker 0 died"):
            await group.step(np.zeros(group.num_envs, np.int64))
        assert len(await play(workers.groups[-1], 3)) == workers.groups[-1].num_envs  # the other worker lives
        assert workers.statistics()["workers/live"] == 1


def worker_processes() -> list[psutil.Process]:
    """This process's workers, in the order of their numbers."""
    children = psutil.Process().children()
    workers = [child for child in children if "aiorl.environments.worker" in child.cmdline()]
    return sorted(workers, key=lambda child: child.cmdline()[child.cmdline().index("--worker") + 1])


async def test_signals_to_all_processes_are_left_to_the_trainer() -> None:
    async with workers_of(num_env_workers=1) as workers:
        await workers.groups[0].reset()
        (process,) = worker_processes()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        await play_all(workers, 3)
        assert process.is_running()


async def get_stuck(group: Group) -> None:
    """Has a group begin a step that never ends, and gives up on it."""
    await group.reset()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await group.step(np.zeros(group.num_envs, np.int64))


@pytest.mark.parametrize("misbehave", ["sleep", "spin"])
async def test_closing_is_bounded_while_a_step_runs_for_ever(misbehave: str) -> None:
    kwargs = {"misbehave": misbehave, "at_step": 1}
    async with workers_of(kwargs=kwargs, env_cleanup_time=0.1) as workers:
        await get_stuck(workers.groups[0])
        asked = time.monotonic()
    assert time.monotonic() - asked < 2.0
    assert worker_processes() == []


async def test_a_cancelled_closing_ends_what_is_left_at_once() -> None:
    closing = asyncio.Event()

    async def run() -> None:
        async with workers_of(kwargs={"misbehave": "sleep", "at_step": 1}, env_cleanup_time=600.0) as workers:
            await get_stuck(workers.groups[0])
            closing.set()

    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(run())
        await closing.wait()
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()
    assert worker_processes() == []


async def test_a_thread_that_never_comes_back_is_left_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    released = load("walks:RELEASED")
    released.clear()
    kwargs = {"misbehave": "wait", "at_step": 1}
    with caplog.at_level(logging.WARNING):
        async with workers_of(kwargs=kwargs, env_cleanup_time=0.05, env_worker_mode="thread") as workers:
            await get_stuck(workers.groups[0])
    assert "is left to itself" in caplog.text
    released.set()  # what is left then ends by itself, which the fixtures see


async def test_what_environments_print_is_logged_and_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "aiorl"):
        async with workers_of(kwargs={"misbehave": "print", "at_step": 1}) as workers:
            assert await play_all(workers) == expected(6)
    assert "worker 1: " + "x" * 5000 in caplog.text


async def test_the_address_in_use_is_a_fault() -> None:
    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/link"
        async with workers_of(num_env_workers=1, endpoint=endpoint) as workers:
            with pytest.raises(ConfigError, match=r"link\.endpoint .* is in use already"):
                async with workers_of(endpoint=endpoint):
                    pytest.fail("it was not to start")
            await play_all(workers, 3)
        assert os.listdir(folder) == []  # noqa: PTH208 - quick


async def test_arguments_that_cannot_be_sent_are_a_fault() -> None:
    kwargs = {"only_seed": object()}
    with pytest.raises(ConfigError, match=r"task\.environment\.kwargs.*only_seed"):
        async with workers_of(kwargs=kwargs):
            pytest.fail("it was not to start")
    async with workers_of(kwargs=kwargs, num_env_workers=0) as workers:
        assert workers.num_envs == 3


async def test_awaitable_environments_are_refused_in_workers() -> None:
    with pytest.raises(EnvironmentRaised, match="num_env_workers = 0"):
        async with workers_of("walks:AwaitableWalk"):
            pytest.fail("it was not to start")


async def test_interpreter_flags_reach_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.warnoptions", [*(["default"] if sys.flags.dev_mode else []), "error"])
    async with workers_of("walks:Mirror", num_env_workers=1) as workers:
        assert (await workers.groups[0].reset())[0, 2] == 1


async def test_workers_that_differ_are_refused(tmp_path: Path) -> None:
    kwargs = {"folder": str(tmp_path)}
    with pytest.raises(ProtocolMismatch, match="other environments than worker 0"):
        async with workers_of("walks:Differing", kwargs, envs_per_worker=1, env_worker_mode="thread"):
            pytest.fail("it was not to start")


VECTORS = {
    "gymnasium": EnvironmentSpec("CartPole-v1", {"max_episode_steps": 15}, vectorization_mode="vector_entry_point"),
    "ale": EnvironmentSpec(
        "ALE/Pong-v5", {"max_num_frames_per_episode": 80}, (), ("ale_py",), vectorization_mode="vector_entry_point"
    ),
    "envpool": EnvironmentSpec("CartPole-v1", {"max_episode_steps": 15}, vectorization_mode="envpool"),
}


@pytest.mark.parametrize("back_end", VECTORS)
async def test_vector_environments_do_the_same_in_a_worker(back_end: str) -> None:
    if back_end != "gymnasium":
        pytest.importorskip({"ale": "ale_py", "envpool": "envpool"}[back_end], reason="an extra of aiorl installs it")
    found = []
    for num_env_workers, envs_per_worker in ((2, 4), (0, 8)):
        config = EnvironmentConfig(
            num_env_workers=num_env_workers,
            envs_per_worker=envs_per_worker,
            groups_per_worker=2 if num_env_workers else 4,
        )
        async with open_workers(
            VECTORS[back_end], config, LinkConfig(), env_seed=5, incarnation=0, force_sync=False
        ) as workers:
            assert [group.num_envs for group in workers.groups] == [2, 2, 2, 2]
            found.append([await shown(group, 40) for group in workers.groups])
    in_workers, in_process = found
    assert in_workers == in_process
    assert len({tuple(group) for group in in_workers}) == 4  # each group has a seed of its own


async def shown(group: Group, num_steps: int) -> list[bytes]:
    """Everything that a group shows, as bytes."""
    found = [(await group.reset()).tobytes()]
    for number in range(num_steps):
        tick = await group.step(np.full(group.num_envs, number % 2))
        parts = tick.observations, tick.rewards, tick.terminated, tick.truncated, tick.final_observations
        found += [np.ascontiguousarray(part).tobytes() for part in parts]
    return found
