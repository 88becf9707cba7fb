"""Sealed epochs as the rollout makes them, small enough to know every number of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from aiorl.compute.distributions import Categorical
from aiorl.environments.make import Tick
from aiorl.environments.spaces import ArraySpec
from aiorl.models.base import Model
from aiorl.sampling.pages import PagePool
from aiorl.sampling.track import GroupTrack
from aiorl.sampling.trajectory import SealedEpoch

if TYPE_CHECKING:
    from collections.abc import Collection

PAGE_TICKS = 4


class Line(Model):
    """Logits and value are linear in an observation of one number."""

    def __init__(self, *, weight: float = 0.1, bias: float = 0.2) -> None:
        super().__init__()
        self.actor = nn.Linear(1, 2)
        self.critic = nn.Linear(1, 1)
        with torch.no_grad():
            self.actor.weight.copy_(torch.tensor([[0.02], [-0.02]]))
            self.actor.bias.zero_()
            self.critic.weight.fill_(weight)
            self.critic.bias.fill_(bias)

    def policy(self, observations: Tensor) -> Categorical:
        return Categorical(self.actor(observations))

    def value(self, observations: Tensor) -> Tensor:
        values: Tensor = self.critic(observations)
        return values.squeeze(1)


def pool_of() -> PagePool:
    return PagePool(100, ArraySpec((1,), "float32"), with_keep=False, page_ticks=PAGE_TICKS)


def sealed_epoch(
    pool: PagePool,
    num_ticks: int,
    *,
    num_envs: int = 1,
    terminated: Collection[tuple[int, int]] = (),
    truncated: Collection[tuple[int, int]] = (),
    maximum: int = 1000,
    version: int = 0,
    epoch: int = 1,
) -> SealedEpoch:
    """`num_ticks` steps of `num_envs` environments.

    What an environment shows before tick t is ``t + 100 * environment``, at the end of an episode ``0.5`` more than the next
    observation. Its reward for the tick is ``t / 10``, its action is 0 at even ticks, and the log-probability of the action is
    ``-t``. `terminated` and `truncated` are pairs of tick and environment.
    """
    track = GroupTrack(
        pool,
        num_envs=num_envs,
        first_env=0,
        min_trajectory_length=1,
        max_trajectory_length=maximum,
        next_step=False,
    )

    def seen(tick: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        return (tick + 100.0 * np.arange(num_envs, dtype=np.float32)).reshape(num_envs, 1).astype(np.float32)

    def which(ends: Collection[tuple[int, int]], tick: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        return np.array([(tick, env) in ends for env in range(num_envs)])

    track.begin(seen(0))
    returns: list[float] = []
    lengths: list[int] = []
    for tick in range(num_ticks):
        track.reserve()
        track.adds()
        track.write(
            np.full(num_envs, tick % 2), np.full(num_envs, -tick, np.float32), np.full(num_envs, version, np.int64)
        )
        gone, cut = which(terminated, tick), which(truncated, tick)
        after = seen(tick + 1)
        landing = track.land(
            Tick(after, np.full(num_envs, tick / 10, np.float32), gone, cut, after[gone | cut] + np.float32(0.5))
        )
        returns += landing.returns
        lengths += landing.lengths
    segment = track.seal(num_ticks)
    track.close()
    return SealedEpoch(epoch, [segment], returns, lengths, num_ticks * num_envs, 0, 0, num_ticks, 0.0)
