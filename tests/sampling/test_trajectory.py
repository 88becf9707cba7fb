"""Sealed epochs against a reference that keeps every transition of every environment in a list of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorl.environments.make import Tick
from aiorl.environments.spaces import ArraySpec
from aiorl.sampling.pages import PagePool
from aiorl.sampling.track import GroupTrack
from aiorl.sampling.trajectory import SealedEpoch, TrajectoryBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aiorl.sampling.track import Landing, Segment


# ---------------------------------------------------------------------- the reference
@dataclass(eq=False)
class Row:
    """A transition."""

    tick: int
    observation: list[float]
    action: int
    log_prob: float
    reward: float
    terminated: bool
    truncated: bool
    version: int
    following: list[float]  # the true next observation
    kept_at: int | None = None  # the tick that made it worth keeping
    dropped: bool = False
    learned: bool = False
    cut: bool = False  # its trajectory is cut after it

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated


class Environment:
    """What happened in one environment, and which of it is worth learning from. Plain loops over lists."""

    def __init__(self, minimum: int, maximum: int, next_step: bool) -> None:
        self.minimum, self.maximum, self.next_step = minimum, maximum, next_step
        self.rows: list[Row] = []
        self.masked = False
        self.carried = self.accepted = False

    def episode(self) -> list[Row]:
        """The rows of the open episode, or of the one that ended last."""
        rows: list[Row] = []
        for row in reversed(self.rows):
            if row.ended and rows:
                break
            rows.insert(0, row)
        return rows

    def since_cut(self) -> int:
        """Transitions of the open trajectory."""
        count = 0
        for row in reversed(self.rows):
            if row.ended or row.cut:
                break
            count += 1
        return count

    def land(self, row: Row) -> tuple[int, int]:
        """A transition; returns the rows that it made worth keeping and the rows that it showed not to be."""
        if self.masked:
            self.masked = False
            return 0, 0
        if self.rows and self.rows[-1].ended:
            self.carried = self.accepted = False
        self.rows.append(row)
        if not row.ended and self.since_cut() == self.maximum:
            row.cut = True
        episode = self.episode()
        young = [row for row in episode if row.kept_at is None]
        self.masked = self.next_step and row.ended
        if self.accepted or len(episode) >= self.minimum:
            for row_of in young:
                row_of.kept_at = row.tick
            self.accepted = True
            return len(young), 0
        if row.ended:
            for row_of in young:
                row_of.dropped = True
            return 0, len(young)
        return 0, 0

    def seal(self, boundary: int) -> tuple[list[list[Row]], int]:
        """The trajectories of the epoch that ends before tick `boundary`, and how many of their rows were carried over."""
        num_carried = 0
        young = [row for row in self.rows if row.kept_at is None and not row.dropped and row.tick < boundary]
        if young and self.carried:
            for row in young:
                row.kept_at = boundary - 1
            num_carried = len(young)
            self.accepted = True
        elif young:
            self.carried = True
        trajectories: list[list[Row]] = []
        previous: Row | None = None
        for row in self.rows:
            if row.learned or row.kept_at is None or row.kept_at >= boundary:
                continue
            row.learned = True
            if previous is None or previous.ended or previous.cut:
                trajectories.append([])
            trajectories[-1].append(row)
            previous = row
        if previous is not None and not previous.ended:
            previous.cut = True
        return trajectories, num_carried


def batch_of(trajectories: Sequence[tuple[int, list[Row]]]) -> dict[str, Any]:
    """The fields of a batch, as lists."""
    fields: dict[str, Any] = {name: [] for name in FIELDS}
    for env, rows in trajectories:
        fields["environments"].append(env)
        fields["starts"].append(len(fields["rewards"]))
        fields["lengths"].append(len(rows))
        for row in rows:
            at = len(fields["rewards"])
            fields["observations"].append(row.observation)
            fields["actions"].append(row.action)
            fields["log_probs"].append(row.log_prob)
            fields["rewards"].append(row.reward)
            fields["terminated"].append(row.terminated)
            fields["truncated"].append(row.truncated)
            fields["versions"].append(row.version)
            fields["ends"].append(row is rows[-1])
            if row.ended:
                fields["final_rows"].append(at)
                fields["final_observations"].append(row.following)
            if row is rows[-1] and not row.terminated:
                fields["bootstrap_rows"].append(at)
                fields["bootstrap_observations"].append(row.following)
    return fields


FIELDS = (
    "observations", "actions", "log_probs", "rewards", "terminated", "truncated", "versions", "ends", "starts", "lengths",
    "environments", "bootstrap_rows", "bootstrap_observations", "final_rows", "final_observations",
)  # fmt: skip


# ---------------------------------------------------------------------- both, side by side
class Pair:
    """A group's track and its reference, fed with the same random ticks."""

    def __init__(self, rng: np.random.Generator, pool: PagePool, first_env: int, size: int, **options: Any) -> None:
        self.rng, self.size, self.first_env = rng, size, first_env
        self.next_step: bool = options["next_step"]
        self.track = GroupTrack(
            pool,
            num_envs=size,
            first_env=first_env,
            min_trajectory_length=options["minimum"],
            max_trajectory_length=options["maximum"],
            next_step=self.next_step,
        )
        self.environments = [Environment(options["minimum"], options["maximum"], self.next_step) for _ in range(size)]
        self.end_rate: float = options["end_rate"]
        self.observations = self.random(size)
        self.track.begin(self.observations)
        self.num_landed = self.boundary = 0
        self.seal_promised: int | None = None
        self.written: tuple[NDArray[Any], ...] | None = None

    def random(self, *shape: int) -> NDArray[np.float32]:
        return self.rng.random((*shape, 2)).astype(np.float32)

    def write(self) -> None:
        """A step goes out."""
        self.track.reserve()
        masked = [environment.masked for environment in self.environments]
        assert masked == (self.track.masked.tolist() if self.track.masked is not None else [False] * self.size)
        self.seal_promised = self.track.adds()
        self.written = (
            self.rng.integers(0, 4, self.size),
            self.rng.random(self.size).astype(np.float32),
            self.rng.integers(0, 9, self.size),
        )
        self.track.write(*self.written)

    def land(self) -> Landing:
        """It comes back."""
        assert self.written is not None
        actions, log_probs, versions = self.written
        masked = np.array([environment.masked for environment in self.environments])
        ended = (self.rng.random(self.size) < self.end_rate) & ~masked
        terminated = ended & (self.rng.random(self.size) < 0.5)
        rewards = np.where(masked, 0, self.rng.integers(-5, 6, self.size)).astype(np.float32)
        observations, finals = self.random(self.size), self.random(self.size)
        if self.next_step:
            finals = np.where(ended[:, None], observations, finals)
        tick = Tick(observations, rewards, terminated, ended & ~terminated, finals[ended])
        adds = dropped = 0
        expected = []
        for env, environment in enumerate(self.environments):
            row = Row(
                self.num_landed,
                self.observations[env].tolist(),
                int(actions[env]),
                float(log_probs[env]),
                float(rewards[env]),
                bool(terminated[env]),
                bool(ended[env] and not terminated[env]),
                int(versions[env]),
                (finals if ended[env] else observations)[env].tolist(),
            )
            kept, lost = environment.land(row)
            adds, dropped = adds + kept, dropped + lost
            if ended[env]:
                episode = environment.episode()
                expected.append((len(episode), sum(row.reward for row in episode)))
        landing = self.track.land(tick)
        assert (landing.adds, landing.dropped) == (adds, dropped)
        assert list(zip(landing.lengths, landing.returns, strict=True)) == expected
        if self.seal_promised is not None:
            assert landing.adds == self.seal_promised
        self.observations = observations
        self.num_landed += 1
        self.written = None
        return landing

    def seal(self, boundary: int) -> tuple[Segment, list[tuple[int, list[Row]]]]:
        trajectories, num_carried = [], 0
        for env, environment in enumerate(self.environments):
            own, carried = environment.seal(boundary)
            num_carried += carried
            trajectories += [(self.first_env + env, rows) for rows in own]
        num_transitions = sum(
            self.boundary <= row.tick < boundary for environment in self.environments for row in environment.rows
        )
        segment = self.track.seal(boundary)
        assert segment.num_ticks == boundary - self.boundary
        assert segment.num_transitions == num_transitions
        assert segment.num_carried == num_carried
        self.seal_promised = None  # a seal may have changed what the outstanding step will add
        self.boundary = boundary
        return segment, trajectories


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    minimum=st.sampled_from([1, 1, 2, 3, 6]),
    extra=st.integers(0, 8),
    next_step=st.booleans(),
    page_ticks=st.integers(1, 7),
    end_rate=st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]),
    num_steps=st.integers(1, 60),
)
def test_batches_are_what_happened(
    seed: int,
    sizes: list[int],
    minimum: int,
    extra: int,
    next_step: bool,
    page_ticks: int,
    end_rate: float,
    num_steps: int,
) -> None:
    rng = np.random.default_rng(seed)
    pool = PagePool(10_000, ArraySpec((2,), "float32"), with_keep=minimum > 1, page_ticks=page_ticks)
    pairs, first = [], 7
    for size in sizes:
        options = {"minimum": minimum, "maximum": minimum + extra, "next_step": next_step, "end_rate": end_rate}
        pairs.append(Pair(rng, pool, first, size, **options))
        first += size
    for _ in range(num_steps * len(pairs)):
        pair = pairs[rng.integers(len(pairs))]
        if pair.written is None:
            pair.write()
        if rng.random() < 0.8:
            pair.land()
        if rng.random() < 0.1:
            seal_and_compare(pairs, pool, rng)
    seal_and_compare(pairs, pool, rng)
    for pair in pairs:
        pair.track.close()
    assert pool.num_used == 0


