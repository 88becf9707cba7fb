from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import numpy as np
import pytest

from aiorl.environments.local import LocalWorkers, open_local
from aiorl.environments.make import EnvironmentGroup, Group, seed_of
from aiorl.environments.spaces import EnvironmentSpec
from aiorl.errors import EnvironmentRaised

pytestmark = pytest.mark.anyio


async def opened(identifier: str = "walks:Walk", sizes: Any = ((2, 1), (3,)), **kwargs: Any) -> LocalWorkers:
    spec = EnvironmentSpec(identifier, kwargs)
    return await open_local(spec, sizes, env_seed=7, incarnation=2, env_cleanup_time=0.2)


async def play(group: Group, num_steps: int) -> list[list[float]]:
    rows: list[list[float]] = (await group.reset()).tolist()
    for _ in range(num_steps):
        tick = await group.step(np.ones(group.num_envs, np.int64))
        rows += tick.observations.tolist() + tick.final_observations.tolist() + [tick.rewards.tolist()]
        rows += [tick.terminated.tolist(), tick.truncated.tolist()]
    return rows


async def test_environments_are_numbered_and_seeded_in_order() -> None:
    workers = await opened()
    assert [(group.first_env, group.num_envs, group.name) for group in workers.groups] == [
        (0, 2, "local worker 0"),
        (2, 1, "local worker 0"),
        (3, 3, "local worker 1"),
    ]
    assert (workers.num_envs, workers.num_workers, workers.link_idle(), workers.statistics()) == (6, 2, True, {})
    seeds = [row[0] for group in workers.groups for row in (await group.reset()).tolist()]
    assert seeds == [seed_of(7, env, 2) for env in range(6)]
    await workers.aclose()


async def test_awaitable_environments_do_what_others_do() -> None:
    plain, awaitable = await opened(sizes=[(1,), (1,)]), await opened("walks:AwaitableWalk", [(2,)])
    assert [group.first_env for group in awaitable.groups] == [0, 1]
    assert awaitable.num_workers == 2
    assert awaitable.info.is_awaitable
    async with asyncio.TaskGroup() as tasks:
        found = [tasks.create_task(play(group, 40)) for group in awaitable.groups]
    assert [task.result() for task in found] == [await play(group, 40) for group in plain.groups]
    await awaitable.aclose()
    await plain.aclose()


@pytest.mark.parametrize("identifier", ["walks:Walk", "walks:AwaitableWalk"])
@pytest.mark.parametrize("where", ["constructor", "reset", "step"])
async def test_what_an_environment_raises_is_told(identifier: str, where: str) -> None:
    async def run() -> None:
        workers = await opened(identifier, misbehave="raise", where=where, at_step=1)
        await play(workers.groups[0], 1)

    with pytest.raises(EnvironmentRaised, match="the bridge is out") as caught:
        await run()
    assert (caught.value.where, caught.value.cause) == (where, "ValueError: the bridge is out")
    assert "walks.py" in caught.value.traceback_text
    assert isinstance(caught.value.__cause__, ValueError)


async def test_a_cancelled_step_of_an_awaitable_environment_asks_for_a_reset() -> None:
    workers = await opened("walks:AwaitableWalk", [(1,)], misbehave="await", at_step=1)
    (group,) = workers.groups
    with pytest.raises(RuntimeError, match="reset it first"):
        await group.step(np.ones(1, np.int64))
    await group.reset()
    async with asyncio.TaskGroup() as tasks:
        step = tasks.create_task(group.step(np.ones(1, np.int64)))
        await asyncio.sleep(0)
        step.cancel()
    with pytest.raises(RuntimeError, match="reset it first"):
        await group.step(np.ones(1, np.int64))
    assert (await group.reset()).shape == (1, 4)
    await workers.aclose()


async def test_closing_goes_on_after_one_raises(caplog: pytest.LogCaptureFixture) -> None:
    workers = await opened(misbehave="raise", where="close", sizes=[(1,)])
    with caplog.at_level(logging.WARNING):
        await workers.aclose()
    assert "local worker 0 raised in close" in caplog.text


async def test_a_cancelled_start_undoes_what_its_thread_made(monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on, closed = asyncio.Event(), threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    class Slow(EnvironmentGroup):
        def __init__(self, spec: EnvironmentSpec, num_envs: int) -> None:
            loop.call_soon_threadsafe(started.set)
            go_on.wait()
            super().__init__(spec, num_envs)

        def close(self) -> None:
            super().close()
            closed.set()

    monkeypatch.setattr("aiorl.environments.local.EnvironmentGroup", Slow)
    async with asyncio.TaskGroup() as tasks:
        opening = tasks.create_task(opened(sizes=[(1,)]))
        await started.wait()
        opening.cancel()
        await asyncio.wait([opening])  # gives the thread 0.2 s, in vain
        assert opening.cancelled()
        go_on.set()
    assert closed.wait(5)
