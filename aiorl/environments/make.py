"""Environments made from their description, and stepped together in groups that reset themselves in one uniform way.

Autoreset, as the rest of aiorl sees it:

==================  ================================================================================================
back end            what ``EnvironmentGroup.step`` returns in the tick that ends an episode
==================  ================================================================================================
plain environments  ``same_step``: reset at once, and the next episode's first observation in ``observations``
SAME_STEP           the same
DISABLED            the same, reset by ``options={"reset_mask": ...}`` inside the tick
NEXT_STEP, EnvPool  ``next_step``: the final observation in ``observations``; the tick after is no transition (reward 0,
                    no flags) and brings the next episode's first observation
==================  ================================================================================================

In each, ``final_observations`` holds the true last observation of every episode that ended. Dimensions: K environments
of a group, E of them whose episode ended.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import AutoresetMode, VectorEnv

from aiorl.environments.envpool import EnvPoolVectorEnv
from aiorl.environments.rows import check_observation, stack_observations, stack_rewards
from aiorl.environments.spaces import describe, first_action
from aiorl.environments.tick import Tick as Tick
from aiorl.environments.vector import VectorBackEnd
from aiorl.errors import ConfigError, Fault

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from aiorl.environments.spaces import EnvironmentInfo, EnvironmentSpec

    Array: TypeAlias = NDArray[Any]


logger = logging.getLogger(__name__)


class Group(Protocol):
    """Environments that are stepped together, wherever they are; all that rollout knows of them."""

    @property
    def num_envs(self) -> int:
        """K."""

    @property
    def first_env(self) -> int:
        """Global index of the environment in row 0; the others follow."""

    @property
    def name(self) -> str:
        """For messages, such as ``worker 1 group 0``."""

    async def reset(self) -> Array:
        """Starts an episode in every environment.

        An answer that an earlier, cancelled call is still owed is dropped when it comes.

        Returns:
            First observations ``[K, *shape]``, for as long as those of a ``Tick``.

        Raises:
            GroupLost: The worker is gone.
            EnvironmentRaised: An environment in the trainer's own process raised.
        """

    async def step(self, actions: Array) -> Tick:
        """Steps every environment once; ``actions`` is int64 ``[K]``.

        A cancelled call leaves the group without its row, so that it has to be reset before the next step.

        Raises:
            GroupLost: The worker is gone; its cause is what happened to the worker.
            EnvironmentRaised: An environment in the trainer's own process raised.
            RuntimeError: The group was not reset, or an earlier call is unanswered.
        """


def seed_of(env_seed: int, env_index: int, incarnation: int) -> int:
    """The seed of one environment, 31 bits wide, which every simulator takes.

    Args:
        env_seed: Of the run.
        env_index: Global, so that it does not depend on how environments are divided among workers.
        incarnation: Of the environment's worker: a replacement does not repeat its predecessor's episodes.
    """
    sequence = np.random.SeedSequence(env_seed, spawn_key=(env_index, incarnation))
    return int(sequence.generate_state(1, np.uint32)[0]) >> 1


def load(name: str) -> Any:
    """The object that ``module:Name`` stands for; imports the module.

    Raises:
        AttributeError: The module has no such name. Whatever importing it raises comes through unchanged.
    """
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def resolve(spec: EnvironmentSpec) -> Callable[..., Any]:
    """The constructor of what a specification names, its wrappers not yet applied; imports the modules that it needs.

    It takes the environment's keyword arguments, and with any mode but ``"sync"`` also ``num_envs``.

    Raises:
        gymnasium.error.UnregisteredEnv: No such Gymnasium id.
        ConfigError: A vectorised version is asked for, and there is none.
        AttributeError: The module has no such name. Whatever an import raises comes through unchanged.
    """
    for module in spec.register:
        importlib.import_module(module)
    identifier = spec.id
    if spec.vectorization_mode == "envpool":
        return partial(EnvPoolVectorEnv, identifier)
    if ":" in identifier:
        try:
            return _constructor(load(identifier), spec)
        except AttributeError:
            identifier = identifier.partition(":")[2]  # Gymnasium's own way: a module that registers, and an id
            if identifier not in gymnasium.registry:
                raise
    registration = gymnasium.spec(identifier)
    if spec.vectorization_mode == "sync":
        # The checker only warns, and costs a call per step.
        return lambda **kwargs: gymnasium.make(identifier, **{"disable_env_checker": True, **kwargs})
    entry_point = registration.vector_entry_point
    if entry_point is None:
        fault = Fault(
            "task.environment.vectorization_mode",
            f"{identifier} has no vectorised version of its own",
            '"vector_entry_point"',
            'set it to "sync"',
        )
        raise ConfigError([fault])
    asked = _same_step(load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point, spec)
    return lambda **kwargs: gymnasium.make_vec(
        identifier, vectorization_mode="vector_entry_point", **{**asked, **kwargs}
    )


def _constructor(callable_: Any, spec: EnvironmentSpec) -> Callable[..., Any]:
    if not callable(callable_):
        raise TypeError(f"{callable_!r} is not callable")
    asked = _same_step(callable_, spec)
    return lambda **kwargs: callable_(**{**asked, **kwargs})


def _same_step(creator: Callable[..., Any], spec: EnvironmentSpec) -> dict[str, AutoresetMode]:
    """Keyword arguments that ask a vector environment for SAME_STEP, where it can be asked and nothing wraps it.

    Wrappers may know another mode only, as those of Gymnasium that change observations do.
    """
    if spec.wrappers or not spec.is_vector:
        return {}
    try:
        parameters = inspect.signature(creator).parameters
    except (TypeError, ValueError):  # a class or function of an extension module
        return {}
    return {"autoreset_mode": AutoresetMode.SAME_STEP} if "autoreset_mode" in parameters else {}


def make_environment(spec: EnvironmentSpec, construct: Callable[..., Any], num_envs: int = 1) -> Any:
    """One environment, or one vector environment, inside the specification's wrappers.

    Args:
        spec: What to make.
        construct: What ``resolve(spec)`` returned.
        num_envs: Of a vector environment.

    Raises:
        TypeError: What was made is no environment. Whatever a constructor raises comes through unchanged.
    """
    vector = {"num_envs": num_envs} if spec.is_vector else {}
    environment = _checked(construct(**vector, **spec.kwargs), spec.id)
    for wrapper in spec.wrappers:
        environment = wrapped(environment, wrapper)
    return environment


def wrapped(environment: Any, wrapper: str) -> Any:
    """An environment inside the wrapper that ``module:callable`` stands for.

    Raises:
        TypeError: What was made is no environment. Whatever the wrapper raises comes through unchanged.
    """
    return _checked(load(wrapper)(environment), wrapper)


def _checked(environment: Any, source: str) -> Any:
    if not all(callable(getattr(environment, method, None)) for method in ("reset", "step", "close")):
        raise TypeError(f"{environment!r}, which {source} returned, is no environment: it has no reset, step or close")
    return environment


def close_environment(environment: Any) -> None:
    """Closes an environment, in a thread that runs no loop where its ``close`` is a coroutine."""
    if not inspect.iscoroutinefunction(environment.close):
        environment.close()
        return
    import asyncio  # here, since a worker, which hosts no awaitable environment, has no use for it

    asyncio.run(environment.close())


def close_anyhow(close: Callable[[], None], name: str) -> None:
    """Calls, in a thread of its own, what closes an environment or a group; what that raises is logged, no more."""
    try:
        close()
    except BaseException:  # also SystemExit: it is not the thread that is to end
        logger.warning("%s raised in close", name, exc_info=True)


class EnvironmentGroup:
    """K environments, made from one specification and stepped one after the other, or by their own vectorised version.

    Whatever constructors, resets and steps raise comes through unchanged. Not thread-safe.

    Args:
        spec: Of each of them.
        num_envs: K.
        first_env: Global index of the first of them, for messages.

    Attributes:
        info: What each of them looks like.
        num_envs: K.

    Raises:
        UnsupportedSpace: The environment's spaces cannot be used.
        ConfigError: A vector environment that does not say when it resets.
        TypeError: A vector environment where a single one was to be made, or the other way round, or an awaitable one.
    """

    def __init__(self, spec: EnvironmentSpec, num_envs: int, first_env: int = 0) -> None:
        self.num_envs = num_envs
        self._environments = ExitStack()
        construct = resolve(spec)
        self._back_end: _Plain | VectorBackEnd
        try:
            if spec.is_vector:
                vector = self._make(spec, construct)
                if not isinstance(vector, VectorEnv):
                    raise TypeError(f'{vector} is no vector environment: set vectorization_mode = "sync"')
                if vector.num_envs != num_envs:
                    raise ValueError(f"{vector} has {vector.num_envs} environments, where {num_envs} were asked for")
                self.info = describe(vector)
                self._back_end = VectorBackEnd(vector, self.info, first_env)
            else:
                environments = [self._make(spec, construct) for _ in range(num_envs)]
                self.info = _describe_alike(environments)
                self._back_end = _Plain(environments, self.info, first_env)
        except BaseException:  # whatever ends the building, what was built is closed; raised again
            self._environments.close()
            raise

    def _make(self, spec: EnvironmentSpec, construct: Callable[..., Any]) -> Any:
        environment = make_environment(spec, construct, self.num_envs)
        self._environments.callback(close_environment, environment)
        return environment

    def reset(self, seeds: Sequence[int] | None = None, out: Array | None = None) -> Array:
        """Starts an episode in every environment.

        Args:
            seeds: One per environment; most vector environments take the first for all of them. None goes on with the
                generators as they are, so that a second reset does not repeat the first.
            out: Where observations are to be written, ``[K, *shape]``; None: in a new array.

        Returns:
            First observations ``[K, *shape]``.
        """
        if seeds is not None and len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments")
        return self._back_end.reset(seeds, out)

    def step(self, actions: Array, out: Array | None = None) -> Tick:
        """Steps every environment once; ``actions`` is int64 ``[K]``, ``out`` as for ``reset``."""
        if actions.shape != (self.num_envs,):
            raise ValueError(f"actions of shape {actions.shape} for {self.num_envs} environments")
        return self._back_end.step(actions, out)

    def close(self) -> None:
        """Closes every environment, whether or not closing another one raised; further calls do nothing."""
        self._environments.close()


def _describe_alike(environments: list[Any]) -> EnvironmentInfo:
    """What single environments look like, all of them the same."""
    first = environments[0]
    if isinstance(first, VectorEnv):
        raise TypeError(f'{first} is a vector environment: set vectorization_mode = "vector_entry_point"')
    info = describe(first)
    if info.is_awaitable:
        raise TypeError(f"{first} is awaitable: only the trainer's own loop hosts it, with num_env_workers = 0")
    for environment in environments[1:]:
        if describe(environment) != info:
            raise TypeError(f"{environment} has other spaces than the first environment of its group, {first}")
    return info


class _Plain:
    """Single environments, stepped in a loop: Gymnasium's SyncVectorEnv in SAME_STEP mode, without its infos."""

    def __init__(self, environments: Sequence[gymnasium.Env[Any, Any]], info: EnvironmentInfo, first_env: int) -> None:
        self._steps_and_resets = [(environment.step, environment.reset) for environment in environments]
        self._first_action = first_action(environments[0])
        self._first_env = first_env
        self._shape = info.observation.shape
        self._dtype = np.dtype(info.observation.dtype)

    def reset(self, seeds: Sequence[int] | None, out: Array | None) -> Array:
        rows = []
        for row, (_, reset) in enumerate(self._steps_and_resets):
            observation, _ = reset(seed=None if seeds is None else seeds[row])
            rows.append(observation)
        return self._stack(rows, out)

    def step(self, actions: Array, out: Array | None) -> Tick:
        rows, rewards, finals = [], [], []
        terminated = np.zeros(len(self._steps_and_resets), np.bool_)
        truncated = np.zeros(len(self._steps_and_resets), np.bool_)
        own_actions = actions + self._first_action if self._first_action else actions
        for row, ((step, reset), action) in enumerate(zip(self._steps_and_resets, own_actions, strict=True)):
            observation, reward, is_terminated, is_truncated, _ = step(action)
            if is_terminated or is_truncated:
                check_observation(observation, self._shape, self._first_env + row)
                finals.append(np.array(observation))  # the reset may reuse the buffer
                (terminated if is_terminated else truncated)[row] = True
                observation, _ = reset()
            rows.append(observation)
            rewards.append(reward)
        return Tick(
            observations=self._stack(rows, out),
            rewards=stack_rewards(rewards, self._first_env),
            terminated=terminated,
            truncated=truncated,
            final_observations=self._stack(finals),
        )

    def _stack(self, rows: list[Any], out: Array | None = None) -> Array:
        return stack_observations(rows, self._shape, self._dtype, self._first_env, out)
