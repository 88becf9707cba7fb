"""An environment whose step computes for a given time, torch-free, since workers import it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Spinning(gymnasium.Env[Any, Any]):
    """Each step spins until `step_s` seconds have passed; episodes have 100 steps."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, step_s: float = 0.001) -> None:
        self._step_s = step_s
        self._num_steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts an episode."""
        super().reset(seed=seed)
        self._num_steps = 0
        return np.zeros(4, np.float32), {}

    def step(self, action: int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Computes."""
        until = time.perf_counter() + self._step_s
        while time.perf_counter() < until:
            pass
        self._num_steps += 1
        return np.zeros(4, np.float32), 1.0, self._num_steps == 100, False, {}
