"""Small environments whose observations tell seed, episode and step, and that misbehave when asked to."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

Row: TypeAlias = NDArray[np.float64]
Outcome: TypeAlias = tuple[Row, float, bool, bool, dict[str, Any]]

WAITING, RELEASED = threading.Event(), threading.Event()
"""Set by what ``misbehave = "wait"`` makes wait, and ends that, in this process."""


class Walk(gymnasium.Env[Any, Any]):
    """Observes (seed, episode, step, position); an episode's length is drawn at its reset. Rewards its step's number.

    Odd episodes terminate, even ones are truncated; with ``both``, all do both.
    """

    def __init__(
        self,
        *,
        misbehave: str = "",
        where: str = "step",
        at_step: int = 3,
        only_seed: int | None = None,
        both: bool = False,
        start: int = 0,
        say_closed: bool = False,
    ) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float64)
        self.action_space = spaces.Discrete(2, start=start)
        self._misbehave, self._where, self._at_step, self._both = misbehave, where, at_step, both
        self._start = start
        self._say_closed = say_closed
        self._seed = self._episode = self._step = self._position = self._length = 0
        self._buffer = np.zeros(4)
        if where == "constructor":
            self._act_up()

    def _act_up(self) -> None:
        if self._misbehave == "raise":
            print("about to raise", file=sys.stderr)  # noqa: T201
            raise ValueError("the bridge is out")
        if self._misbehave == "print":
            print("x" * 5000)  # noqa: T201
        elif self._misbehave == "exit":
            print("about to exit", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(7)
        elif self._misbehave == "sys.exit":
            sys.exit(9)
        elif self._misbehave == "sleep":
            time.sleep(3600)  # hangs on purpose: it is to be killed
        elif self._misbehave == "spin":
            while True:
                pass
        elif self._misbehave == "cancel":
            raise asyncio.CancelledError
        elif self._misbehave == "interrupt":
            raise KeyboardInterrupt
        elif self._misbehave == "wait":
            WAITING.set()
            RELEASED.wait()

    def _observe(self) -> Row:
        self._buffer[:] = self._seed, self._episode, self._step, self._position
        return self._buffer  # always the same one: whoever keeps it has to copy it

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Row, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        if seed is not None:
            self._seed, self._episode = seed, 0
        if self._where == "reset":
            self._act_up()
        self._episode += 1
        self._step = 0
        self._position = int(self.np_random.integers(100))
        self._length = int(self.np_random.integers(1, 8))
        return self._observe(), {}

    def step(self, action: int) -> Outcome:
        assert self.action_space.contains(action)
        self._step += 1
        self._position += 1 + action - self._start
        if self._where == "step" and self._step == self._at_step:
            self._act_up()
        ends = self._step == self._length
        odd = self._episode % 2 == 1
        return self._observe(), float(self._step), ends and (odd or self._both), ends and (not odd or self._both), {}

    def close(self) -> None:
        if self._where == "close":
            self._act_up()
        if self._say_closed:
            print("closed", file=sys.stderr)  # noqa: T201


class Copied(Walk):
    """A walk that reuses no buffer: SyncVectorEnv hands on as ``final_obs`` what a reset then overwrites."""

    def _observe(self) -> Row:
        return super()._observe().copy()


def vector(num_envs: int, autoreset: str = "SameStep", copy: bool = True, **kwargs: Any) -> SyncVectorEnv:
    """A vector environment of walks in one of Gymnasium's autoreset modes; ``copy=False`` reuses one array."""
    return SyncVectorEnv([lambda: Copied(**kwargs)] * num_envs, copy=copy, autoreset_mode=autoreset)


def three(num_envs: int) -> SyncVectorEnv:
    """Makes three environments, whatever it is asked."""
    return vector(3)


class Asked(SyncVectorEnv):
    """A vector environment that resets as Gymnasium does by default, unless it is asked."""

    def __init__(self, num_envs: int, autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP) -> None:
        super().__init__([Copied] * num_envs, autoreset_mode=autoreset_mode)


class Unreset(SyncVectorEnv):
    """A vector environment that does not say when it resets."""

    def __init__(self, num_envs: int) -> None:
        super().__init__([Walk] * num_envs)
        del self.metadata["autoreset_mode"]


