"""Action noise as a pure function of the seed, the environment and that environment's count of real steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK = 256
_WORDS_PER_BLOCK = 4  # Philox 4x64: one step of its counter gives four numbers


class ActionNoise:
    """Uniform noise in [0, 1) for the K environments of a group.

    The number for an environment's n-th real step is the n-th of a Philox 4x64 stream (Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3") whose key is (seed, global environment index). So it depends neither on the order in which groups
    are served nor on steps that are no transitions.

    Args:
        seed: The run's seed.
        first_env: Global index of the group's first environment.
        num_envs: K.
        counts: ``int64 [K]``, real steps that were drawn for before; None: none.
    """

    def __init__(self, seed: int, first_env: int, num_envs: int, counts: NDArray[np.int64] | None = None) -> None:
        self._generators = []
        start = np.zeros(num_envs, np.int64) if counts is None else counts
        for env in range(num_envs):
            philox = np.random.Philox(key=np.array([seed, first_env + env], np.uint64))
            whole, rest = divmod(int(start[env]), _WORDS_PER_BLOCK)
            philox.advance(whole)
            generator = np.random.Generator(philox)
            generator.random(rest)
            self._generators.append(generator)
        self._drawn = start.copy()  # numbers used, by environment
        self._block = np.empty((_BLOCK, num_envs))
        self._cursor = np.full(num_envs, _BLOCK)
        self._common = _BLOCK  # the cursor of all, while they agree; else -1
        self._rows = np.arange(num_envs)

    @property
    def counts(self) -> NDArray[np.int64]:
        """``int64 [K]``: how many numbers each environment has drawn, to go on from there."""
        used = self._drawn
        return used.copy() if self._common < 0 else used + (self._common - self._cursor)

    def draw(self, masked: NDArray[np.bool_] | None) -> NDArray[np.float64]:
        """``float64 [K]`` for the next step; where `masked` the step is no transition, and 0 stands in for a number."""
        if masked is None and self._common >= 0:
            if self._common == _BLOCK:
                self._settle()
                self._refill(self._rows)
            self._common += 1
            return np.array(self._block[self._common - 1])
        self._settle()
        empty = np.flatnonzero(self._cursor == _BLOCK)
        if len(empty):
            self._refill(empty)
        self._common = -1
        out: NDArray[np.float64] = self._block[self._cursor, self._rows]
        if masked is None:
            step: Any = 1
        else:
            out[masked] = 0.0
            step = ~masked
        self._cursor += step
        self._drawn += step
        return out

    def _settle(self) -> None:
        """Writes the common cursor back to each environment's own."""
        if self._common >= 0:
            self._drawn += self._common - self._cursor
            self._cursor[:] = self._common

    def _refill(self, envs: NDArray[np.int64]) -> None:
        for env in envs:
            self._block[:, env] = self._generators[env].random(_BLOCK)
        self._cursor[envs] = 0
        if len(envs) == len(self._cursor):
            self._common = 0
