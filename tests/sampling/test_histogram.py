from __future__ import annotations

import dataclasses
import math

import pytest

from aiorl.sampling.histogram import Histogram


def test_nothing_is_known_of_an_empty_histogram() -> None:
    distribution = Histogram().distribution()
    assert distribution.count == 0
    assert all(math.isnan(value) for value in dataclasses.astuple(distribution)[1:])


def test_small_whole_numbers_are_exact() -> None:
    histogram = Histogram()
    for value in range(1, 11):
        histogram.add(value)
    distribution = histogram.distribution()
    assert (distribution.count, distribution.mean, distribution.max) == (10, 5.5, 10)
    assert (distribution.p50, distribution.p90, distribution.p99) == (5, 9, 10)


def test_percentiles_are_within_a_bucket_of_the_truth_over_twelve_orders_of_magnitude() -> None:
    values = [10 ** (exponent / 100) for exponent in range(-600, 601)]  # 1e-6 to 1e6, evenly in the logarithm
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    distribution = histogram.distribution()
    assert distribution.p50 == pytest.approx(1.0, rel=0.1)
    assert distribution.p90 == pytest.approx(10**4.8, rel=0.1)
    assert distribution.p99 == pytest.approx(10**5.88, rel=0.1)
    assert distribution.max == 10**6
    assert distribution.mean == pytest.approx(sum(values) / len(values))


def test_values_outside_of_the_buckets_are_counted_in_the_outermost() -> None:
    histogram = Histogram()
    for value in (0.0, 1e-12, 1e12):
        histogram.add(value)
    distribution = histogram.distribution()
    assert (distribution.count, distribution.max) == (3, 1e12)
    assert distribution.p50 == pytest.approx(0, abs=1e-9)
    assert distribution.p99 == 1e12


def test_a_distribution_is_frozen_and_later_values_do_not_change_it() -> None:
    histogram = Histogram()
    histogram.add(1)
    distribution = histogram.distribution()
    histogram.add(3)
    assert distribution.max == 1
    with pytest.raises(AttributeError):
        distribution.max = 2  # type: ignore[misc]
