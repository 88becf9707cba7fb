"""What an environment is made from, and what it looks like: plain data that every station understands.

Nothing here refers to a live environment, so that a description crosses the link to and from a worker.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from aiorl.errors import ConfigError, Fault, UnsupportedSpace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gymnasium import Space

Autoreset: TypeAlias = Literal["same_step", "next_step"]
"""When the reset after an episode's end happens: inside the tick that ended it, or in the tick after."""

ARRAY_DTYPES: Final = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
)  # fmt: skip
"""NumPy names of the element types that observations and messages may have."""


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """Shape and element type of one array.

    Attributes:
        shape: Without the leading dimension of environments.
        dtype: NumPy's name, one of ``ARRAY_DTYPES``; little endian where it crosses the link.
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """How to make an environment: what a task's ``get_environment`` returns, and what a worker builds from.

    Attributes:
        id: A Gymnasium id, or ``module:callable`` that returns an environment.
        kwargs: Keyword arguments of the constructor: numbers, strings, and lists and tables of them.
        wrappers: ``module:callable`` each, innermost first; each takes an environment and returns one, or a vector
            environment where the mode makes these.
        register: Modules to import first, for the environments that they register.
        vectorization_mode: ``"sync"`` steps the environments of a group one after the other; ``"vector_entry_point"``
            uses the environment's own vectorised version, ``"envpool"`` EnvPool's.
    """

    id: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()
    register: tuple[str, ...] = ()
    vectorization_mode: str = "sync"

    @property
    def is_vector(self) -> bool:
        """Whether a group is one vector environment, which its wrappers wrap as a whole."""
        return self.vectorization_mode != "sync"


@dataclass(frozen=True, slots=True)
class EnvironmentInfo:
    """What the environments of a run look like; the same for all of them.

    Attributes:
        observation: Of one environment.
        action: Of one environment.
        num_actions: Actions are 0 … num_actions - 1; a space that starts elsewhere is shifted where it is stepped.
        autoreset: ``"next_step"`` where the tick after an episode's end is no transition.
        max_episode_steps: Where the environment's registration says so.
        is_awaitable: Whether reset and step are coroutines, which only the trainer's own loop hosts.
    """

    observation: ArraySpec
    action: ArraySpec
    num_actions: int
    autoreset: Autoreset
    max_episode_steps: int | None
    is_awaitable: bool = False


def _describe_spaces(observation_space: Space[Any], action_space: Space[Any]) -> tuple[ArraySpec, ArraySpec, int]:
    """Observation, action and number of actions of one environment's spaces.

    Raises:
        UnsupportedSpace: The observation space is no Box of numbers, or the action space not Discrete; names the space.
    """
    if not isinstance(observation_space, spaces.Box):
        raise UnsupportedSpace(f"observation space {observation_space} is not supported: only Box is, so far")
    dtype = np.dtype(observation_space.dtype).name
    if dtype not in ARRAY_DTYPES or not observation_space.shape or 0 in observation_space.shape:
        raise UnsupportedSpace(
            f"observation space {observation_space} is not supported: a Box needs a dimension, numbers in it, and one "
            f"of the types {', '.join(ARRAY_DTYPES)}"
        )
    if not isinstance(action_space, spaces.Discrete):
        raise UnsupportedSpace(f"action space {action_space} is not supported: only Discrete is, so far")
    return ArraySpec(tuple(observation_space.shape), dtype), ArraySpec((), "int64"), int(action_space.n)


def describe(environment: Any) -> EnvironmentInfo:
    """What an environment, a vector environment or an awaitable environment looks like.

    Raises:
        UnsupportedSpace: Its spaces cannot be used; names the space.
        ConfigError: A vector environment does not say in ``metadata["autoreset_mode"]`` when it resets.
    """
    autoreset: Autoreset = "same_step"
    if isinstance(environment, VectorEnv):
        spaces_of_one = environment.single_observation_space, environment.single_action_space
        if autoreset_mode(environment) is AutoresetMode.NEXT_STEP:
            autoreset = "next_step"
    else:
        spaces_of_one = environment.observation_space, environment.action_space
    observation, action, num_actions = _describe_spaces(*spaces_of_one)
    registration = getattr(environment, "spec", None)
    return EnvironmentInfo(
        observation=observation,
        action=action,
        num_actions=num_actions,
        autoreset=autoreset,
        max_episode_steps=getattr(registration, "max_episode_steps", None),
        is_awaitable=inspect.iscoroutinefunction(environment.step),
    )


def first_action(environment: Any) -> int:
    """The number that an environment's own action space gives to action 0."""
    space: Any = environment.single_action_space if isinstance(environment, VectorEnv) else environment.action_space
    return int(space.start)


def autoreset_mode(environment: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    """When a vector environment resets what has ended.

    Raises:
        ConfigError: It does not say, or says something that is none of Gymnasium's modes.
    """
    named = environment.metadata.get("autoreset_mode")
    try:
        return AutoresetMode(named)
    except ValueError as error:
        known = ", ".join(f'"{mode.value}"' for mode in AutoresetMode)
        fault = Fault(
            "task.environment.id",
            f'{type(environment).__name__}.metadata["autoreset_mode"] is {named!r}: nobody knows when it resets',
            remedy=f"let it be one of gymnasium.vector.AutoresetMode: {known}",
        )
        raise ConfigError([fault]) from error
