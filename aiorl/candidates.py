"""Which numbers of workers and environments are worth measuring, in what order, and which of them is taken. No I/O.

    in process, twice as many environments each time ──► one worker, four times as many ──► 2, 4, ... workers, up to the cores

A step up that brings less than 5 % ends that climb. Of all that was measured, the smallest number of environments is taken
that reaches 90 % of the best: more of them make trajectories shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aiorl.environments.config import EnvironmentConfig
    from aiorl.sampling.config import SamplingConfig

_GAIN: Final = 1.05  # a step up that brings less is the last one
_NEAR: Final = 0.9  # of the best: fast enough
_FIRST_LOCAL, _FIRST_REMOTE = 4, 2
_LOCAL_FACTOR, _REMOTE_FACTOR = 2, 4
_DEFAULT_ENVS: Final = 16
_NO_LIMIT: Final = 2**31


@dataclass(frozen=True, slots=True)
class Choice:
    """Numbers for ``[task.environment]``.

    Attributes:
        num_env_workers: 0 = in process.
        envs_per_worker: Environments of each.
        groups_per_worker: Groups of each; "auto" where that is left to the rule.
    """

    num_env_workers: int
    envs_per_worker: int
    groups_per_worker: int | Literal["auto"]

    @property
    def num_envs(self) -> int:
        """Of all workers."""
        return max(1, self.num_env_workers) * self.envs_per_worker

    def __str__(self) -> str:
        """As one would write it."""
        return ", ".join(
            f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}"
            for name, value in (
                ("num_env_workers", self.num_env_workers),
                ("envs_per_worker", self.envs_per_worker),
                ("groups_per_worker", self.groups_per_worker),
            )
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """A choice, and the environment steps per second that it sampled."""

    choice: Choice
    steps_per_s: float


class Space:
    """What may be chosen.

    Args:
        environment: Numbers that it has are kept; those that are "auto" are chosen.
        sampling: Says how many environments an epoch has room for, and how many a batch needs.
        num_cores: Workers at most.

    Attributes:
        most_envs: Environments at most, of all workers together.
    """

    def __init__(self, environment: EnvironmentConfig, sampling: SamplingConfig, *, num_cores: int) -> None:
        self.most_envs = sampling.most_envs
        self._environment = environment
        self._least_envs = sampling.min_batch_size
        self._num_cores = num_cores
        self._most_local = _NO_LIMIT
        self._only_local = False
        both = environment.num_env_workers == environment.envs_per_worker == "auto"
        self.measures_groups = both and environment.groups_per_worker == "auto"

    def limit(self, *, most_local: int, only_local: bool) -> None:
        """Keeps what steps in process to `most_local` environments, and all of it there where nothing else can host it."""
        self._most_local = most_local
        self._only_local = only_local

    def workers(self) -> list[int]:
        """Numbers of workers, ascending: 0, then powers of two, then the cores."""
        given = self._environment.num_env_workers
        if given != "auto":
            return [given]
        if self._only_local:
            return [0]
        doubled = [2**power for power in range(self._num_cores.bit_length()) if 2**power <= self._num_cores]
        return sorted({0, *doubled, self._num_cores})

    def envs(self, num_env_workers: int) -> list[int]:
        """Environments per worker, ascending; empty where this number of workers cannot be had."""
        environment, parts = self._environment, max(1, num_env_workers)
        groups = environment.groups_per_worker
        least = max(1 if groups == "auto" else groups, -(-self._least_envs // parts))
        most = self.most_envs // parts
        if environment.envs_per_worker != "auto":
            given = environment.envs_per_worker
            fits = given >= least and (given <= most or num_env_workers in (0, 1))
            return [given] if fits and (num_env_workers or given <= self._most_local or self._must_be_local) else []
        if num_env_workers == 0 and not self._must_be_local:
            most = min(most, self._most_local)
        if environment.num_env_workers != "auto":
            most = max(most, least)  # it was asked for so many workers
        first, factor = (_FIRST_REMOTE, _REMOTE_FACTOR) if num_env_workers else (_FIRST_LOCAL, _LOCAL_FACTOR)
        found = [min(max(first, least), most)] if least <= most else []
        while found and found[-1] < most:
            found.append(min(found[-1] * factor, most))
        return found

    @property
    def _must_be_local(self) -> bool:
        return self._only_local or self._environment.num_env_workers == 0

    def groups(self, num_env_workers: int, envs_per_worker: int) -> int | Literal["auto"]:
        """Groups that are measured first: two for a worker, so that one steps while the other is answered."""
        if not self.measures_groups:
            return self._environment.groups_per_worker
        return 2 if num_env_workers and envs_per_worker > 1 else 1

    def default(self, *, slow: bool, in_process: bool) -> Choice:
        """What is taken where nothing is measured: the cores' worth of workers for slow environments.

        Args:
            slow: Whether the environments are: then each worker gets as few as keep it busy.
            in_process: Whether everything is to step in this process.
        """
        given = self._environment
        workers, envs, groups = given.num_env_workers, given.envs_per_worker, given.groups_per_worker
        num_workers = workers if workers != "auto" else 0 if in_process else min(self._num_cores, self.most_envs)
        parts = max(1, num_workers)
        least = max(1 if groups == "auto" else groups, -(-self._least_envs // parts))
        usual = _FIRST_REMOTE if slow and num_workers else _DEFAULT_ENVS
        return Choice(num_workers, max(least, min(usual, self.most_envs // parts)) if envs == "auto" else envs, groups)


async def search(space: Space, measure: Callable[[Choice], Awaitable[float | None]]) -> list[Measured]:
    """Measures what is worth it, from cheap to costly.

    Args:
        space: What may be chosen.
        measure: Environment steps per second of a choice; None ends the search.

    Returns:
        What was measured.
    """
    found: list[Measured] = []
    before: list[Measured] = []  # with the last number of workers
    for workers in space.workers():
        sizes = space.envs(workers)
        if workers > 1 and before and len(sizes) > 1:  # a worker does best with what it did best with
            sizes = [min(chosen(before).envs_per_worker, sizes[-1])]
        here: list[Measured] = []
        for envs in sizes:
            choice = Choice(workers, envs, space.groups(workers, envs))
            rate = await measure(choice)
            if rate is None:
                return found
            here.append(Measured(choice, rate))
            found.append(here[-1])
            if len(here) > 1 and rate < _GAIN * here[-2].steps_per_s:
                break
        if workers > 1 and before and _best(here) < _GAIN * _best(before):
            break
        before = here if workers else []
    return [*found, *await _single_group(space, found, measure)]


async def _single_group(
    space: Space, found: Sequence[Measured], measure: Callable[[Choice], Awaitable[float | None]]
) -> list[Measured]:
    """The best choice with one group per worker: better where the trainer's thread, not waiting, is the limit."""
    if not space.measures_groups or not found:
        return []
    best = chosen(found)
    if best.groups_per_worker != 2:
        return []
    choice = Choice(best.num_env_workers, best.envs_per_worker, 1)
    rate = await measure(choice)
    return [] if rate is None else [Measured(choice, rate)]


def _best(measured: Sequence[Measured]) -> float:
    return max((each.steps_per_s for each in measured), default=0.0)


def chosen(measured: Sequence[Measured]) -> Choice:
    """Of what was measured, the fewest environments that reach 90 % of the best; then the faster."""
    enough = [each for each in measured if each.steps_per_s >= _NEAR * _best(measured)]
    return min(enough, key=lambda each: (each.choice.num_envs, -each.steps_per_s)).choice
