"""A task of one's own: REINFORCE with a baseline, and a hook that tells how it goes.

    python examples/custom_task.py

It could as well stand in a configuration, as ``[task] name = "custom_task:Reinforce"``.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np

import aiorl
from aiorl.tasks.returns import discounted_scan

if TYPE_CHECKING:
    from torch import Tensor

    from aiorl.compute.distributions import Categorical
    from aiorl.sampling.trajectory import TrajectoryBatch


class Reinforce(aiorl.ReinforcementLearningTask):
    """Williams 1992: raise the log-probability of each action by what its return exceeded the expected one by."""

    minibatch_size = 256
    gamma = 0.98

    def postprocess_trajectories(self, batch: TrajectoryBatch) -> TrajectoryBatch:
        """Adds each row's discounted return; ``next_values`` is what follows a cut, and 0 after termination."""
        rewards = batch.rewards + np.where(batch.ends, self.gamma * batch.next_values, 0.0)
        batch.extras["returns"] = discounted_scan(rewards, np.where(batch.ends, 0.0, self.gamma)).astype(np.float32)
        return batch

    def compute_loss(
        self, model: Any, batch: dict[str, Tensor], state: aiorl.State, output: tuple[Categorical, Tensor]
    ) -> dict[str, Tensor]:
        """Two losses per row, which the learner weights, sums and learns from."""
        distribution, values = output
        surplus = batch["returns"] - batch["values"]
        self.log("surplus", surplus)
        return {
            "policy": -distribution.log_prob(batch["actions"]) * surplus,
            "value": 0.5 * (values - batch["returns"]).square(),
        }

    async def on_epoch_end(self, state: aiorl.State) -> None:
        """Hooks may be coroutines: this one could just as well ask a server for permission to go on."""
        await asyncio.sleep(0)
        if state.num_epochs % 5 == 0:
            print(f"epoch {state.num_epochs}: {state.num_episodes} episodes in {state.num_samples} steps")


async def main() -> None:
    """Trains for 20,000 steps and says how well it went."""
    config = aiorl.load_config(
        None,
        overrides=[
            'trainer.exp_name="custom_task"',
            "trainer.max_samples=20_000",
            "trainer.sampling.num_epoch_samples=1024",
            "task.environment.num_env_workers=0",
            "optimizer.lr=3e-3",
        ],
    )
    episode_return_mean = float("nan")
    async with aiorl.open_run(config, task=Reinforce(config.task)) as run:
        async for epoch in run:
            episode_return_mean = epoch.episode_return_mean
    print(f"mean return of the last 100 episodes: {episode_return_mean:.1f}")


if __name__ == "__main__":
    asyncio.run(main())
