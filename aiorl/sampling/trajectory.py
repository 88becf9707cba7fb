"""A sealed epoch, and the batch of trajectories that a task learns from.

Dimensions: B rows of an epoch, n trajectories, m trajectories that are bootstrapped, f episodes that ended, T ticks, K environments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from aiorl.sampling.pages import CUT, TERMINATED, TRUNCATED

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from aiorl.sampling.pages import PagePool
    from aiorl.sampling.track import Segment


_ROW_NAMES = (
    "observations",
    "actions",
    "log_probs",
    "rewards",
    "terminated",
    "truncated",
    "versions",
    "values",
    "next_values",
)


@dataclass(slots=True)
class Trajectory:
    """Consecutive transitions of one environment, from a start or a cut to the next episode end or cut: views of a batch's rows.

    Attributes:
        environment: Global index of the environment.
        start: The batch's row at which it starts.
        observations: ``[L, *shape]``.
        actions: ``int64 [L]``.
        log_probs: ``float32 [L]``, of the actions under the weights that chose them.
        rewards: ``float32 [L]``.
        terminated: ``bool [L]``.
        truncated: ``bool [L]``, by the environment.
        versions: ``int64 [L]``, policy versions that chose the actions.
        values: ``float32 [L]``.
        next_values: ``float32 [L]``.
        extras: What a task added, each ``[L, ...]``.
    """

    environment: int
    start: int
    observations: NDArray[Any]
    actions: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    rewards: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    versions: NDArray[np.int64]
    values: NDArray[np.float32]
    next_values: NDArray[np.float32]
    extras: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        """L, the number of transitions."""
        return len(self.rewards)


@dataclass(slots=True)
class TrajectoryBatch:
    """The rows of an epoch, trajectory after trajectory.

    Attributes:
        observations: ``[B, *shape]``, as the environment gave them.
        actions: ``int64 [B]``.
        log_probs: ``float32 [B]``, of the actions under the weights that chose them.
        rewards: ``float32 [B]``.
        terminated: ``bool [B]``.
        truncated: ``bool [B]``, by the environment; never where terminated.
        versions: ``int64 [B]``, policy versions that chose the actions.
        ends: ``bool [B]``, the last row of its trajectory.
        starts: ``int64 [n]``, first row of each trajectory.
        lengths: ``int64 [n]``, rows of each trajectory.
        environments: ``int64 [n]``, global index of each trajectory's environment.
        bootstrap_rows: ``int64 [m]``, the last rows of trajectories that end without termination.
        bootstrap_observations: ``[m, *shape]``, the true next observations of those rows.
        final_rows: ``int64 [f]``, rows at which episodes ended, terminated ones included.
        final_observations: ``[f, *shape]``, the final observations of those episodes.
        values: ``float32 [B]``, of the observations, under the weights at the start of the update.
        next_values: ``float32 [B]``, of the next observations; 0 after termination.
        extras: What preparation and tasks add: advantages, returns, ...; each ``[B, ...]``.
    """

    observations: NDArray[Any]
    actions: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    rewards: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    versions: NDArray[np.int64]
    ends: NDArray[np.bool_]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    environments: NDArray[np.int64]
    bootstrap_rows: NDArray[np.int64]
    bootstrap_observations: NDArray[Any]
    final_rows: NDArray[np.int64]
    final_observations: NDArray[Any]
    values: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    next_values: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    extras: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        """B, the number of rows."""
        return len(self.rewards)

    def set_values(self, values: NDArray[np.float32], bootstrap_values: NDArray[np.float32]) -> None:
        """Notes the value of every row (``[B]``) and of every bootstrap observation (``[m]``), and derives `next_values`."""
        self.values = values
        self.next_values = np.zeros_like(values)
        self.next_values[:-1] = values[1:]
        self.next_values[self.ends] = 0.0
        self.next_values[self.bootstrap_rows] = bootstrap_values

    def replace(self, old: Trajectory, new: Trajectory) -> None:
        """Writes `new` over the rows of `old`, which is one of `trajectories`.

        Raises:
            ValueError: They differ in length.
        """
        if len(new) != len(old):
            raise ValueError(f"a postprocessed trajectory must keep its {len(old)} transitions, not have {len(new)}")
        for name in _ROW_NAMES:
            target, source = getattr(old, name), getattr(new, name)
            if target is not source:
                target[...] = source
        for name, rows in new.extras.items():
            column = self.extras.get(name)
            if column is None:
                column = self.extras[name] = np.zeros((len(self), *rows.shape[1:]), rows.dtype)
            column[old.start : old.start + len(old)] = rows

    def trajectories(self) -> Iterator[Trajectory]:
        """Each trajectory as views: what is written into them is written into the batch."""
        for environment, start, length in zip(
            self.environments.tolist(), self.starts.tolist(), self.lengths.tolist(), strict=True
        ):
            rows = slice(start, start + length)
            yield Trajectory(
                environment,
                start,
                self.observations[rows],
                self.actions[rows],
                self.log_probs[rows],
                self.rewards[rows],
                self.terminated[rows],
                self.truncated[rows],
                self.versions[rows],
                self.values[rows],
                self.next_values[rows],
                {name: rows_of[rows] for name, rows_of in self.extras.items()},
            )


@dataclass(slots=True)
class SealedEpoch:
    """A complete epoch on its way to the learner.

    Attributes:
        epoch: Its number, from 1.
        segments: Each group's share, in the order of their environments.
        returns: Returns of the episodes that ended in it.
        lengths: Their lengths in transitions.
        num_rows: Transitions kept.
        num_dropped: Transitions dropped because their episode was too short.
        num_late: Kept transitions whose step was late.
        num_ticks: Steps of whole groups.
        sample_s: Seconds from its first grant to its seal.
    """

    epoch: int
    segments: Sequence[Segment]
    returns: list[float]
    lengths: list[int]
    num_rows: int
    num_dropped: int
    num_late: int
    num_ticks: int
    sample_s: float

    @property
    def num_transitions(self) -> int:
        """Real transitions that happened in it, kept or not."""
        return sum(segment.num_transitions for segment in self.segments)

    @property
    def num_carried(self) -> int:
        """Transitions of young episodes that were carried over one seal and are used now."""
        return sum(segment.num_carried for segment in self.segments)

    def gather(self) -> TrajectoryBatch:
        """Copies the rows out of the pages, trajectory after trajectory. The pages may be released after it."""
        parts = [_gather(segment) for segment in self.segments if segment.pieces]
        rows = np.cumsum([0, *(len(part["rewards"]) for part in parts)])
        joined = {
            name: np.concatenate([part[name] for part in parts]) for name in parts[0] if not name.endswith("_rows")
        }
        for name in ("cut_rows", "final_rows"):
            joined[name] = np.concatenate([part[name] + row for part, row in zip(parts, rows, strict=False)])
        return _batch(joined)

    def release(self, pool: PagePool) -> None:
        """Gives the pages back, once: after `gather`, or instead of it."""
        for segment in self.segments:
            for piece in segment.pieces:
                pool.release(piece.page)
            segment.pieces.clear()


def _gather(segment: Segment) -> dict[str, NDArray[Any]]:
    """A group's rows, environment after environment."""
    pieces = segment.pieces
    counts = [piece.stop - piece.start for piece in pieces]
    num_ticks, num_envs = sum(counts), pieces[0].page.flags.shape[1]
    offsets = np.cumsum([0, *counts])
    take = None
    if any(piece.take is not None for piece in pieces):
        take = np.ones((num_ticks, num_envs), np.bool_)
        for piece, offset in zip(pieces, offsets, strict=False):
            if piece.take is not None:
                take[offset : offset + piece.stop - piece.start] = piece.take
        take = take.T

    def column(name: str) -> NDArray[Any]:
        first = getattr(pieces[0].page, name)
        out = np.empty((num_envs, num_ticks, *first.shape[2:]), first.dtype)
        for piece, offset, count in zip(pieces, offsets, counts, strict=False):
            out[:, offset : offset + count] = getattr(piece.page, name)[piece.start : piece.stop].swapaxes(0, 1)
        return out[take] if take is not None else out.reshape(num_envs * num_ticks, *first.shape[2:])

    # where each (environment, tick) lies among the rows, and how many rows each environment has
    index = (
        np.arange(num_envs * num_ticks).reshape(num_envs, num_ticks)
        if take is None
        else take.cumsum().reshape(take.shape) - 1
    )
    per_env = np.full(num_envs, num_ticks) if take is None else take.sum(axis=1)
    flags = column("flags")
    last = np.cumsum(per_env)[per_env > 0] - 1  # the last row of each environment
    ends = (flags & (TERMINATED | TRUNCATED | CUT)) != 0
    open_at_seal = last[(flags[last] & (TERMINATED | TRUNCATED)) == 0]
    ends[last] = True
    environments = np.repeat(np.arange(segment.first_env, segment.first_env + num_envs), per_env)
    finals = [
        (index[envs, offset + row - piece.start], observations)
        for piece, offset in zip(pieces, offsets, strict=False)
        for row, envs, observations in _finals(piece)
    ]
    observations = column("observations")
    return {
        "observations": observations,
        "actions": column("actions"),
        "log_probs": column("log_probs"),
        "rewards": column("rewards"),
        "versions": column("versions"),
        "flags": flags,
        "ends": ends,
        "environment_of": environments,
        "cut_rows": open_at_seal,
        "cut_observations": segment.next_observations[environments[open_at_seal] - segment.first_env],
        "final_rows": np.concatenate([rows for rows, _ in finals]) if finals else np.empty(0, np.int64),
        "final_observations": np.concatenate([rows for _, rows in finals]) if finals else observations[:0],
    }


