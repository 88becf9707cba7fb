"""Environments made from their description, and stepped together in groups that reset themselves in one uniform way.

Autoreset, as the rest of aiorl sees it:

==================  ================================================================================================
back end            what ``EnvironmentGroup.step`` returns in the tick that ends an episode
==================  ================================================================================================
plain environments  ``same_step``: reset at once, and the next episode's first observation in ``observations``
SAME_STEP           the same
DISABLED            the same, reset by ``options={"reset_mask": ...}`` inside the tick
NEXT_STEP           ``next_step``: the final observation in ``observations``; the tick after is no transition (reward 0,
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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from aiorl.environments.rows import check_observation, stack_observations, stack_rewards
from aiorl.environments.spaces import autoreset_mode, describe, first_action

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from aiorl.environments.spaces import EnvironmentInfo, EnvironmentSpec

    Array: TypeAlias = NDArray[Any]


logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Tick:
    """What one step of a group brought.

    Attributes:
        observations: ``[K, *shape]``, from which the next actions are chosen.
        rewards: float32 ``[K]``.
        terminated: bool ``[K]``; wins where an environment sets both flags.
        truncated: bool ``[K]``; by the environment.
        final_observations: ``[E, *shape]``, in the order of ``np.flatnonzero(terminated | truncated)``.

    Arrays may be read-only. Observations and final observations may be rewritten once the group's next ``step`` or
    ``reset`` is called: whoever keeps them longer copies them.
    """

    observations: Array
    rewards: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    final_observations: Array


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

    It takes the environment's keyword arguments, and with ``"vector_entry_point"`` also ``num_envs``.

    Raises:
        gymnasium.error.UnregisteredEnv: No such Gymnasium id.
        AttributeError: The module has no such name. Whatever an import raises comes through unchanged.
    """
    for module in spec.register:
        importlib.import_module(module)
    identifier = spec.id
    if ":" in identifier:
        try:
            return _constructor(load(identifier))
        except AttributeError:
            identifier = identifier.partition(":")[2]  # Gymnasium's own way: a module that registers, and an id
            if identifier not in gymnasium.registry:
                raise
    registration = gymnasium.spec(identifier)
    if spec.vectorization_mode != "vector_entry_point":
        # The checker only warns, and costs a call per step.
        return lambda **kwargs: gymnasium.make(identifier, **{"disable_env_checker": True, **kwargs})
    entry_point = registration.vector_entry_point
    asked = {}
    if entry_point is not None:
        creator = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
        asked = _same_step(creator)
    mode = spec.vectorization_mode
    return lambda **kwargs: gymnasium.make_vec(identifier, vectorization_mode=mode, **{**asked, **kwargs})


def _constructor(callable_: Any) -> Callable[..., Any]:
    if not callable(callable_):
        raise TypeError(f"{callable_!r} is not callable")
    asked = _same_step(callable_)
    return lambda **kwargs: callable_(**{**asked, **kwargs})


def _same_step(creator: Callable[..., Any]) -> dict[str, AutoresetMode]:
    """Keyword arguments that ask a vector environment for SAME_STEP, where it can be asked."""
    try:
        parameters = inspect.signature(creator).parameters
    except (TypeError, ValueError):  # a class or function of an extension module
        return {}
    return {"autoreset_mode": AutoresetMode.SAME_STEP} if "autoreset_mode" in parameters else {}


