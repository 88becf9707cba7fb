"""Numbers of workers and environments that are measured: chosen by what is true of the environment, written down, used again."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from aiorl import calibration
from aiorl.config import load_config
from aiorl.errors import ConfigError, EnvironmentRaised
from aiorl.monitoring.folder import RunFolder
from aiorl.preparation import prepare
from aiorl.runs import open_run, settled
from tests.integration.running import SMALL

if TYPE_CHECKING:
    from pathlib import Path

    from aiorl.config import Config

pytestmark = pytest.mark.anyio

IN_PROCESS = ("task.environment.num_env_workers=0", "task.environment.envs_per_worker=auto")
AUTO = ("task.environment.num_env_workers=auto", "task.environment.envs_per_worker=auto")


def configured(exp_dir: Path, *overrides: str, world: str = "Chain", **kwargs: Any) -> Config:
    given = ", ".join(f"{name} = {value}" for name, value in kwargs.items())
    environment = [
        f"task.environment.id=tests.integration.worlds:{world}",
        f"task.environment.kwargs={{ {given} }}",
        "trainer.sampling.num_epoch_samples=1024",
    ]
    small = [each for each in SMALL if "envs_per_worker" not in each]
    return load_config(None, [f"trainer.exp_dir={exp_dir}", *small, *environment, *overrides])


async def settle(config: Config) -> tuple[int, int]:
    """The numbers of a new run, which is not started."""
    prepared = prepare(config, None, None, None, None, "auto")
    found = await settled(config, prepared.task, prepared.model, prepared.folder)
    assert prepared.task.environment == found.task.environment == prepared.task.config.environment
    return found.task.environment.numbers()


def recorded(exp_dir: Path) -> dict[str, Any]:
    return RunFolder(exp_dir).read_calibration() or {}


# ---------------------------------------------------------------------- what is chosen
async def test_a_cheap_environment_steps_in_process_and_in_a_large_group(tmp_path: Path) -> None:
    num_env_workers, envs_per_worker = await settle(configured(tmp_path, *AUTO))
    assert num_env_workers == 0 or envs_per_worker >= 16
    found = recorded(tmp_path)
    assert (found["num_env_workers"], found["envs_per_worker"]) == (num_env_workers, envs_per_worker)
    rates = {each["envs_per_worker"]: each["steps_per_s"] for each in found["measured"] if not each["num_env_workers"]}
    assert {4, 8} <= rates.keys()
    assert max(rates) <= 1024 // 64


async def test_an_environment_that_takes_four_milliseconds_gets_processes_and_few_environments(tmp_path: Path) -> None:
    """A worker for each core steps as many times as much, and more environments in one bring nothing."""
    num_env_workers, envs_per_worker = await settle(configured(tmp_path, *AUTO, world="Slow"))
    local = [each for each in recorded(tmp_path)["measured"] if not each["num_env_workers"]]
    assert [each["envs_per_worker"] for each in local] == [1], "a tick of 5 ms at most on the loop"
    if len(os.sched_getaffinity(0)) > 1:
        assert num_env_workers > 1
        assert envs_per_worker <= 8


async def test_resets_do_not_hold_the_loop_up_for_long(tmp_path: Path) -> None:
    await settle(configured(tmp_path, *AUTO, world="Slow", reset_s=0.3, step_s=0.0))
    local = [each for each in recorded(tmp_path)["measured"] if not each["num_env_workers"]]
    assert max(each["envs_per_worker"] for each in local) <= 3, "a second of resets at most"


async def test_a_vector_environment_is_measured_in_large_groups_in_process(tmp_path: Path) -> None:
    overrides = (
        "task.environment.id=CartPole-v1",
        "task.environment.kwargs={}",
        "trainer.sampling.num_epoch_samples=65536",
    )
    mode = "task.environment.vectorization_mode=vector_entry_point"
    await settle(configured(tmp_path, *AUTO, *overrides, mode))
    local = [each for each in recorded(tmp_path)["measured"] if not each["num_env_workers"]]
    assert max(each["envs_per_worker"] for each in local) >= 128, "a step costs much the same for any number"


async def test_what_was_measured_for_another_environment_is_not_taken(tmp_path: Path) -> None:
    await settle(configured(tmp_path, *AUTO))
    before = recorded(tmp_path)
    await settle(configured(tmp_path, *AUTO, world="Slow"))
    assert recorded(tmp_path)["asked"] != before["asked"]


async def test_an_environment_too_slow_to_measure_gets_a_default(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_PROBE_S", 0.2)
    cores = len(os.sched_getaffinity(0))
    assert await settle(configured(tmp_path, *AUTO, world="Slow", reset_s=0.5)) == (cores, 2)
    assert "an environment took more than 0.2 s to be made and stepped" in caplog.text
    assert recorded(tmp_path)["measured"] == []


async def test_a_measurement_that_gets_nowhere_in_its_time_ends_in_a_default(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "BUDGET_S", 0.0)
    assert (await settle(configured(tmp_path, *AUTO)))[1] == 2
    assert "too slow to be measured in 0 s" in caplog.text


async def test_awaitable_environments_are_measured_in_process(tmp_path: Path) -> None:
    num_env_workers, envs_per_worker = await settle(configured(tmp_path, *AUTO, world="Awaited"))
    assert num_env_workers == 0
    assert envs_per_worker >= 8, "they wait side by side"


@pytest.mark.parametrize(
    ("given", "place", "number"),
    [("task.environment.num_env_workers=1", 0, 1), ("task.environment.envs_per_worker=24", 1, 24)],
)
async def test_a_number_that_is_given_is_kept(tmp_path: Path, given: str, place: int, number: int) -> None:
    numbers = await settle(configured(tmp_path, AUTO[1 - place], given))
    assert numbers[place] == number
    assert recorded(tmp_path)["groups_per_worker"] == "auto"


async def test_force_sync_measures_nothing_and_always_takes_the_same(tmp_path: Path) -> None:
    config = configured(tmp_path, *AUTO, "trainer.sampling.force_sync=true")
    assert await settle(config) == (0, 16)
    assert recorded(tmp_path) == {}


# ---------------------------------------------------------------------- what is written, and used again
async def test_a_run_writes_its_numbers_down_and_goes_on_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_run(configured(tmp_path, *IN_PROCESS, "trainer.max_epochs=1")) as run:
        numbers = run.config.task.environment.numbers()
        await run.wait()
    written = load_config(tmp_path / "config.toml").task.environment
    assert written.numbers() == numbers

    def measured_again(*_: Any) -> None:
        raise AssertionError("it was measured again")

    monkeypatch.setattr(calibration, "measure_environments", measured_again)
    async with open_run(configured(tmp_path, *IN_PROCESS, "trainer.max_epochs=2")) as run:
        assert run.config.task.environment.numbers() == numbers
        assert (await run.wait()).state.num_epochs == 2
    copied = configured(
        tmp_path,
        *(f"task.environment.{name}={number}" for name, number in zip(calibration.NUMBERS, numbers, strict=False)),
        "trainer.max_epochs=3",
    )
    async with open_run(copied) as run:  # the numbers, written into the configuration, are the same run
        assert (await run.wait()).state.num_epochs == 3


async def test_a_run_that_had_its_numbers_given_goes_on_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("task.environment.num_env_workers=0", "task.environment.envs_per_worker=6")
    async with open_run(configured(tmp_path, *given, "trainer.max_epochs=1")) as run:
        await run.wait()
    monkeypatch.setattr(calibration, "measure_environments", None)
    async with open_run(configured(tmp_path, *AUTO, "trainer.max_epochs=2")) as run:
        assert run.config.task.environment.numbers() == (0, 6)
        assert (await run.wait()).state.num_epochs == 2


@pytest.mark.parametrize("content", ["", "[]", '{"asked": {}}', '{"num_env_workers": "many"}'])
async def test_a_file_that_says_nothing_is_measured_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "calibration.json").write_text(content)
    assert (await settle(configured(tmp_path, *IN_PROCESS)))[0] == 0
    assert recorded(tmp_path)["measured"]


async def test_numbers_of_an_earlier_part_that_another_setting_forbids_are_a_fault(tmp_path: Path) -> None:
    await settle(configured(tmp_path, *AUTO, "task.environment.groups_per_worker=9"))
    asked = recorded(tmp_path)["asked"]
    known = {"num_env_workers": 0, "envs_per_worker": 4, "groups_per_worker": 9}
    (tmp_path / "calibration.json").write_text(json.dumps({"asked": asked, **known}))
    with pytest.raises(ConfigError, match="groups_per_worker"):
        await settle(configured(tmp_path, *AUTO, "task.environment.groups_per_worker=9"))


# ---------------------------------------------------------------------- what goes wrong
@pytest.mark.parametrize(("where", "after"), [("reset", 0), ("step", 0)])
async def test_an_environment_that_raises_is_told_as_at_the_start_of_a_run(
    tmp_path: Path, where: str, after: int
) -> None:
    config = configured(tmp_path, *IN_PROCESS, raise_in=f'"{where}"', after=after, length=1)
    with pytest.raises(EnvironmentRaised, match=f"worker 0 raised in step: RuntimeError: the chain broke in {where}"):
        async with open_run(config) as run:
            await run.wait()
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["status"] == "failed"
    assert f"the chain broke in {where}" in told["error"]
