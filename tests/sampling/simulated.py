"""Groups of simulated environments of any speed, whose observations are names: (environment, episode, step).

So what is learned from shows by itself what is missing, repeated or torn apart.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from aiorl.environments.make import Tick
from aiorl.environments.spaces import ArraySpec, EnvironmentInfo
from aiorl.models.config import MLPConfig
from aiorl.models.mlp import MLP
from aiorl.sampling.batcher import MicroBatcher
from aiorl.sampling.channel import Channel
from aiorl.sampling.config import SamplingConfig
from aiorl.sampling.policy import NumpyActing, Policy
from aiorl.sampling.rollout import Rollout

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from numpy.typing import NDArray

    from aiorl.sampling.trajectory import SealedEpoch, TrajectoryBatch

    Name = tuple[int, int, int]

INFO = EnvironmentInfo(ArraySpec((3,), "float32"), ArraySpec((), "int64"), 2, "same_step", None)


class SimulatedGroup:
    """Steps its environments at once, when `delay` seconds have passed; terminates an episode after `length` steps.

    Attributes:
        num_steps: Steps that it has taken.
    """

    def __init__(
        self, first_env: int, num_envs: int, *, delay: Callable[[], float], length: Callable[[int, int], int]
    ) -> None:
        self.first_env, self.num_envs = first_env, num_envs
        self.name = f"environments from {first_env}"
        self.info = INFO
        self.num_steps = 0
        self._delay, self._length = delay, length
        self._names: list[Name] = []

    async def reset(self) -> NDArray[Any]:
        self._names = [(self.first_env + row, 0, 0) for row in range(self.num_envs)]
        return np.array(self._names, np.float32)

    async def step(self, actions: NDArray[Any]) -> Tick:
        await asyncio.sleep(self._delay())
        self.num_steps += 1
        terminated = np.zeros(self.num_envs, np.bool_)
        finals = []
        for row, (env, episode, step) in enumerate(self._names):
            self._names[row] = (env, episode, step + 1)
            if step + 1 == self._length(env, episode):
                terminated[row] = True
                finals.append(self._names[row])
                self._names[row] = (env, episode + 1, 0)
        return Tick(
            observations=np.array(self._names, np.float32),
            rewards=np.ones(self.num_envs, np.float32),
            terminated=terminated,
            truncated=np.zeros(self.num_envs, np.bool_),
            final_observations=np.array(finals, np.float32).reshape(-1, 3),
        )


class Sampling:
    """A rollout whose epochs the test takes, and learns by publishing the same weights anew.

    Attributes:
        rollout: The rollout.
        channel: Where sealed epochs are.
    """

    def __init__(self, groups: Sequence[SimulatedGroup], config: SamplingConfig, policy: Policy, infer: Any) -> None:
        self.channel: Channel[SealedEpoch] = Channel(config.max_policy_lag + 1)
        self._policy = policy
        self.rollout = Rollout(
            groups, info=INFO, config=config, batcher=infer, policy=policy, channel=self.channel, seed=5
        )

    async def sealed(self) -> tuple[SealedEpoch, TrajectoryBatch]:
        """The next epoch, and its rows."""
        sealed = await self.channel.get()
        batch = sealed.gather()
        sealed.release(self.rollout.pool)
        return sealed, batch

    def learn(self, epoch: int) -> None:
        """Publishes weights after that epoch."""
        self._policy.publish(epoch, self._policy.snapshot())
        self.rollout.learned(epoch)


@asynccontextmanager
async def sampling(groups: Sequence[SimulatedGroup], **config: Any) -> AsyncIterator[Sampling]:
    """Runs a rollout of these groups, without lockstep; anything that takes longer than a minute fails."""
    settings = SamplingConfig.model_validate({"max_wait_time": 0.0, **config})
    model = MLP(INFO, MLPConfig(name="mlp", hidden_sizes=(4,)))
    policy = Policy(NumpyActing(model.policy_layers(), model.activation), optimal=False)
    async with (
        asyncio.timeout(60),
        MicroBatcher(policy.act, max_batch_size=groups[0].num_envs, max_wait_time=0.0) as batcher,
        asyncio.TaskGroup() as tasks,
    ):
        found = Sampling(groups, settings, policy, batcher)
        running = tasks.create_task(found.rollout.run())
        try:
            yield found
        finally:
            running.cancel()


class Streams:
    """Checks that each environment's transitions are learned from in their order, every one of them and once."""

    def __init__(self, length: Callable[[int, int], int]) -> None:
        self.names: dict[int, list[Name]] = {}
        self._length = length

    def add(self, batch: TrajectoryBatch) -> None:
        """Takes the next epoch's batch."""
        names = [(int(env), int(episode), int(step)) for env, episode, step in batch.observations]
        followers = dict(zip(batch.bootstrap_rows.tolist(), batch.bootstrap_observations.tolist(), strict=True))
        followers |= dict(zip(batch.final_rows.tolist(), batch.final_observations.tolist(), strict=True))
        for env, start, length in zip(
            batch.environments.tolist(), batch.starts.tolist(), batch.lengths.tolist(), strict=True
        ):
            stream = self.names.setdefault(env, [])
            for row in range(start, start + length):
                name = names[row]
                assert name == (self._after(stream[-1]) if stream else (env, 0, 0))
                is_last = name[2] + 1 == self._length(env, name[1])
                assert batch.terminated[row] == is_last
                assert batch.ends[row] == (row == start + length - 1)
                assert not is_last or batch.ends[row]
                stream.append(name)
            *inside, step = names[start + length - 1]
            assert followers[start + length - 1] == [*inside, step + 1]

    def _after(self, name: Name) -> Name:
        env, episode, step = name
        return (env, episode, step + 1) if step + 1 < self._length(env, episode) else (env, episode + 1, 0)
