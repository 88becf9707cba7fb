"""Sampling, put together from its parts: the policy that acts, the batcher, the rollout, and the channel that it fills.

    workers ──► rollout ──► batcher ──► policy
                   └──► channel

A run learns from what comes out of the channel; who only measures takes it out and throws it away.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiorl.compute.device import Placement, TorchSettings
from aiorl.compute.threads import in_thread
from aiorl.learning.acting import Compilation, build_acting, in_its_place
from aiorl.sampling.batcher import MicroBatcher
from aiorl.sampling.channel import Channel
from aiorl.sampling.policy import NumpyActing, Policy
from aiorl.sampling.rollout import Rollout

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import torch

    from aiorl.environments.supervisor import Workers
    from aiorl.learning.config import ReinforcementLearningTrainerConfig
    from aiorl.models.base import Model
    from aiorl.sampling.policy import Acting
    from aiorl.sampling.trajectory import SealedEpoch
    from aiorl.tasks.base import ReinforcementLearningTask


@dataclass(slots=True)
class Sampling:
    """What samples. The rollout is not running yet: whoever opened it has `Rollout.run` in a task.

    Attributes:
        policy: The versions of the weights that act.
        batcher: Chooses actions.
        channel: Sealed epochs come out of it.
        rollout: Drives the groups.
    """

    policy: Policy
    batcher: MicroBatcher
    channel: Channel[SealedEpoch]
    rollout: Rollout


@contextlib.asynccontextmanager
async def open_sampling(
    workers: Workers,
    model: Model,
    task: ReinforcementLearningTask,
    config: ReinforcementLearningTrainerConfig,
    *,
    device: torch.device,
    settings: TorchSettings,
    version: int = 0,
    num_epochs: int = 0,
    noise_counts: Any = None,
    epoch_is_over: Callable[[int], bool] | None = None,
) -> AsyncIterator[Sampling]:
    """Puts sampling together; at the end the batcher is closed and its thread, where it has one, joined.

    Args:
        workers: The environments.
        model: Whose weights act, as they are now, and later as they are published.
        task: Says how the model acts.
        config: ``[trainer]``.
        device: Where the model is.
        settings: Torch's, around acting.
        version: Of the weights.
        num_epochs: Epochs that an earlier run learned.
        noise_counts: Real steps of each environment in that run, ``int64`` by global index; None: none.
        epoch_is_over: As for `Rollout`.
    """
    sampling = config.sampling
    sizes = [group.num_envs for group in workers.groups]
    per_worker = max(1, len(sizes) // max(1, workers.num_workers))
    max_rows = sampling.max_batch_size or max(sampling.min_batch_size, sum(sizes[::per_worker]))
    compilation = (
        Compilation(config.compiler, workers.info.observation, max_rows, sampling.optimal)
        if config.compiler.model
        else None
    )

    def build() -> Acting:
        with settings.applied():
            return build_acting(model, task, device, compilation)

    async with contextlib.AsyncExitStack() as stack:
        acting = await in_thread(build)
        policy = Policy(acting, optimal=sampling.optimal, version=version)
        infer: Callable[[Any], Any] = policy.act
        if not isinstance(acting, NumpyActing):  # which is short, and stays on the loop
            infer = in_its_place(policy, await stack.enter_async_context(Placement("acting", settings)))
        batcher = await stack.enter_async_context(
            MicroBatcher(
                infer,
                max_batch_size=max_rows,
                min_batch_size=sampling.min_batch_size,
                max_wait_time=None if sampling.force_sync else sampling.max_wait_time,
                name="acting",
            )
        )
        channel: Channel[SealedEpoch] = Channel(sampling.max_policy_lag + 1)
        rollout = Rollout(
            workers.groups,
            info=workers.info,
            config=sampling,
            batcher=batcher,
            policy=policy,
            channel=channel,
            seed=config.seed,
            num_epochs=num_epochs,
            noise_counts=noise_counts,
            epoch_is_over=epoch_is_over,
        )
        yield Sampling(policy, batcher, channel, rollout)
