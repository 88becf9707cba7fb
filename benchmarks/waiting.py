"""An environment that waits instead of computing, torch-free, since workers import it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SLOWDOWN = 50


class Waiting(gymnasium.Env[Any, Any]):
    """Waits in each step; where its seed is `slow_seed`, 50 times as long. Observes (seed, episode, step)."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gymnasium.spaces.Discrete(2)
    length = 100

    def __init__(self, step_s: float, slow_seed: int) -> None:
        self._step_s, self._slow_seed = step_s, slow_seed
        self._seed = self._episode = self._step = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """Starts the next episode; a seed starts anew."""
        self._episode += 1
        if seed is not None:
            self._seed, self._episode = seed, 0
        self._step = 0
        return self._observe(), {}

    def step(self, action: int) -> tuple[NDArray[np.float64], float, bool, bool, dict[str, Any]]:
        """Waits."""
        time.sleep(self._step_s * (SLOWDOWN if self._seed == self._slow_seed else 1))
        self._step += 1
        return self._observe(), 1.0, self._step == self.length, False, {}

    def _observe(self) -> NDArray[np.float64]:
        return np.array([self._seed, self._episode, self._step], np.float64)
