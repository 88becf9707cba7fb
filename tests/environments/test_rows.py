from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from aiorl.environments.rows import check_observation, stack_observations, stack_rewards

FLOAT32 = np.dtype(np.float32)


def test_observations_are_copied_into_one_array_of_the_space_s_type() -> None:
    rows = [np.array([1.0, 2.0]), [3, 4], np.array([5, 6], np.int8)]
    stacked = stack_observations(rows, (2,), FLOAT32, 0)
    assert stacked.dtype == np.float32
    assert stacked.tolist() == [[1, 2], [3, 4], [5, 6]]
    buffer = np.zeros(2, np.float32)
    assert not np.shares_memory(stack_observations([buffer], (2,), FLOAT32, 0), buffer)
    assert stack_observations([], (2,), FLOAT32, 0).shape == (0, 2)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([np.zeros(3), np.zeros(5), np.zeros(4)], r"environment 7 gave an observation of shape \(3,\)"),
        ([np.zeros(4), np.zeros(3), np.zeros(5)], r"environment 8 gave an observation of shape \(3,\)"),
        ([np.zeros((2, 2))] * 3, r"environment 7 gave an observation of shape \(2, 2\)"),
        ([np.zeros(4), np.zeros(4), None], r"environment 9 gave an observation of shape \(\)"),
        (["abcd"] * 3, r"environment 7 gave an observation of shape \(\)"),
        ([np.zeros(4), [[1, 2], [3]], np.zeros(4)], "environment 8 gave an observation that is no array"),
    ],
)
def test_rows_of_other_shapes_are_refused(rows: list[Any], told: str) -> None:
    for out in (None, np.zeros((3, 4), np.float32)):
        with pytest.raises(ValueError, match=told):
            stack_observations(rows, (4,), FLOAT32, 7, out)


def test_rows_of_another_type_are_refused() -> None:
    for row in (list("abcd"), [1j] * 4, [None] * 4):
        check_observation(row, (4,), 0)
        for out in (None, np.zeros((1, 4), np.float32)):
            with pytest.raises(TypeError, match="same_kind"):
                stack_observations([row], (4,), FLOAT32, 0, out)


def test_observations_are_written_where_they_are_to_lie() -> None:
    out = np.zeros((2, 2, 3), np.float32)
    whole = np.arange(12.0).reshape(2, 2, 3)
    for rows in (whole, list(whole), [row.astype(np.uint8) for row in whole], [row.tolist() for row in whole]):
        out[:] = -1
        assert stack_observations(rows, (2, 3), FLOAT32, 0, out) is out
        assert (out == whole).all()
    with pytest.raises(TypeError, match="same_kind"):
        stack_observations(whole, (2, 3), np.dtype(np.uint8), 0, np.zeros((2, 2, 3), np.uint8))


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1.5, 2, True, np.float64(3), np.array(4.0)], [1.5, 2, 1, 3, 4]),
        ([np.array([1.0]), 2.0, np.array([[3]])], [1, 2, 3]),
        ([np.array([1.0]), np.array([2.0])], [1, 2]),
        ([Decimal("0.5"), 2**70], [0.5, 2.0**70]),
        ([float("nan"), float("inf"), -float("inf")], [np.nan, np.inf, -np.inf]),
    ],
)
def test_rewards_are_numbers(rewards: list[Any], expected: list[float]) -> None:
    stacked = stack_rewards(rewards, 0)
    assert stacked.dtype == np.float32
    assert stacked.shape == (len(rewards),)
    np.testing.assert_array_equal(stacked, np.array(expected, np.float32))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_reward_beyond_float32_is_infinite() -> None:
    assert stack_rewards([1e39, -1e39], 0).tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize("reward", [None, "1.0", b"1", "nan", 1j, {}, np.zeros(2), np.zeros(0), object(), 10**400])
def test_a_reward_that_is_no_number_is_refused(reward: Any) -> None:
    for rewards in ([1.0, reward], [1.0, reward, 2.0], [1, reward, np.ones(1)]):
        with pytest.raises(ValueError, match=r"environment 6 gave the reward .* which is not a number"):
            stack_rewards(rewards, 5)
