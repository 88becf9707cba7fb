"""Shared memory through which a worker's process hands large observations to the trainer: an exchange, not storage.

    worker                                                 trainer
    Step s arrives ─► begun = s ─► rows ─► finished = s ── Observed s ──► both are s? ─► rows are copied out
          ▲                                                                                       │
          └─────────────────────────────── Step s + 1 ◄── both are still s? ◄─────────────────────┘

A slab is a memfd, one for each incarnation of a worker, whose descriptor the process inherits: it has no name, so that
nothing is left when both ends are gone, however they ended. It holds, for each group, two stamps, K rows of observations
and room for K final ones. A worker that was stopped, replaced and continued still has its own slab, and writes into
nobody's rows.

The trainer sizes a slab once the worker has described its environments, and seals it, so that no end can pull memory
away under the other. Before the first ``Reset`` a worker finds it sized, or empty: then rows travel in messages, as they
do where there is no memfd. Offsets and lengths follow from descriptions on either side; none is read from memory.
Dimensions: K environments of a group.
"""

from __future__ import annotations

import fcntl
import logging
import math
import mmap
import os
import sys
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiorl.errors import MalformedMessage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aiorl.environments.spaces import ArraySpec

logger = logging.getLogger(__name__)

MIN_BYTES: Final = 32 * 1024
"""Observations of a group below which a message carries them. By ``benchmarks/slab.py`` the two ways cost the same up to
16 KiB; at 32 a slab takes 15 % less of both ends' processor time, at 1 MiB 85 %."""

MAX_BYTES: Final = 2**36
"""Of a slab: a worker that describes more is not believed."""

_STAMPS_BYTES: Final = 64
"""Two integers, and what is left of their cache line."""


class Exchange:
    """One group's stamps and rows, at either end. Not thread-safe; the two ends take turns by messages.

    Args:
        memory: The slab.
        offset: Of the group's part, in bytes.
        num_envs: K.
        observation: Of one environment.

    Attributes:
        observations: ``[K, *shape]``.
        final_observations: ``[K, *shape]``, of which the first E are those of the last tick.
    """

    def __init__(self, memory: mmap.mmap, offset: int, num_envs: int, observation: ArraySpec) -> None:
        self._stamps = np.ndarray(2, np.uint64, memory, offset)  # begun, finished
        shape = (2 * num_envs, *observation.shape)
        rows: NDArray[Any] = np.ndarray(shape, observation.dtype, memory, offset + _STAMPS_BYTES)
        self.observations, self.final_observations = rows[:num_envs], rows[num_envs:]

    def begin(self, sequence: int) -> NDArray[Any]:
        """Has the worker write: the answer to message ``sequence``, into ``observations``, which are returned."""
        self._stamps[0] = sequence
        return self.observations

    def finish(self, sequence: int, final_observations: NDArray[Any]) -> None:
        """Adds the final observations ``[E, *shape]`` to the observations that are written."""
        self.final_observations[: len(final_observations)] = final_observations
        self._stamps[1] = sequence

    def check(self, sequence: int) -> None:
        """Raises ``MalformedMessage`` unless the rows are the answer to message ``sequence``, and nothing but."""
        if self._stamps.tolist() != [sequence, sequence]:
            begun, finished = self._stamps.tolist()
            raise MalformedMessage(
                f"rows are stamped {begun} and {finished} instead of {sequence}: the worker wrote out of turn"
            )

    def drop(self) -> None:
        """Lets go of the memory; of no further use."""
        del self._stamps, self.observations, self.final_observations


class Slab:
    """The trainer's end of one incarnation's shared memory; empty at first.

    Attributes:
        descriptor: For the worker's process to inherit.

    Raises:
        OSError: There is no such memory to be had.
    """

    def __init__(self) -> None:
        if sys.platform != "linux" or not hasattr(os, "memfd_create"):
            raise OSError("this system has no memfd_create")
        self.descriptor = os.memfd_create("aiorl-slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._exchanges: list[Exchange] = []

    def share(self, observation: ArraySpec, group_sizes: Sequence[int]) -> list[Exchange]:
        """Sizes and seals the memory, where the rows of a group are large enough for that.

        Args:
            observation: Of one environment.
            group_sizes: K of each group.

        Returns:
            An exchange for each group; none where rows are to travel in messages.
        """
        *offsets, size = _offsets(observation, group_sizes)
        if max(group_sizes) * _row_bytes(observation) < MIN_BYTES or size > MAX_BYTES:
            return []
        try:
            os.ftruncate(self.descriptor, size)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            memory = mmap.mmap(self.descriptor, size)
        except (OSError, ValueError) as error:  # the worker, which has the descriptor too, was here before
            logger.warning("%d bytes cannot be shared with a worker: %s", size, error)
            return []
        self._exchanges = _exchanges(memory, offsets, observation, group_sizes)
        return self._exchanges

    def release(self) -> None:
        """Lets go of the memory, once the worker's process has been waited for; further calls do nothing.

        Memory is unmapped with the last array that views it, never under one.
        """
        if self.descriptor < 0:
            return
        os.close(self.descriptor)
        self.descriptor = -1
        while self._exchanges:
            self._exchanges.pop().drop()


def open_slab() -> Slab | None:
    """A slab, or None where there is no such memory to be had."""
    try:
        return Slab()
    except OSError as error:
        logger.info("observations travel in messages: %s", error)
        return None


def attach(descriptor: int, observation: ArraySpec, group_sizes: Sequence[int]) -> list[Exchange]:
    """The worker's end: an exchange for each group; none where the trainer left the slab empty.

    Raises:
        ValueError: It is smaller than such groups need.
        OSError: It cannot be mapped.
    """
    if os.fstat(descriptor).st_size == 0:
        return []
    *offsets, size = _offsets(observation, group_sizes)
    return _exchanges(mmap.mmap(descriptor, size), offsets, observation, group_sizes)


def _row_bytes(observation: ArraySpec) -> int:
    return math.prod(observation.shape) * np.dtype(observation.dtype).itemsize


def _offsets(observation: ArraySpec, group_sizes: Sequence[int]) -> list[int]:
    """Where each group's part begins, at a page of its own, and where the last one ends, in bytes."""
    offsets = [0]
    for num_envs in group_sizes:
        end = offsets[-1] + _STAMPS_BYTES + 2 * num_envs * _row_bytes(observation)
        offsets.append(-(-end // mmap.PAGESIZE) * mmap.PAGESIZE)
    return offsets


def _exchanges(
    memory: mmap.mmap, offsets: Sequence[int], observation: ArraySpec, group_sizes: Sequence[int]
) -> list[Exchange]:
    places = zip(offsets, group_sizes, strict=True)
    return [Exchange(memory, offset, num_envs, observation) for offset, num_envs in places]