def make_environment(spec: EnvironmentSpec, construct: Callable[..., Any], **more: Any) -> Any:
    """One environment, inside the specification's wrappers.

    Args:
        spec: What to make.
        construct: What ``resolve(spec)`` returned.
        **more: Further keyword arguments of the constructor.

    Raises:
        TypeError: What was made is no environment. Whatever a constructor raises comes through unchanged.
    """
    environment = construct(**more, **spec.kwargs)
    for wrapper in spec.wrappers:
        environment = load(wrapper)(environment)
    if not all(callable(getattr(environment, method, None)) for method in ("reset", "step", "close")):
        raise TypeError(f"{environment!r}, which {spec.id} returned, is no environment: it has no reset, step or close")
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
        self._back_end: _Plain | _Vector
        try:
            if spec.vectorization_mode == "vector_entry_point":
                vector = self._make(spec, construct, num_envs=num_envs)
                if not isinstance(vector, VectorEnv):
                    raise TypeError(f'{vector} is no vector environment: set vectorization_mode = "sync"')
                self.info = describe(vector)
                self._back_end = _Vector(vector, self.info, first_env)
            else:
                environments = [self._make(spec, construct) for _ in range(num_envs)]
                self.info = _describe_alike(environments)
                self._back_end = _Plain(environments, self.info, first_env)
        except BaseException:  # whatever ends the building, what was built is closed; raised again
            self._environments.close()
            raise

    def _make(self, spec: EnvironmentSpec, construct: Callable[..., Any], **more: Any) -> Any:
        environment = make_environment(spec, construct, **more)
        self._environments.callback(close_environment, environment)
        return environment

    def reset(self, seeds: Sequence[int] | None = None, out: Array | None = None) -> Array:
        """Starts an episode in every environment.

        Args:
            seeds: One per environment; a natively vectorised back end takes the first for all of them. None goes on
                with the generators as they are, so that a second reset does not repeat the first.
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
        own_actions = (actions + self._first_action if self._first_action else actions).tolist()
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


class _Vector:
    """One vector environment, in any of the three autoreset modes."""

    def __init__(self, environment: VectorEnv[Any, Any, Any], info: EnvironmentInfo, first_env: int) -> None:
        self._environment = environment
        self._first_env = first_env
        self._shape = info.observation.shape
        self._mode = autoreset_mode(environment)
        self._first_action = first_action(environment)
        self._dtype = np.dtype(info.observation.dtype)
        self._takes_a_seed_each = isinstance(environment.unwrapped, SyncVectorEnv | AsyncVectorEnv)
        self._ended = np.zeros(environment.num_envs, np.bool_)

    def reset(self, seeds: Sequence[int] | None, out: Array | None) -> Array:
        seed: Any = None
        if seeds is not None:
            seed = list(seeds) if self._takes_a_seed_each else seeds[0]
        self._ended = np.zeros_like(self._ended)
        observations, _ = self._environment.reset(seed=seed)
        return self._stack(observations, out)

    def step(self, actions: Array, out: Array | None) -> Tick:
        observations, rewards, terminated, truncated, infos = self._environment.step(actions + self._first_action)
        observations = self._stack(observations, out)  # a copy: the back end may reuse its own
        rewards = stack_rewards(rewards, self._first_env)
        terminated = np.array(terminated, np.bool_)
        truncated = np.array(truncated, np.bool_) & ~terminated
        if self._mode is AutoresetMode.NEXT_STEP:
            rewards[self._ended] = 0.0
            terminated[self._ended] = truncated[self._ended] = False
        self._ended = terminated | truncated
        return Tick(observations, rewards, terminated, truncated, self._finals(observations, infos))

    def _finals(self, observations: Array, infos: dict[str, Any]) -> Array:
        """Final observations ``[E, *shape]``; under DISABLED, resets what ended, in place."""
        rows = np.flatnonzero(self._ended)
        if not rows.size or self._mode is AutoresetMode.NEXT_STEP:
            return observations[rows]
        if self._mode is AutoresetMode.DISABLED:
            finals = observations[rows]
            fresh, _ = self._environment.reset(options={"reset_mask": self._ended.copy()})
            observations[rows] = self._stack(fresh)[rows]
            return finals
        if "final_obs" not in infos:
            raise ValueError(f'{self._environment} resets in the same step, and gives no infos["final_obs"]')
        for row in rows.tolist():
            check_observation(infos["final_obs"][row], self._shape, self._first_env + row)
        return self._stack([infos["final_obs"][row] for row in rows])

    def _stack(self, rows: Sequence[Any] | Array, out: Array | None = None) -> Array:
        return stack_observations(rows, self._shape, self._dtype, self._first_env, out)
