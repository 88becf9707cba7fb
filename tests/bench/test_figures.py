"""What figures mean: shares, the bottleneck and its remedy, on figures made up by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aiorl.bench.figures import Figure, Findings, Subject, bottleneck, in_turn
from aiorl.bench.report import as_json, as_text
from aiorl.bench.trainer_cost import TrainerCost, fit_line
from aiorl.monitoring.loop_lag import LagStatistics

SUBJECT = Subject("CartPole-v1", 2, 32, 4, 4, 0, waits=False, room_for_envs=128)
LAG = LagStatistics(0.001, 0.004, 0.02, 1000)


def figure(rate: float) -> Figure:
    return Figure(rate, 0.9 * rate, 1.1 * rate, 5)


def found(subject: Subject = SUBJECT, *, busy: float = 0.5, **rates: float | None) -> Findings:
    """Workers that could do 100,000, a link of 50,000, and so on, unless said otherwise."""
    usual: dict[str, float | None] = {
        "environments": 100_000.0,
        "link": 50_000.0,
        "inference": 400_000.0,
        "learner": 20_000.0,
        "sampling": 40_000.0,
        "whole": 12_000.0,
    }
    figures: dict[str, Any] = {
        name: figure(rate) if rate is not None else None for name, rate in {**usual, **rates}.items()
    }
    cost = TrainerCost(80.0, 0.5, 1000.0, {1: 80.5, 64: 112.0})
    return Findings(
        subject, **figures, batch_rows=12.0, trainer_busy=busy, sampling_lag=LAG, whole_lag=LAG, trainer_cost=cost
    )


def test_a_figure_is_a_median_with_its_spread() -> None:
    assert Figure.of([5.0, 1.0, 2.0]) == Figure(2.0, 1.0, 5.0, 3)


def test_what_is_done_in_turn_adds_up_and_what_is_done_side_by_side_does_not() -> None:
    assert in_turn([20_000.0, 20_000.0]) == pytest.approx(10_000.0)
    assert found().sampling_ceiling == 50_000.0
    assert found().whole_ceiling == pytest.approx(40_000 * 20_000 / 60_000)
    assert found(replace(SUBJECT, max_policy_lag=1)).whole_ceiling == 20_000.0
    local = found(replace(SUBJECT, num_env_workers=0), link=None, environments=60_000.0, inference=60_000.0)
    assert local.sampling_ceiling == pytest.approx(30_000.0)


@pytest.mark.parametrize(
    ("subject", "rates", "name", "setting"),
    [
        pytest.param({}, {}, "learner", "trainer.sampling.max_policy_lag", id="learner at lag 0"),
        pytest.param({"max_policy_lag": 1}, {}, "learner", "task.minibatch_size", id="learner at lag 1"),
        pytest.param({"num_cores": 1}, {}, "learner", "task.minibatch_size", id="learner, and one core"),
        pytest.param(
            {"num_env_workers": 0}, {"link": None}, "learner", "task.minibatch_size", id="learner, and no workers"
        ),
        pytest.param(
            {},
            {"environments": 5_000.0, "sampling": 4_500.0},
            "environments",
            "task.environment.num_env_workers",
            id="environments, and cores left",
        ),
        pytest.param(
            {"num_env_workers": 4},
            {"environments": 5_000.0, "sampling": 4_500.0},
            "environments",
            None,
            id="no core left",
        ),
        pytest.param(
            {}, {"link": 10_000.0, "sampling": 9_000.0}, "link", "task.environment.envs_per_worker", id="link"
        ),
        pytest.param(
            {"num_envs": 128},
            {"link": 10_000.0, "sampling": 9_000.0},
            "link",
            "trainer.sampling.num_epoch_samples",
            id="link, and no room for more environments",
        ),
        pytest.param(
            {},
            {"inference": 10_000.0, "sampling": 9_000.0},
            "inference",
            "task.environment.envs_per_worker",
            id="inference",
        ),
        pytest.param(
            {},
            {"sampling": 10_000.0, "busy": 0.95},
            "trainer",
            "task.environment.envs_per_worker",
            id="trainer's thread",
        ),
        pytest.param(
            {"waits": True}, {"sampling": 10_000.0}, "waiting", "trainer.sampling.max_wait_time", id="waiting by choice"
        ),
        pytest.param({}, {"sampling": 10_000.0}, "waiting", "task.environment.envs_per_worker", id="waiting"),
        pytest.param(
            {"num_env_workers": 0},
            {"link": None, "environments": 15_000.0, "sampling": 10_000.0},
            "environments",
            "task.environment.num_env_workers",
            id="environments in process",
        ),
        pytest.param(
            {"num_env_workers": 0},
            {"link": None, "sampling": 10_000.0},
            "trainer",
            "task.environment.envs_per_worker",
            id="trainer in process",
        ),
    ],
)
def test_the_bottleneck_and_what_would_move_it(
    subject: dict[str, Any], rates: dict[str, Any], name: str, setting: str | None
) -> None:
    narrow = bottleneck(found(replace(SUBJECT, **subject), **rates))
    assert (narrow.name, narrow.setting) == (name, setting)
    assert narrow.sentence.endswith(".")
    assert setting is None or setting in narrow.remedy


def test_the_gain_of_a_policy_lag_is_foretold() -> None:
    """In turn 13,333 steps/s; side by side the learner's 20,000."""
    assert "up to 1.5 times as fast" in bottleneck(found()).remedy


def test_the_json_says_what_the_findings_say() -> None:
    told = json.loads(as_json(found()))
    assert told["steps_per_s"]["whole"] == {
        "median": 12_000,
        "low": 10_800,
        "high": pytest.approx(13_200),
        "num_slices": 5,
    }
    assert told["shares"]["whole_of_learner"] == pytest.approx(0.6)
    assert told["shares"]["sampling"] == pytest.approx(0.8)
    assert told["trainer_cpu"]["per_tick_us"] == 80.0
    assert told["loop_lag_within_goal"]
    local = json.loads(as_json(found(link=None)))
    assert local["steps_per_s"]["link"] is None
    assert local["shares"]["whole_of_link"] is None


def test_the_text_names_shares_and_lag() -> None:
    text = as_text(replace(found(link=None), whole_lag=LagStatistics(0.001, 0.012, 0.02, 1000)))
    assert "learner                               20,000      18,000      22,000           60% of it" in text
    assert "link, costless environments             none" in text
    assert "loop lag, the whole: p50 1.0 ms, p99 12.0 ms, max 20.0 ms (p99 above the 10 ms aimed at)" in text
    assert "loop lag, sampling alone: p50 1.0 ms, p99 4.0 ms, max 20.0 ms (p99 within the 10 ms aimed at)" in text


def test_a_line_is_found_again() -> None:
    assert fit_line(np.array([1, 4, 16, 64]), np.array([80.5, 82.0, 88.0, 112.0])) == pytest.approx((80.0, 0.5))


def test_nothing_costs_less_than_nothing() -> None:
    """Falling: the constant that is best, (1 + 1/2) / (1 + 1/4). Through the origin from below: a slope alone."""
    assert fit_line(np.array([1, 64]), np.array([2.0, 1.0])) == pytest.approx((1.2, 0.0))
    per_tick, per_row = fit_line(np.array([1, 2]), np.array([1.0, 3.0]))
    assert per_tick == 0.0
    assert per_row == pytest.approx((1 + 2 / 3) / (1 + 4 / 9))
