"""An environment of one's own, hosted by worker processes, and a reward that fits it.

    python examples/custom_environment.py

Workers import the environment by its name, ``custom_environment:Corridor``, from wherever this script could; they build
it from plain keyword arguments and never see torch, so a module with environments should not import it either.
"""

from __future__ import annotations

import asyncio
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

import aiorl

LEFT, RIGHT = 0, 1


class Corridor(gymnasium.Env[NDArray[np.float32], np.int64]):
    """Walk from the middle of a corridor to the exit at its right end; each step costs a little."""

    def __init__(self, length: int = 21) -> None:
        """Builds a corridor of ``length`` fields."""
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (2,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2)
        self._length = length
        self._position = 0
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts near the middle."""
        super().reset(seed=seed)
        self._position = self._length // 2 + int(self.np_random.integers(-1, 2))
        self._steps = 0
        return self._observation(), {}

    def step(self, action: np.int64) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Moves one field; reaching the exit terminates, a hundred steps truncate."""
        self._position = max(0, self._position + (1 if action == RIGHT else -1))
        self._steps += 1
        at_exit = self._position >= self._length - 1
        return self._observation(), 1.0 if at_exit else -0.01, at_exit, self._steps >= 100, {}

    def _observation(self) -> NDArray[np.float32]:
        return np.array([self._position / (self._length - 1), 1.0], np.float32)


async def main() -> None:
    """Trains until the way out is found and taken nearly straight."""
    config = aiorl.load_config(
        None,
        overrides=[
            'trainer.exp_name="custom_environment"',
            "trainer.max_samples=30_000",
            "trainer.target_return=0.88",
            "trainer.sampling.num_epoch_samples=1024",
            "trainer.sampling.max_wait_time=0.0",
            'task.environment.id="custom_environment:Corridor"',
            "task.environment.kwargs.length=21",
            "task.environment.num_env_workers=1",
            "task.environment.envs_per_worker=16",
        ],
    )
    async with aiorl.open_run(config) as run:
        async for epoch in run:
            print(f"{epoch.num_samples} steps, mean return {epoch.episode_return_mean:.2f}")


if __name__ == "__main__":
    asyncio.run(main())