def _finals(piece: Any) -> Iterator[tuple[int, NDArray[np.int64], NDArray[Any]]]:
    """The episode ends among the rows of `piece`."""
    for row, envs, observations in piece.page.finals:
        if not piece.start <= row < piece.stop:
            continue
        if piece.take is None:
            yield row, envs, observations
        else:
            kept = piece.take[row - piece.start, envs]
            yield row, envs[kept], observations[kept]


def _batch(rows: Mapping[str, NDArray[Any]]) -> TrajectoryBatch:
    """Derives trajectories and bootstraps from the rows of every group."""
    flags, ends = rows["flags"], rows["ends"]
    terminated, truncated = (flags & TERMINATED) != 0, (flags & TRUNCATED) != 0
    last = np.flatnonzero(ends)
    starts = np.concatenate([[0], last[:-1] + 1]) if len(last) else np.empty(0, np.int64)
    following = np.empty_like(rows["observations"], shape=(len(last), *rows["observations"].shape[1:]))
    where = np.full(len(ends), -1)
    where[last] = np.arange(len(last))
    inside = np.flatnonzero(ends[:-1] & ((flags[:-1] & CUT) != 0))  # cut by length: the next row is what follows
    following[where[inside]] = rows["observations"][inside + 1]
    following[where[rows["final_rows"]]] = rows["final_observations"]
    following[where[rows["cut_rows"]]] = rows["cut_observations"]
    open_ended = ~terminated[last]
    return TrajectoryBatch(
        observations=rows["observations"],
        actions=rows["actions"],
        log_probs=rows["log_probs"],
        rewards=rows["rewards"],
        terminated=terminated,
        truncated=truncated,
        versions=rows["versions"],
        ends=ends,
        starts=starts,
        lengths=last - starts + 1,
        environments=rows["environment_of"][starts],
        bootstrap_rows=last[open_ended],
        bootstrap_observations=following[open_ended],
        final_rows=rows["final_rows"],
        final_observations=rows["final_observations"],
    )
