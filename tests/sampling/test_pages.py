"""Pages, their pool, and a group's track by hand. Whole epochs are compared with a reference in test_trajectory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from aiorl.environments.make import Tick
from aiorl.environments.spaces import ArraySpec
from aiorl.sampling.pages import CUT, REAL, TERMINATED, TRUNCATED, PagePool
from aiorl.sampling.track import GroupTrack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiorl.sampling.track import Landing, Segment

OBSERVATION = ArraySpec((), "float64")


def pool_of(capacity: int = 100, *, page_ticks: int = 4, with_keep: bool = False) -> PagePool:
    return PagePool(capacity, OBSERVATION, with_keep=with_keep, page_ticks=page_ticks)


def track_of(
    pool: PagePool, num_envs: int, *, minimum: int = 1, maximum: int = 100, next_step: bool = False
) -> GroupTrack:
    """A track whose observations are the number of the tick, a hundred higher for each environment."""
    track = GroupTrack(
        pool,
        num_envs=num_envs,
        first_env=0,
        min_trajectory_length=minimum,
        max_trajectory_length=maximum,
        next_step=next_step,
    )
    track.begin(100.0 * np.arange(num_envs))
    return track


def write(track: GroupTrack) -> None:
    track.reserve()
    zeros = np.zeros(track.num_envs)
    track.write(zeros.astype(np.int64), zeros.astype(np.float32), zeros.astype(np.int64))


def land(track: GroupTrack, number: int, ended: Sequence[int] = (), *, truncated: bool = False) -> Landing:
    """The step number `number`, from 1, lands; the episodes of the environments `ended` end in it."""
    flags = np.isin(np.arange(track.num_envs), ended)
    none = np.zeros(track.num_envs, np.bool_)
    observations = number + 100.0 * np.arange(track.num_envs)
    observations.flags.writeable = False  # an array of a message's frame
    rewards = np.ones(track.num_envs, np.float32)
    if track.masked is not None:
        rewards[track.masked] = 0.0
    return track.land(
        Tick(
            observations,
            rewards,
            none if truncated else flags,
            flags if truncated else none,
            observations[flags] + 0.5,
        )
    )


def step(track: GroupTrack, number: int, ended: Sequence[int] = (), **options: Any) -> Landing:
    write(track)
    return land(track, number, ended, **options)


def rows_of(segment: Segment) -> list[list[float]]:
    """The observations of its rows, tick by tick."""
    rows = []
    for piece in segment.pieces:
        for at in range(piece.start, piece.stop):
            own = piece.page.observations[at]
            rows.append((own if piece.take is None else own[piece.take[at - piece.start]]).tolist())
    return [row for row in rows if row]


def release(pool: PagePool, segment: Segment) -> None:
    for piece in segment.pieces:
        pool.release(piece.page)


# ---------------------------------------------------------------------- the pool
def test_a_page_comes_back_when_its_last_holder_gives_it_up() -> None:
    pool = pool_of(2)
    page = pool.acquire(3)
    page.holds += 1
    pool.release(page)
    assert pool.num_used == 1
    pool.release(page)
    assert pool.num_used == 0


def test_pages_are_used_again_and_clean() -> None:
    pool = pool_of(with_keep=True)
    page = pool.acquire(2)
    page.flags[:] = REAL | CUT
    assert page.keep is not None
    page.keep[:] = 7
    page.num_wanted = 0
    page.finals.append((0, np.arange(1), np.zeros(1)))
    pool.release(page)
    assert pool.acquire(3) is not page  # of another width
    assert pool.acquire(2) is page
    assert not page.flags.any()
    assert (page.keep < 0).all()
    assert page.num_wanted == 8
    assert page.finals == []
    assert page.holds == 1


def test_an_exhausted_pool_is_a_fault_of_ours_and_says_so() -> None:
    pool = pool_of(1)
    pool.acquire(1)
    with pytest.raises(AssertionError, match="all 1 pages are in use"):
        pool.acquire(1)


def test_a_page_has_the_observations_shape_and_dtype() -> None:
    page = PagePool(1, ArraySpec((3, 2), "uint8"), with_keep=False, page_ticks=5).acquire(4)
    assert page.observations.shape == (5, 4, 3, 2)
    assert page.observations.dtype == np.uint8
    names = [page.actions.dtype.name, page.log_probs.dtype.name, page.rewards.dtype.name]
    assert names == ["int64", "float32", "float32"]
    assert page.keep is None


def test_the_usual_capacity_is_an_epoch_and_a_few() -> None:
    capacity = PagePool.capacity_for(
        group_sizes=[8, 8], num_epoch_samples=2048, min_trajectory_length=1, max_policy_lag=0
    )
    assert capacity == 9 + 2 * 3  # ceil(2056 / (32 * 8)), and the partly filled pages of two groups


# ---------------------------------------------------------------------- stepping
def test_a_step_has_its_page_before_it_is_asked_for() -> None:
    pool = pool_of(page_ticks=2)
    track = track_of(pool, 1)
    track.reserve()
    track.reserve()
    assert pool.num_used == 1
    step(track, 1)
    step(track, 2)
    assert pool.num_used == 1
    track.reserve()
    assert pool.num_used == 2


def test_rows_hold_what_was_observed_before_the_step_and_paid_after_it() -> None:
    pool = pool_of()
    track = track_of(pool, 2)
    step(track, 1)
    step(track, 2, [1])
    step(track, 3, [0], truncated=True)
    segment = track.seal(3)
    [piece] = segment.pieces
    assert rows_of(segment) == [[0, 100], [1, 101], [2, 102]]
    assert piece.page.flags[:3].tolist() == [[REAL, REAL], [REAL, REAL | TERMINATED], [REAL | TRUNCATED, REAL]]
    assert piece.page.rewards[:3].tolist() == [[1, 1]] * 3
    assert [(row, envs.tolist(), rows.tolist()) for row, envs, rows in piece.page.finals] == [
        (1, [1], [102.5]),
        (2, [0], [3.5]),
    ]
    assert segment.next_observations.tolist() == [3, 103]
    assert (segment.num_ticks, segment.num_transitions, segment.num_carried) == (3, 6, 0)


def test_the_returns_and_lengths_of_episodes_run_across_seals_and_cuts() -> None:
    pool = pool_of()
    track = track_of(pool, 2, maximum=2)
    for number in range(1, 6):
        assert step(track, number).lengths == []
        release(pool, track.seal(number))
    landing = step(track, 6, [0, 1])
    assert (landing.returns, landing.lengths) == ([6.0, 6.0], [6, 6])
    landing = step(track, 7, [1])
    assert (landing.returns, landing.lengths) == ([1.0], [1])


def test_the_empty_step_of_a_next_step_autoreset_is_no_transition() -> None:
    pool = pool_of()
    track = track_of(pool, 2, next_step=True)
    assert track.masked is None
    assert track.adds() == 2
    step(track, 1, [1])
    assert track.masked is not None
    assert track.masked.tolist() == [False, True]
    assert track.adds() == 1
    landing = step(track, 2)
    assert landing.adds == 1
    assert track.masked is None
    landing = step(track, 3, [1])
    assert (landing.adds, landing.lengths, landing.returns) == (2, [1], [1.0])
    segment = track.seal(3)
    assert rows_of(segment) == [[0, 100], [1], [2, 102]]
    assert segment.num_transitions == 5


def test_a_trajectory_is_cut_at_its_maximum_and_the_episode_goes_on() -> None:
    pool = pool_of(page_ticks=8)
    track = track_of(pool, 2, maximum=3)
    step(track, 1, [1])
    for number in range(2, 8):
        step(track, number)
    flags = track.seal(7).pieces[0].page.flags[:7]
    assert np.flatnonzero(flags[:, 0] & CUT).tolist() == [2, 5]
    assert np.flatnonzero(flags[:, 1] & CUT).tolist() == [3, 6]  # counted from its start
    assert np.flatnonzero(flags & TERMINATED).tolist() == [1]


def test_a_seal_starts_trajectories_anew() -> None:
    pool = pool_of(page_ticks=8)
    track = track_of(pool, 1, maximum=3)
    step(track, 1)
    step(track, 2)
    track.seal(2)
    for number in range(3, 7):
        step(track, number)
    flags = track.seal(6).pieces[0].page.flags[:6]
    assert np.flatnonzero(flags & CUT).tolist() == [4]  # three after the seal, not three after the start


def test_an_end_at_the_maximum_is_an_end_and_no_cut() -> None:
    pool = pool_of()
    track = track_of(pool, 1, maximum=2)
    step(track, 1)
    step(track, 2, [0])
    assert track.seal(2).pieces[0].page.flags[:2].tolist() == [[REAL], [REAL | TERMINATED]]


# ---------------------------------------------------------------------- seals
def test_trajectories_of_a_late_step_are_cut_at_the_observation_it_was_sent_from() -> None:
    pool = pool_of(page_ticks=2)
    track = track_of(pool, 2)
    step(track, 1)
    step(track, 2)
    write(track)
    segment = track.seal(2)
    assert segment.next_observations.tolist() == [2, 102]
    release(pool, segment)
    land(track, 3)
    segment = track.seal(3)
    assert rows_of(segment) == [[2, 102]]
    assert segment.next_observations.tolist() == [3, 103]


def test_a_seal_may_lie_behind_what_has_landed() -> None:
    pool = pool_of(page_ticks=2)
    track = track_of(pool, 1)
    for number in range(1, 6):
        step(track, number)
    segment = track.seal(3)
    assert rows_of(segment) == [[0], [1], [2]]
    assert segment.next_observations.tolist() == [3]
    assert rows_of(track.seal(5)) == [[3], [4]]


def test_a_seal_without_a_tick_of_its_own_hands_out_nothing() -> None:
    pool = pool_of()
    track = track_of(pool, 1)
    step(track, 1)
    release(pool, track.seal(1))
    segment = track.seal(1)
    assert segment.pieces == []
    assert (segment.num_ticks, segment.num_transitions) == (0, 0)


def test_pages_are_given_up_when_track_and_learner_are_done_with_them() -> None:
    pool = pool_of(page_ticks=2)
    track = track_of(pool, 1)
    for number in range(1, 4):
        step(track, number)
    segment = track.seal(3)
    assert pool.num_used == 2  # the full one is the learner's, the other is shared
    release(pool, segment)
    assert pool.num_used == 1
    track.close()
    assert pool.num_used == 0


# ---------------------------------------------------------------------- episodes with a minimum length
def test_young_rows_are_worth_keeping_all_at_once() -> None:
    pool = pool_of(with_keep=True)
    track = track_of(pool, 2, minimum=3)
    assert [track.adds(), step(track, 1).adds] == [0, 0]
    assert [track.adds(), step(track, 2).adds] == [0, 0]
    assert [track.adds(), step(track, 3, [1]).adds] == [6, 6]  # also where the third is the last
    assert [track.adds(), step(track, 4).adds] == [1, 1]
    assert rows_of(track.seal(4)) == [[0, 100], [1, 101], [2, 102], [3]]


def test_rows_of_too_short_episodes_are_dropped_and_counted_as_transitions_only() -> None:
    pool = pool_of(with_keep=True)
    track = track_of(pool, 2, minimum=3)
    step(track, 1)
    landing = step(track, 2, [1])
    assert (landing.adds, landing.dropped, landing.lengths, landing.returns) == (0, 2, [2], [2.0])
    step(track, 3)
    segment = track.seal(3)
    assert rows_of(segment) == [[0], [1], [2]]
    assert segment.num_transitions == 6


def test_the_short_tail_of_a_long_episode_is_kept() -> None:
    pool = pool_of(with_keep=True)
    track = track_of(pool, 1, minimum=3)
    for number in range(1, 4):
        step(track, number)
    release(pool, track.seal(3))
    landing = step(track, 4, [0])
    assert (landing.adds, landing.dropped) == (1, 0)
    assert rows_of(track.seal(4)) == [[3]]


def test_a_young_episode_is_carried_over_one_seal_and_used_at_the_second() -> None:
    pool = pool_of(page_ticks=2, with_keep=True)
    track = track_of(pool, 1, minimum=5)
    step(track, 1)
    assert track.seal(1).pieces == []
    step(track, 2)
    segment = track.seal(2)
    assert rows_of(segment) == [[0], [1]]
    assert (segment.num_carried, segment.num_transitions) == (2, 1)
    release(pool, segment)
    assert track.adds() == 1  # it is as good as old from now on
    landing = step(track, 3, [0])
    assert (landing.adds, landing.dropped, landing.lengths) == (1, 0, [3])
    assert step(track, 4, [0]).dropped == 1  # the next episode starts afresh


def test_an_episode_that_ended_young_is_not_used_for_having_been_carried() -> None:
    pool = pool_of(with_keep=True)
    track = track_of(pool, 1, minimum=5)
    step(track, 1)
    track.seal(1)
    assert step(track, 2, [0]).dropped == 2
    assert track.seal(2).pieces == []


def test_a_carried_episode_that_grows_old_is_one_trajectory_across_the_seal() -> None:
    pool = pool_of(with_keep=True)
    track = track_of(pool, 1, minimum=3, maximum=4)
    step(track, 1)
    step(track, 2)
    track.seal(2)
    assert step(track, 3).adds == 3
    step(track, 4)
    segment = track.seal(4)
    assert rows_of(segment) == [[0], [1], [2], [3]]
    assert segment.num_carried == 0
    flags = segment.pieces[0].page.flags
    assert np.flatnonzero(flags & CUT).tolist() == [3]  # the maximum counts from its start too


def test_rows_after_the_seal_at_which_an_episode_is_used_wait_for_its_next_step() -> None:
    pool = pool_of(with_keep=True)
    track = track_of(pool, 1, minimum=9)
    step(track, 1)
    track.seal(1)
    for number in range(2, 5):
        step(track, number)
    segment = track.seal(2)
    assert rows_of(segment) == [[0], [1]]
    assert segment.num_carried == 2
    release(pool, segment)
    assert track.adds() == 3
    assert step(track, 5).adds == 3
    assert rows_of(track.seal(5)) == [[2], [3], [4]]


def test_pages_of_dropped_rows_are_given_up_at_once_and_their_transitions_counted_at_the_seal() -> None:
    pool = pool_of(4, page_ticks=2, with_keep=True)
    track = track_of(pool, 2, minimum=2)
    step(track, 1)
    step(track, 2)  # a page with rows worth keeping
    for number in range(3, 1003):
        step(track, number, [0, 1])
        assert pool.num_used <= 3
    segment = track.seal(1002)
    assert segment.num_transitions == 2 * 1002
    assert rows_of(segment) == [[0, 100], [1, 101], [2, 102]]
