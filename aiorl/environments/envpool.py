"""EnvPool as a vector environment of Gymnasium's kind. The package is optional: it is imported where it is needed.

EnvPool's own is one already, but for its seeds, which are given when it is made. An episode that ended is reset in the
step after: EnvPool ignores the action of that step, pays 0, sets no flag and observes the next episode's start, while
the step that ended the episode observes its true end. Where an episode ends by itself in the last step that its time
limit allows, EnvPool reports a truncation.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final

from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from aiorl.errors import ConfigError, Fault

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_NOT_GIVEN: Final = {
    "seed": "each environment gets a seed of its own, derived from task.environment.env_seed",
    "env_seed": "each environment gets a seed of its own, derived from task.environment.env_seed",
    "batch_size": "the environments of a group step together",
}
"""Arguments of ``envpool.make`` that are not the configuration's to give, and why."""


class EnvPoolVectorEnv(VectorEnv[Any, Any, Any]):
    """K environments of EnvPool, stepped by its threads.

    Args:
        identifier: One of ``envpool.list_all_envs()``.
        num_envs: K.
        **kwargs: Of ``envpool.make``, for example ``num_threads`` or ``reward_clip``.

    Raises:
        ConfigError: EnvPool is not installed, has no such environment, or does not take an argument here.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - declared so by VectorEnv

    def __init__(self, identifier: str, num_envs: int = 1, **kwargs: Any) -> None:
        known = _import_envpool().list_all_envs()
        if identifier not in known:
            near = get_close_matches(identifier, known, n=3)
            remedy = f"did you mean {' or '.join(near)}?" if near else "envpool.list_all_envs() lists what it has"
            raise ConfigError([Fault("task.environment.id", "is unknown to EnvPool", f'"{identifier}"', remedy)])
        for name in kwargs.keys() & _NOT_GIVEN.keys():
            remedy = f"leave it out: {_NOT_GIVEN[name]}"
            raise ConfigError([Fault(f"task.environment.kwargs.{name}", "is not given to EnvPool here", None, remedy)])
        self.num_envs = num_envs
        self._identifier = identifier
        self._kwargs = kwargs
        self._pool: Any = None
        with _quiet():
            described = _import_envpool().make_spec(identifier, num_envs=num_envs, **kwargs)
            self.single_observation_space = described.gymnasium_observation_space
            self.single_action_space = described.gymnasium_action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.spec = EnvSpec(identifier, max_episode_steps=described.config.max_episode_steps)

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts an episode in every environment, in a new pool where seeds are given.

        Args:
            seed: One for all, or one per environment.
            options: EnvPool has none that resets all of them.
        """
        with _quiet():
            if seed is not None or self._pool is None:
                self._pool = None  # joins its threads
                seeded = {} if seed is None else {"seed": seed if isinstance(seed, int) else list(seed)}
                self._pool = _import_envpool().make(
                    self._identifier, env_type="gymnasium", num_envs=self.num_envs, **self._kwargs, **seeded
                )
            observations, infos = self._pool.reset()
        return observations, infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Steps every environment once; one whose episode ended in the step before is reset instead."""
        observations, rewards, terminated, truncated, infos = self._pool.step(actions)
        return observations, rewards, terminated, truncated, infos

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the pool and its threads."""
        self._pool = None


def _import_envpool() -> Any:
    try:
        import envpool
    except ImportError as error:
        remedy = 'pip install "aiorl[envpool]"'
        what = f"needs the package envpool, which cannot be imported: {error}"
        raise ConfigError([Fault("task.environment.vectorization_mode", what, '"envpool"', remedy)]) from error
    return envpool


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Gymnasium's warning that the bounds of EnvPool's spaces are of another precision than the spaces."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*precision lowered by casting", category=UserWarning)
        yield