def seal_and_compare(pairs: list[Pair], pool: PagePool, rng: np.random.Generator) -> None:
    segments, trajectories = [], []
    for pair in pairs:
        boundary = pair.num_landed if rng.random() < 0.5 else int(rng.integers(pair.boundary, pair.num_landed + 1))
        if not boundary:
            continue
        segment, own = pair.seal(boundary)
        segments.append(segment)
        trajectories += own
    sealed = SealedEpoch(1, segments, [], [], 0, 0, 0, 0, 0.0)
    if trajectories:  # an epoch has rows
        batch = sealed.gather()
        assert all(len(rows) <= pairs[0].environments[0].maximum for _, rows in trajectories)
        for name, expected in batch_of(trajectories).items():
            found = getattr(batch, name)
            if name.startswith("final_"):  # in the order of time, not of rows
                found = found[np.argsort(batch.final_rows)]
            assert len(found) == len(expected), name
            assert found.tolist() == expected, name
        assert batch.observations.dtype == batch.bootstrap_observations.dtype == np.float32
        assert batch.bootstrap_observations.shape[1:] == batch.final_observations.shape[1:] == (2,)
    sealed.release(pool)


# ---------------------------------------------------------------------- a batch by itself
def a_batch() -> TrajectoryBatch:
    """By hand: environment 3 ends and is cut at the seal, environment 4 is truncated."""
    return TrajectoryBatch(
        observations=np.arange(10, dtype=np.float32).reshape(5, 2),
        actions=np.arange(5),
        log_probs=np.zeros(5, np.float32),
        rewards=np.ones(5, np.float32),
        terminated=np.array([False, True, False, False, False]),
        truncated=np.array([False, False, False, False, True]),
        versions=np.zeros(5, np.int64),
        ends=np.array([False, True, True, False, True]),
        starts=np.array([0, 2, 3]),
        lengths=np.array([2, 1, 2]),
        environments=np.array([3, 3, 4]),
        bootstrap_rows=np.array([2, 4]),
        bootstrap_observations=np.zeros((2, 2), np.float32),
        final_rows=np.array([1, 4]),
        final_observations=np.zeros((2, 2), np.float32),
    )