class Mirror(gymnasium.Env[Any, Any]):
    """Observes its process: torch imported, pydantic imported, warnings as errors, resident bytes."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float64)
        self.action_space = spaces.Discrete(2)

    def _observe(self) -> Row:
        status = Path("/proc/self/status").read_text()
        resident = int(status.partition("VmRSS:")[2].split()[0]) * 1024
        flags = ["torch" in sys.modules, "pydantic" in sys.modules, "error" in sys.warnoptions]
        return np.array([*flags, resident], np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Row, dict[str, Any]]:
        return self._observe(), {}

    def step(self, action: int) -> Outcome:
        return self._observe(), 0.0, False, False, {}


class AwaitableWalk:
    """A walk whose reset and step are coroutines."""

    def __init__(self, **kwargs: Any) -> None:
        self._walk = Walk(**kwargs)
        self.observation_space = self._walk.observation_space
        self.action_space = self._walk.action_space
        self.num_waiting = 0
        self.closed = False

    async def reset(self, *, seed: int | None = None) -> tuple[Row, dict[str, Any]]:
        await asyncio.sleep(0)
        return self._walk.reset(seed=seed)

    async def step(self, action: int) -> Outcome:
        if self._walk._misbehave == "await" and self._walk._step + 1 == self._walk._at_step:
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(0)
        return self._walk.step(action)

    async def close(self) -> None:
        await asyncio.sleep(0)
        self._walk.close()
        self.closed = True


class Odd(Walk):
    """Pays ``reward``, or observes something of another shape: first in ``where``, and where ``only_seed`` was given."""

    def __init__(self, *, shape: tuple[int, ...] = (), reward: Any = 1.0, where: str = "", only_seed: int = -1) -> None:
        super().__init__()
        self._shape, self._reward, self._where, self._only_seed = tuple(shape), reward, where, only_seed

    def _odd(self, where: str, observation: Row) -> Row:
        return np.zeros(self._shape) if self._seed == self._only_seed and where == self._where else observation

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Row, dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=options)
        return self._odd("reset" if seed is not None else "autoreset", observation), info

    def step(self, action: int) -> Outcome:
        observation, _, terminated, truncated, info = super().step(action)
        where = "end" if terminated or truncated else "step"
        reward = self._reward if self._seed == self._only_seed else 1.0
        return self._odd(where, observation), reward, terminated, truncated, info


class AwaitableOdd(AwaitableWalk):
    """The same with coroutines."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self._walk = Odd(**kwargs)


class Doubled(gymnasium.RewardWrapper[Row, int]):
    """Pays twice."""

    def reward(self, reward: Any) -> float:
        return 2.0 * float(reward)


class Pixels(Walk):
    """Observes more than fits into a header."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(0, 255, (84, 84, 1), np.uint8)

    def _observe(self) -> Any:
        return np.full((84, 84, 1), self._step, np.uint8)


class Nested(Walk):
    """Observes a dictionary, which is not supported."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Dict({"a": spaces.Discrete(2)})


NOT_CALLABLE = 3


class Differing(Walk):
    """Is larger where another one was made before."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        try:
            (Path(folder) / "made").touch(exist_ok=False)
        except FileExistsError:
            self.observation_space = spaces.Box(-np.inf, np.inf, (5,), np.float64)


class Grains(gymnasium.Env[Any, Any]):
    """Observes random bytes, whatever they are as numbers, in ``shape`` and ``dtype``; every third step or so ends it."""

    def __init__(self, shape: tuple[int, ...] = (3,), dtype: str = "float32", reuse: bool = True) -> None:
        low, high = (0, 255) if dtype == "uint8" else (-np.inf, np.inf)
        self.observation_space = spaces.Box(low, high, tuple(shape), np.dtype(dtype).type)
        self.action_space = spaces.Discrete(2)
        self._buffer = np.zeros(shape, dtype)
        self._reuse = reuse

    def _observe(self) -> Any:
        self._buffer.reshape(-1).view(np.uint8)[:] = self.np_random.integers(0, 256, self._buffer.nbytes, np.uint8)
        return self._buffer if self._reuse else self._buffer.copy()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        return self._observe(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        terminated, truncated = (self.np_random.random(2) < (0.2, 0.15)).tolist()
        return self._observe(), float(self.np_random.random()), terminated, truncated, {}


def grains(num_envs: int, autoreset: str, **kwargs: Any) -> SyncVectorEnv:
    """A vector environment of them in one of Gymnasium's autoreset modes."""
    return SyncVectorEnv([lambda: Grains(reuse=False, **kwargs)] * num_envs, autoreset_mode=autoreset)
