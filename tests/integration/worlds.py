"""Environments that misbehave on demand."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np


class Chain(gymnasium.Env[np.ndarray[Any, Any], np.int64]):
    """Counts its steps; an episode takes `length` of them, each worth 1."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, length: int = 10, raise_in: str = "", after: int = 50) -> None:
        self.length = length
        self.raise_in = raise_in
        self.after = after
        self.num_steps = 0
        self.at = 0

    def _misbehave(self, where: str) -> None:
        if self.raise_in == where and self.num_steps >= (self.after if where != "reset" else 1):
            raise RuntimeError(f"the chain broke in {where}")
        if self.raise_in == "kill" and where == "step" and self.num_steps >= self.after:
            os.kill(os.getpid(), signal.SIGKILL)

    def _observe(self) -> np.ndarray[Any, Any]:
        return np.array([self.at, self.num_steps], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._misbehave("reset")
        self.at = 0
        return self._observe(), {}

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.num_steps += 1
        self._misbehave("step")
        self.at += 1
        reward = float("nan") if self.raise_in == "nan" else 1.0
        return self._observe(), reward, self.at >= self.length, False, {}


class Sticky(Chain):
    """Never comes back from a step once the file named by AIORL_TEST_STICK exists."""

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if Path(os.environ["AIORL_TEST_STICK"]).exists():
            sys.stdout.write("stuck\n")
            sys.stdout.flush()
        while Path(os.environ["AIORL_TEST_STICK"]).exists():
            signal.pause()
        return super().step(action)


class Ticking(gymnasium.Env[np.ndarray[Any, Any], np.int64]):
    """An image whose every pixel is the count of what the environment has shown, modulo 251."""

    observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self) -> None:
        self._count = 0

    def _observe(self) -> np.ndarray[Any, Any]:
        self._count += 1
        return np.full((64, 64, 3), self._count % 251, np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation = self._observe()
        ended = self._count % 7 == 0
        return observation, 1.0, ended and self._count % 2 == 0, ended and self._count % 2 == 1, {}


class Slow(Chain):
    """A step takes `step_s` seconds, a reset `reset_s`, and neither needs a processor: how busy the machine is plays no part."""

    def __init__(self, length: int = 10, step_s: float = 0.004, reset_s: float = 0.0, **kwargs: Any) -> None:
        super().__init__(length, **kwargs)
        self.step_s = step_s
        self.reset_s = reset_s

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        time.sleep(self.reset_s)
        return super().reset(seed=seed)

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        time.sleep(self.step_s)
        return super().step(action)


class Awaited(Chain):
    """A chain whose reset and step are coroutines."""

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:  # type: ignore[override]
        return super().reset(seed=seed)

    async def step(self, action: np.int64) -> Any:  # type: ignore[override]
        await asyncio.sleep(0.02)
        return super().step(action)
