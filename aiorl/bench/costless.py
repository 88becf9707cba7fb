"""Environments that cost nothing, so that what is left is the link and the trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from aiorl.environments.spaces import EnvironmentSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aiorl.environments.spaces import EnvironmentInfo


class Costless(VectorEnv[Any, Any, Any]):
    """K environments whose steps are the same few arrays every time; no episode ever ends.

    Args:
        num_envs: K.
        shape: Of one observation.
        dtype: Of observations, a NumPy name.
        num_actions: Of a Discrete action space.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 - Gymnasium's own declaration

    def __init__(self, num_envs: int, shape: Sequence[int], dtype: str, num_actions: int) -> None:
        self.num_envs = num_envs
        kind: Any = np.dtype(dtype)
        low, high = (0, 1) if kind.kind in "bui" else (-1.0, 1.0)
        self.single_observation_space = spaces.Box(low, high, tuple(shape), kind)
        self.single_action_space = spaces.Discrete(num_actions)
        self._observations: NDArray[Any] = np.zeros((num_envs, *shape), kind)
        self._rewards = np.ones(num_envs, np.float32)
        self._flags = np.zeros(num_envs, np.bool_)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The observations."""
        return self._observations, {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """The same again."""
        return self._observations, self._rewards, self._flags, self._flags, {}


def costless(info: EnvironmentInfo) -> EnvironmentSpec:
    """Costless environments whose messages are as large as those of environments that look like `info`."""
    return EnvironmentSpec(
        id="aiorl.bench.costless:Costless",
        kwargs={
            "shape": list(info.observation.shape),
            "dtype": info.observation.dtype,
            "num_actions": info.num_actions,
        },
        vectorization_mode="vector_entry_point",
    )
