from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from aiorl.monitoring.catalogue import GROUPS, METRICS
from aiorl.monitoring.metrics import (
    EpisodeWindow,
    EpochRecord,
    WeightedMeans,
    depends_on_clock,
    find_metric,
    metrics_page,
)


def record(**metrics: float | None) -> EpochRecord:
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    return EpochRecord.make(epoch=3, num_samples=6144, time_s=1.5, metrics=named)


def test_the_page_is_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text() == metrics_page(), "run: python -m aiorl.monitoring.metrics > docs/metrics.md"


def test_every_name_is_once_in_a_documented_group_and_keeps_the_endings() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.group in GROUPS
        assert metric.name.endswith("_s") == (metric.unit == "s" or metric.unit.endswith("/s"))
        assert metric.name.endswith("_per_s") == metric.unit.endswith("/s")
        assert not (metric.group in ("learner", "episode") and depends_on_clock(metric.name))


def test_metrics_are_found_by_name_and_by_device() -> None:
    found = find_metric("learner/approx_kl")
    assert found is not None
    assert found.unit == "nats"
    power = find_metric("system/gpu11_power_w")
    assert power is not None
    assert power.name == "system/gpu<i>_power_w"
    assert find_metric("mine/anything") is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("time/learn_s", True),
        ("sampling/samples_per_s", True),
        ("system/num_children", True),
        ("sampling/ticks", False),
        ("learner/num_steps", False),
        ("mine/waited_s", True),
    ],
)
def test_depends_on_clock(name: str, expected: bool) -> None:
    assert depends_on_clock(name) is expected


def test_a_record_holds_the_whole_table_in_its_order_and_then_the_users_names() -> None:
    made = record(zebra__stripes=3.0, learner__lr=1e-3, ant=1.0)
    always = [metric.name for metric in METRICS if not metric.per_device]
    assert list(made.metrics) == [*always, "ant", "zebra/stripes"]
    assert made.metrics["learner/lr"] == 1e-3
    assert made.metrics["learner/approx_kl"] is None


def test_what_is_not_finite_is_null_and_every_kind_of_number_is_plain() -> None:
    made = EpochRecord.make(
        epoch=1,
        num_samples=1,
        time_s=0.0,
        metrics={
            "a/nan": math.nan,
            "a/inf": -math.inf,
            "a/none": None,
            "a/int": np.int64(7),
            "a/float32": np.float32(0.5),
            "a/bool": True,
            "a/nan32": np.float32("nan"),
        },
    )
    written = json.loads(made.to_json())["metrics"]
    assert {name: value for name, value in written.items() if name.startswith("a/")} == {
        "a/bool": 1,
        "a/float32": 0.5,
        "a/inf": None,
        "a/int": 7,
        "a/nan": None,
        "a/nan32": None,
        "a/none": None,
    }
    assert isinstance(written["a/int"], int)


def test_a_line_reads_back_to_the_bit() -> None:
    made = record(learner__loss=0.1 + 0.2, episode__return_mean=1 / 3)
    assert "\n" not in made.to_json()
    assert EpochRecord.from_json(made.to_json()) == made
    assert set(json.loads(made.to_json())) == {"epoch", "num_samples", "time_s", "metrics"}


@pytest.mark.parametrize("line", ["", "{", '{"epoch": 1}', "[]", "5", '{"epoch": 1, "num_samples"', b"\xff"])
def test_a_torn_line_is_refused(line: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        EpochRecord.from_json(line)


def test_weighted_means_against_plain_loops() -> None:
    values, weights = [0.5, -2.0, 7.0, 1.0], [64.0, 64.0, 32.0, 0.0]
    means = WeightedMeans()
    for value, weight in zip(values, weights, strict=True):
        means.add("learner/loss", value, weight)
    means.add("learner/once", 3.0)
    total = 0.5 * 64 - 2.0 * 64 + 7.0 * 32
    assert means.compute() == {"learner/loss": total / 160, "learner/once": 3.0}
    means.clear()
    assert means.compute() == {}


def test_weight_zero_hides_even_nan_and_a_weighted_nan_shows() -> None:
    means = WeightedMeans()
    means.add("a", math.nan, 0.0)
    means.add("b", math.nan, 1.0)
    means.add("b", 1.0, 1.0)
    assert "a" not in means.compute()
    assert math.isnan(means.compute()["b"])


def test_scalars_are_read_only_when_the_mean_is_asked_for() -> None:
    read = []

    class OnDevice:
        def __init__(self, value: float) -> None:
            self.value = value

        def __mul__(self, other: float) -> OnDevice:
            return OnDevice(self.value * other)

        def __add__(self, other: OnDevice) -> OnDevice:
            return OnDevice(self.value + other.value)

        def __float__(self) -> float:
            read.append(self.value)
            return self.value

    means = WeightedMeans()
    for value in (1.0, 2.0, 6.0):
        means.add("a", OnDevice(value), 2.0)
    assert read == []
    assert means.compute() == {"a": 3.0}
    assert read == [18.0]


def test_the_window_before_the_first_episode() -> None:
    window = EpisodeWindow()
    assert math.isnan(window.return_mean)
    assert not window.is_full
    figures = window.metrics()
    assert set(figures) == {metric.name for metric in METRICS if metric.group == "episode"}
    assert figures.pop("episode/num_episodes") == 0
    assert set(figures.values()) == {None}


def test_the_window_by_hand() -> None:
    window = EpisodeWindow()
    for episode_return, length in ((1.0, 10), (3.0, 20), (8.0, 60)):
        window.add(episode_return, length)
    assert window.metrics() == {
        "episode/return_mean": 4.0,
        "episode/return_std": math.sqrt(26 / 3),
        "episode/return_min": 1.0,
        "episode/return_max": 8.0,
        "episode/length_mean": 30.0,
        "episode/num_episodes": 3,
    }


def test_the_window_keeps_a_hundred_and_counts_all() -> None:
    window = EpisodeWindow()
    for number in range(250):
        window.add(float(number), number)
        assert window.is_full == (number >= 99)
    assert window.num_episodes == 250
    assert window.return_mean == sum(range(150, 250)) / 100
    assert window.metrics()["episode/return_min"] == 150.0


def test_the_window_survives_a_checkpoint() -> None:
    window = EpisodeWindow()
    for number in range(130):
        window.add(number / 7, number + 1)
    restored = EpisodeWindow()
    restored.load_state_dict(json.loads(json.dumps(window.state_dict())))
    assert restored.metrics() == window.metrics()
    restored.add(5.0, 5)
    window.add(5.0, 5)
    assert restored.state_dict() == window.state_dict()
    with pytest.raises(ValueError, match="do not fit together"):
        restored.load_state_dict({"returns": [1.0], "lengths": [], "num_episodes": 1})
