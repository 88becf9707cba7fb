from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorl.tasks.returns import discounted_scan, explained_variance, gae

# Three trajectories in one batch: two rows that terminate, one row that is truncated, two rows that are cut.
REWARDS = np.array([1, 2, 1, 0, 3], np.float32)
VALUES = np.array([1, 1, 2, 1, 2], np.float32)
NEXT_VALUES = np.array([1, 99, 4, 2, 2], np.float32)
TERMINATED = np.array([0, 1, 0, 0, 0], np.bool_)
ENDS = np.array([0, 1, 1, 0, 1], np.bool_)


def test_scan_by_hand() -> None:
    sums = discounted_scan(np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.5, 0.5]))
    assert sums.tolist() == [2.75, 3.5, 3.0]  # 3; 2 + 3 / 2; 1 + 3.5 / 2


def test_scan_stops_where_the_decay_is_zero() -> None:
    sums = discounted_scan(np.array([1.0, 2.0, 4.0, 8.0]), np.array([1.0, 0.0, 1.0, 0.0]))
    assert sums.tolist() == [3.0, 2.0, 12.0, 8.0]


@pytest.mark.parametrize("length", [0, 1])
def test_scan_of_next_to_nothing(length: int) -> None:
    assert discounted_scan(np.full(length, 7.0), np.full(length, 0.9)).tolist() == [7.0] * length


def test_scan_leaves_its_arguments_alone() -> None:
    deltas, decays = np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.5, 0.0])
    discounted_scan(deltas, decays)
    assert deltas.tolist() == [1.0, 2.0, 3.0]
    assert decays.tolist() == [0.5, 0.5, 0.0]


def test_scan_sums_in_float64() -> None:
    # Beside a number that large float32 has no quarters.
    deltas = np.array([0.25, 0.25, 2.0**25], np.float32)
    assert discounted_scan(deltas, np.ones(3, np.float32)).tolist() == [2.0**25 + 0.5, 2.0**25 + 0.25, 2.0**25]


@pytest.mark.parametrize("shapes", [((3,), (2,)), ((3, 1), (3, 1)), ((), ())])
def test_scan_refuses_what_is_no_pair_of_vectors(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="two vectors of one length"):
        discounted_scan(np.ones(shapes[0]), np.ones(shapes[1]))


def test_gae_by_hand() -> None:
    advantages, returns = gae(REWARDS, VALUES, NEXT_VALUES, TERMINATED, ENDS, gamma=0.5, gae_lambda=0.5)
    # terminated: delta = 2 - 1 = 1 whatever follows, before it 1 + 0.5 * 1 - 1 = 0.5, plus 0.25 * 1
    # truncated:  delta = 1 + 0.5 * 4 - 2 = 1
    # cut:        delta = 3 + 0.5 * 2 - 2 = 2, before it 0 + 0.5 * 2 - 1 = 0, plus 0.25 * 2
    assert advantages.tolist() == [0.75, 1.0, 1.0, 0.5, 2.0]
    assert returns.tolist() == [1.75, 2.0, 3.0, 1.5, 4.0]
    assert advantages.dtype == returns.dtype == np.float32


def test_a_terminal_state_is_worth_nothing_even_where_its_value_is_not_a_number() -> None:
    next_values = np.where(TERMINATED, np.float32(np.nan), NEXT_VALUES)
    advantages, _ = gae(REWARDS, VALUES, next_values, TERMINATED, ENDS, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [0.75, 1.0, 1.0, 0.5, 2.0]


def test_gae_at_the_extremes_of_lambda() -> None:
    one_step, _ = gae(REWARDS, VALUES, NEXT_VALUES, TERMINATED, ENDS, gamma=1.0, gae_lambda=0.0)
    assert one_step.tolist() == [1.0, 1.0, 3.0, 1.0, 3.0]  # r + V' - V
    _, whole = gae(REWARDS, VALUES, NEXT_VALUES, TERMINATED, ENDS, gamma=1.0, gae_lambda=1.0)
    assert whole.tolist() == [3.0, 2.0, 5.0, 5.0, 5.0]  # rewards to the end, and the value there unless terminal


def test_gae_refuses_arrays_of_other_lengths() -> None:
    with pytest.raises(ValueError, match="of one length"):
        gae(REWARDS, VALUES, NEXT_VALUES[:-1], TERMINATED, ENDS, gamma=0.99, gae_lambda=0.95)


def scan_by_loop(deltas: list[float], decays: list[float]) -> list[float]:
    following, sums = 0.0, []
    for delta, decay in zip(reversed(deltas), reversed(decays), strict=True):
        following = delta + decay * following
        sums.append(following)
    return sums[::-1]


def gae_by_definition(
    rewards: list[float],
    values: list[float],
    next_values: list[float],
    terminated: list[bool],
    ends: list[bool],
    gamma: float,
    gae_lambda: float,
) -> list[float]:
    """Equation 16 of the paper as it stands, a sum over the rows that follow within the trajectory."""
    advantages = []
    for row in range(len(rewards)):
        total = 0.0
        for later in range(row, len(rewards)):
            following = 0.0 if terminated[later] else gamma * next_values[later]
            total += (gamma * gae_lambda) ** (later - row) * (rewards[later] + following - values[later])
            if ends[later]:
                break
        advantages.append(total)
    return advantages


numbers = st.floats(-100, 100, width=32)
shares = st.floats(0, 1, width=32)


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, st.one_of(st.just(0.0), shares)), max_size=300))
def test_scan_equals_the_plain_loop(rows: list[tuple[float, float]]) -> None:
    deltas, decays = [row[0] for row in rows], [row[1] for row in rows]
    sums = discounted_scan(np.array(deltas), np.array(decays))
    assert np.allclose(sums, scan_by_loop(deltas, decays), rtol=1e-9, atol=1e-9)


row_of_trajectory = st.tuples(numbers, numbers, numbers, st.sampled_from(["on", "on", "on", "terminated", "cut"]))


@settings(deadline=None)
@given(st.lists(row_of_trajectory, min_size=1, max_size=60), shares, shares)
def test_gae_equals_its_definition(rows: list[tuple[float, float, float, str]], gamma: float, lam: float) -> None:
    rewards, values, next_values = [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]
    terminated = [row[3] == "terminated" for row in rows]
    ends = [row[3] != "on" for row in rows[:-1]] + [True]
    expected = np.array(gae_by_definition(rewards, values, next_values, terminated, ends, gamma, lam))
    advantages, returns = gae(
        np.array(rewards), np.array(values), np.array(next_values), np.array(terminated), np.array(ends), gamma, lam
    )
    assert np.allclose(advantages, expected, rtol=1e-9, atol=1e-6)
    assert np.allclose(returns, expected + np.array(values), rtol=1e-9, atol=1e-6)


def test_explained_variance_by_hand() -> None:
    returns = np.array([0, 2, 4, 6], np.float32)  # variance 5
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(np.full(4, 17, np.float32), returns) == 0.0
    assert explained_variance(np.array([1, 1, 5, 5], np.float32), returns) == pytest.approx(0.8)  # residual variance 1
    assert explained_variance(-returns, returns) == -3.0


@pytest.mark.parametrize("returns", [[], [2.0], [3.0, 3.0]])
def test_explained_variance_of_returns_that_do_not_vary(returns: list[float]) -> None:
    assert math.isnan(explained_variance(np.zeros(len(returns)), np.array(returns)))
