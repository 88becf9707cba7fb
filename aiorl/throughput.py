"""Sampling alone: the real workers, rollout, batcher and policy, and nobody who learns.

Sealed epochs are thrown away at once and reported as learned, so that sampling goes as fast as it can. It is measured in
slices between which it is paused, so that several measurements can take turns on one machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiorl.assembly import open_sampling
from aiorl.compute.device import TorchSettings
from aiorl.errors import first_cause

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import torch

    from aiorl.assembly import Sampling
    from aiorl.environments.supervisor import Workers
    from aiorl.learning.config import ReinforcementLearningTrainerConfig
    from aiorl.models.base import Model
    from aiorl.sampling.pages import PagePool
    from aiorl.sampling.trajectory import SealedEpoch
    from aiorl.tasks.base import ReinforcementLearningTask


@dataclass(frozen=True, slots=True)
class Slice:
    """What sampling did in a stretch of time.

    Attributes:
        num_steps: Environment steps.
        num_ticks: Steps of whole groups.
        num_batches: Batches that were acted on.
        wall_s: Seconds.
        cpu_s: Processor seconds of this process, all its threads together.
    """

    num_steps: int
    num_ticks: int
    num_batches: int
    wall_s: float
    cpu_s: float

    @property
    def steps_per_s(self) -> float:
        """Environment steps per second."""
        return self.num_steps / self.wall_s


class SamplingAlone:
    """Sampling that goes on while it is measured; made by `sampling_alone`.

    Args:
        sampling: Its parts.

    Attributes:
        sampling: Its parts.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._wanted: asyncio.Future[tuple[SealedEpoch, PagePool]] | None = None

    async def measure(self, duration_s: float) -> Slice:
        """Samples for about `duration_s` seconds, and until the steps that are under way then have landed."""
        rollout, batcher = self.sampling.rollout, self.sampling.batcher
        before, steps_before = batcher.statistics(), int(rollout.noise_counts().sum())
        started, cpu_before = time.perf_counter(), time.process_time()
        rollout.resume()
        await asyncio.sleep(duration_s)
        await rollout.pause()
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_before
        after = batcher.statistics()
        return Slice(
            int(rollout.noise_counts().sum()) - steps_before,
            after.num_requests - before.num_requests,
            after.num_batches - before.num_batches,
            wall_s,
            cpu_s,
        )

    async def warm_up(self, duration_s: float, num_ticks: int = 1) -> None:
        """Samples in slices of `duration_s` until each group, on average, has stepped `num_ticks` times; resets take their time."""
        wanted = num_ticks * self.sampling.rollout.num_groups
        while wanted > 0:
            wanted -= (await self.measure(duration_s)).num_ticks

    async def copy_epoch(self) -> tuple[SealedEpoch, PagePool]:
        """Samples until an epoch is sealed. Returns a copy of it, and one of the pool to which its pages are given back."""
        self._wanted = asyncio.get_running_loop().create_future()
        self.sampling.rollout.resume()
        copied = await self._wanted
        await self.sampling.rollout.pause()
        return copied

    async def consume(self) -> None:
        """Throws sealed epochs away, until cancelled."""
        rollout, channel = self.sampling.rollout, self.sampling.channel
        while True:
            sealed = await channel.get()
            if self._wanted is not None and not self._wanted.done():
                self._wanted.set_result(copy.deepcopy((sealed, rollout.pool)))
            sealed.release(rollout.pool)
            rollout.learned(sealed.epoch)


@contextlib.asynccontextmanager
async def sampling_alone(
    workers: Workers,
    model: Model,
    task: ReinforcementLearningTask,
    config: ReinforcementLearningTrainerConfig,
    *,
    device: torch.device,
) -> AsyncIterator[SamplingAlone]:
    """Opens sampling without a learner; it is paused whenever nobody measures it.

    Args:
        workers: The environments, which nobody else steps.
        model: Whose weights act.
        task: Says how the model acts.
        config: ``[trainer]``.
        device: Where the model is.

    Raises:
        EnvironmentRaised, WorkerDied, LinkError: An environment or a worker failed; the body is cancelled then.
        AiorlError: What else ended sampling.
    """
    settings = TorchSettings(num_threads=1 if config.num_threads == "auto" else config.num_threads)
    async with open_sampling(workers, model, task, config, device=device, settings=settings) as sampling:
        await sampling.rollout.pause()
        alone = SamplingAlone(sampling)
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(sampling.rollout.run(), name="rollout"),
                    tasks.create_task(alone.consume(), name="sealed epochs"),
                    tasks.create_task(workers.watch(), name="watch workers"),
                ]
                try:
                    yield alone
                finally:
                    for task_ in running:
                        task_.cancel()
        except BaseExceptionGroup as group:
            cause = first_cause(group)
            if asyncio.current_task().cancelling():  # type: ignore[union-attr] # an outside cancellation that met a failure
                raise asyncio.CancelledError from cause
            raise cause from cause.__cause__
