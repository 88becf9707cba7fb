from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import numpy as np
import pytest

from aiorl.environments.local import LocalWorkers, open_local
from aiorl.environments.make import EnvironmentGroup, Group, load, seed_of
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


CAUSES = {
    "raise": "ValueError: the bridge is out",
    "sys.exit": "SystemExit: 9",
    "interrupt": "KeyboardInterrupt",  # as if nobody had pressed Ctrl-C
    "cancel": "asyncio.exceptions.CancelledError",  # as libraries leak it
}


@pytest.mark.parametrize("misbehave", CAUSES)
@pytest.mark.parametrize("identifier", ["walks:Walk", "walks:AwaitableWalk"])
@pytest.mark.parametrize("where", ["constructor", "reset", "step"])
async def test_what_an_environment_raises_is_told(identifier: str, where: str, misbehave: str) -> None:
    async def run() -> None:
        workers = await opened(identifier, misbehave=misbehave, where=where, at_step=1)
        await play(workers.groups[0], 1)

    with pytest.raises(EnvironmentRaised) as caught:
        await run()
    assert (caught.value.where, caught.value.cause) == (where, CAUSES[misbehave])
    assert "walks.py" in caught.value.traceback_text


async def test_a_cancellation_that_an_environment_leaks_ends_its_siblings() -> None:
    workers = await opened("walks:AwaitableWalk", [(2,)], misbehave="cancel", at_step=1)
    with pytest.RaisesGroup(EnvironmentRaised):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(play(workers.groups[0], 1))
            tasks.create_task(workers.watch())
    await workers.aclose()


@pytest.mark.parametrize("identifier", ["walks:Odd", "walks:AwaitableOdd"])
@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"reward": None}, "environment 4 gave the reward None, which is not a number"),
        ({"shape": (3,), "where": "step"}, r"environment 4 gave an observation of shape \(3,\)"),
        ({"shape": (3,), "where": "end"}, r"environment 4 gave an observation of shape \(3,\)"),
        ({"shape": (2, 2), "where": "autoreset"}, r"environment 4 gave an observation of shape \(2, 2\)"),
    ],
)
async def test_what_is_no_observation_or_reward_is_told(identifier: str, kwargs: dict[str, Any], told: str) -> None:
    workers = await opened(identifier, only_seed=seed_of(7, 4, 2), **kwargs)
    with pytest.raises(EnvironmentRaised, match=told) as caught:
        for group in workers.groups:
            await play(group, 20)
    assert caught.value.where == "step"
    await workers.aclose()


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


@pytest.mark.parametrize("misbehave", CAUSES)
@pytest.mark.parametrize("identifier", ["walks:Walk", "walks:AwaitableWalk"])
async def test_closing_goes_on_after_one_raises(
    identifier: str, misbehave: str, caplog: pytest.LogCaptureFixture
) -> None:
    workers = await opened(identifier, misbehave=misbehave, where="close")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        await workers.aclose()
    assert caplog.text.count(" raised in close") == len(workers.groups)


async def test_a_first_look_does_not_wait_for_a_close_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        workers = await opened(misbehave="wait", where="close")
    assert "walks:Walk was still closing after 0.2 s" in caplog.text
    released = load("walks:RELEASED")
    released.set()
    await workers.aclose()
    released.clear()


async def test_a_cancelled_start_undoes_what_its_thread_made(monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on, closed = asyncio.Event(), threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    class Slow(EnvironmentGroup):
        def __init__(self, spec: EnvironmentSpec, num_envs: int, first_env: int = 0) -> None:
            loop.call_soon_threadsafe(started.set)
            go_on.wait()
            super().__init__(spec, num_envs, first_env)

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
