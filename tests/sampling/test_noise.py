from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorl.sampling.noise import ActionNoise

if TYPE_CHECKING:
    from numpy.typing import NDArray


def stream(seed: int, env: int, count: int) -> NDArray[np.float64]:
    """The published definition: numbers of the Philox stream whose key is (seed, environment)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, env], np.uint64))).random(count)


def test_each_environment_has_the_stream_of_its_own_key() -> None:
    noise = ActionNoise(1337, 5, 3)
    drawn = np.array([noise.draw(None) for _ in range(600)])  # across the blocks that are drawn ahead
    assert drawn.shape == (600, 3)
    assert drawn.dtype == np.float64
    for row in range(3):
        assert drawn[:, row].tolist() == stream(1337, 5 + row, 600).tolist()


def test_numbers_are_uniform_and_below_one() -> None:
    drawn = np.array([ActionNoise(0, 0, 2000).draw(None), ActionNoise(1, 0, 2000).draw(None)])
    assert 0.0 <= drawn.min() < 0.01
    assert 0.99 < drawn.max() < 1.0
    assert abs(drawn.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(drawn)[0, 1]) < 0.1  # seeds next to each other


def test_environments_and_seeds_do_not_share_numbers() -> None:
    drawn = [tuple(ActionNoise(seed, env, 1).draw(None)) for seed in range(5) for env in range(5)]
    assert len(set(drawn)) == 25


def test_grouping_does_not_matter() -> None:
    together = ActionNoise(7, 0, 4)
    apart = [ActionNoise(7, 0, 1), ActionNoise(7, 1, 3)]
    for _ in range(300):
        assert together.draw(None).tolist() == [number for noise in apart for number in noise.draw(None).tolist()]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**63 - 1),
    size=st.integers(1, 4),
    mask_rate=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    num_steps=st.integers(0, 700),
    restarts=st.sets(st.integers(0, 700), max_size=4),
)
def test_masked_steps_draw_nothing_and_a_restart_goes_on(
    seed: int, size: int, mask_rate: float, num_steps: int, restarts: set[int]
) -> None:
    rng = np.random.default_rng([seed, size])
    expected = [iter(stream(seed, 3 + env, num_steps)) for env in range(size)]
    noise = ActionNoise(seed, 3, size)
    counts = np.zeros(size, np.int64)
    for number in range(num_steps):
        if number in restarts:
            noise = ActionNoise(seed, 3, size, noise.counts)
        masked = rng.random(size) < mask_rate
        drawn = noise.draw(masked if masked.any() else None)
        assert drawn.tolist() == [0.0 if masked[env] else next(expected[env]) for env in range(size)]
        counts += ~masked
        assert noise.counts.tolist() == counts.tolist()


def test_counts_are_of_their_moment() -> None:
    noise = ActionNoise(0, 0, 2)
    noise.draw(np.array([False, True]))
    before = noise.counts
    noise.draw(np.array([False, True]))
    noise.draw(None)
    assert before.tolist() == [1, 0]
    start = noise.counts
    ActionNoise(0, 0, 2, start).draw(None)
    assert start.tolist() == [3, 1]


@pytest.mark.parametrize("masked", [None, np.array([False, True])])
def test_numbers_handed_out_are_not_written_over(masked: NDArray[np.bool_] | None) -> None:
    noise = ActionNoise(0, 0, 2)
    first = noise.draw(masked)
    copy = first.copy()
    for _ in range(600):
        noise.draw(masked)
    assert first.tolist() == copy.tolist()
