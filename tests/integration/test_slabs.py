"""Sampling from worker processes whose observations lie in shared memory: no row is torn, shifted or lost."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from aiorl.environments.config import EnvironmentConfig, LinkConfig
from aiorl.environments.remote import RemoteGroup
from aiorl.environments.spaces import EnvironmentSpec
from aiorl.environments.supervisor import open_workers
from aiorl.sampling.batcher import MicroBatcher
from aiorl.sampling.channel import Channel
from aiorl.sampling.config import SamplingConfig
from aiorl.sampling.rollout import Rollout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aiorl.sampling.trajectory import SealedEpoch, TrajectoryBatch

pytestmark = pytest.mark.anyio


class Unchanging:
    """A policy of one version, for the rollout to ask."""

    def activate(self) -> None:
        """There is nothing newer."""


async def act(rows: tuple[NDArray[np.uint8], NDArray[np.float64]]) -> tuple[NDArray[Any], ...]:
    """Actions that are a function of the observation's last pixel, once a thread and the loop have had their turns."""
    observations, _ = rows
    before = await asyncio.to_thread(lambda: observations[:, 0, 0, 0] % 2)
    await asyncio.sleep(0)
    assert (observations[:, -1, -1, -1] % 2 == before).all()
    return before.astype(np.int64), np.zeros(len(before), np.float32), np.zeros(len(before), np.int64)


def check(batch: TrajectoryBatch) -> None:
    """Every pixel of a row is the same, and one more than in the row before."""
    counts = {}
    for name in ("observations", "bootstrap_observations", "final_observations"):
        images = getattr(batch, name)
        pixels = images.reshape(len(images), -1)
        assert (pixels == pixels[:, :1]).all()
        counts[name] = pixels[:, 0].astype(int)
    shown = counts["observations"]
    inside = np.flatnonzero(~batch.ends)
    for before, after in (
        (shown[inside], shown[inside + 1]),
        (shown[batch.bootstrap_rows], counts["bootstrap_observations"]),
        (shown[batch.final_rows], counts["final_observations"]),
    ):
        assert ((before + 1) % 251 == after).all()
    assert (batch.actions == shown % 2).all()
    assert len(batch.final_rows) > 10


@pytest.mark.parametrize("lag", [0, 1])
async def test_sampled_rows_are_whole_and_in_order(lag: int) -> None:
    config = EnvironmentConfig(num_env_workers=2, envs_per_worker=6)
    settings = SamplingConfig(num_epoch_samples=300, max_wait_time=0.0, max_policy_lag=lag)
    spec = EnvironmentSpec("tests.integration.worlds:Ticking")
    async with AsyncExitStack() as stack:
        workers = await stack.enter_async_context(
            open_workers(spec, config, LinkConfig(), env_seed=1, incarnation=0, force_sync=False)
        )
        assert all(isinstance(group, RemoteGroup) and group.exchange is not None for group in workers.groups)
        batcher = await stack.enter_async_context(MicroBatcher(act, max_batch_size=6))
        channel: Channel[SealedEpoch] = Channel(lag + 1)
        rollout = Rollout(
            workers.groups,
            info=workers.info,
            config=settings,
            batcher=batcher,
            policy=Unchanging(),  # type: ignore[arg-type]
            channel=channel,
            seed=5,
        )
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(rollout.run())
            for epoch in range(1, 6):
                sealed = await channel.get()
                check(sealed.gather())
                sealed.release(rollout.pool)
                rollout.learned(epoch)
            running.cancel()
