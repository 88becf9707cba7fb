"""How large the processes of a CartPole run are, and that they do not grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.soak import running, watch

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.soak import Course

CARTPOLE = "configs/cartpole.toml"  # two workers
MANY_TICKS = ("task.num_update_epochs=1", "task.minibatch_size=1024", "task.environment.envs_per_worker=4")
QUICK = 0.02  # growth within seconds of many ticks: without a leak 0.3 % at most was seen, with 1 KB a tick 6 %
LEAKS = {
    "trainer": "task.name=tests.integration.leaks:LeakingTask",
    "worker": "task.environment.wrappers=['tests.integration.leaking_world:Leaking']",
}


def soak(tmp_path: Path, *overrides: str, warm_up_s: float, seconds: float) -> list[Course]:
    exp_dir = tmp_path / "run"
    with running(CARTPOLE, exp_dir, *overrides) as trainer:
        return watch(trainer, exp_dir, warm_up_s=warm_up_s, seconds=seconds)


def check_constant(courses: list[Course]) -> None:
    """Descriptors and threads: those that come and go do not count, those that stay do."""
    for course in courses:
        assert course.fds[1] <= course.fds[0], course
        assert course.threads[1] <= course.threads[0], course


def test_a_run_is_small_and_does_not_grow(tmp_path: Path) -> None:
    courses = soak(tmp_path, *MANY_TICKS, warm_up_s=5, seconds=12)
    assert [course.name for course in courses] == ["trainer", "worker 0", "worker 1"]
    assert all(course.rss_bytes < 80e6 for course in courses[1:]), courses
    assert sum(course.rss_bytes for course in courses) < 600e6, courses
    assert all(course.growth < QUICK for course in courses), courses
    check_constant(courses)


@pytest.mark.slow
@pytest.mark.parametrize("where", sorted(LEAKS))
def test_a_leak_of_a_kilobyte_a_tick_is_seen_as_quickly(tmp_path: Path, where: str) -> None:
    courses = soak(tmp_path, *MANY_TICKS, LEAKS[where], warm_up_s=5, seconds=12)
    assert all((course.growth > QUICK) == course.name.startswith(where) for course in courses), courses


@pytest.mark.slow
@pytest.mark.soak
def test_ten_minutes_show_no_growth(tmp_path: Path) -> None:
    courses = soak(tmp_path, warm_up_s=60, seconds=600)
    assert all(course.growth < 0.01 for course in courses), courses
    check_constant(courses)