def test_next_values_by_hand() -> None:
    batch = a_batch()
    batch.set_values(np.array([1, 2, 3, 4, 5], np.float32), np.array([30, 50], np.float32))
    # within a trajectory the next row's value; nothing after termination; the bootstrap after a cut and a truncation
    assert batch.next_values.tolist() == [2, 0, 30, 5, 50]


def test_trajectories_are_views() -> None:
    batch = a_batch()
    batch.set_values(np.arange(5, dtype=np.float32), np.zeros(2, np.float32))
    batch.extras["advantages"] = np.arange(5, dtype=np.float32)
    one, two, three = batch.trajectories()
    assert [(t.environment, t.start, len(t)) for t in (one, two, three)] == [(3, 0, 2), (3, 2, 1), (4, 3, 2)]
    assert three.actions.tolist() == [3, 4]
    assert three.truncated.tolist() == [False, True]
    assert two.extras["advantages"].tolist() == [2]
    three.rewards[1] = 9
    assert batch.rewards.tolist() == [1, 1, 1, 1, 9]


def test_a_replaced_trajectory_is_written_over_its_rows() -> None:
    batch = a_batch()
    batch.set_values(np.zeros(5, np.float32), np.zeros(2, np.float32))
    _, _, old = batch.trajectories()
    _, _, new = batch.trajectories()
    new.rewards = new.rewards * 3
    new.extras["bonus"] = np.array([[1, 2], [3, 4]], np.float32)
    batch.replace(old, new)
    assert batch.rewards.tolist() == [1, 1, 1, 3, 3]
    assert batch.extras["bonus"].tolist() == [[0, 0], [0, 0], [0, 0], [1, 2], [3, 4]]
    new.extras["bonus"] += 1
    batch.replace(old, new)
    assert batch.extras["bonus"][3:].tolist() == [[2, 3], [4, 5]]


def test_a_replacement_keeps_its_length() -> None:
    batch = a_batch()
    one, two, _ = batch.trajectories()
    with pytest.raises(ValueError, match="must keep its 2 transitions, not have 1"):
        batch.replace(one, two)


def test_releasing_without_gathering_gives_the_pages_back() -> None:
    pool = PagePool(10, ArraySpec((2,), "float32"), with_keep=False, page_ticks=2)
    pair = Pair(np.random.default_rng(0), pool, 0, 3, minimum=1, maximum=9, next_step=False, end_rate=0.1)
    for _ in range(4):
        pair.write()
        pair.land()
    segment, _ = pair.seal(4)
    sealed = SealedEpoch(1, [segment], [], [], 12, 0, 0, 4, 0.0)
    assert sealed.num_transitions == 12
    assert sealed.num_carried == 0
    assert pool.num_used == 2
    sealed.release(pool)
    sealed.release(pool)  # there is nothing left to give back
    assert pool.num_used == 0
