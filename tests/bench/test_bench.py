"""``python -m aiorl bench`` as a real process: what it prints, what it leaves, and how it is interrupted."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from aiorl.bench.costless import costless
from aiorl.environments.make import EnvironmentGroup
from aiorl.environments.spaces import ArraySpec, EnvironmentInfo
from tests.integration.running import ROOT, SMALL

KEYS = {
    "format", "environment_id", "num_env_workers", "num_envs", "num_groups", "num_cores", "max_policy_lag", "waits",
    "room_for_envs", "steps_per_s", "ceilings", "shares", "bottleneck", "batch_rows", "trainer_busy", "trainer_cpu",
    "loop_lag_s", "loop_lag_within_goal",
}  # fmt: skip
FIGURES = ("environments", "link", "inference", "learner", "sampling", "whole")


def command(*overrides: str, seconds: float = 1.5) -> list[str]:
    sets = [part for each in (*SMALL, *overrides) for part in ("--set", each)]
    return [sys.executable, "-W", "error", "-m", "aiorl", "bench", *sets, "--seconds", str(seconds), "--json"]


def environ(tmp_path: Path) -> dict[str, str]:
    """With a folder for temporary files of its own, so that what is left can be told."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}


def bench(tmp_path: Path, *overrides: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*overrides),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=environ(tmp_path),
        cwd=tmp_path,
    )
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.parametrize(
    ("workers", "lag"), [pytest.param(0, 0, id="in process"), pytest.param(1, 1, id="a worker, lag 1")]
)
def test_a_bench_measures_every_part_and_leaves_nothing(tmp_path: Path, workers: int, lag: int) -> None:
    done = bench(
        tmp_path,
        f"task.environment.num_env_workers={workers}",
        f"trainer.sampling.max_policy_lag={lag}",
        "trainer.max_epochs=1",  # a limit of the run, which is not one of the bench
    )
    lines = done.stdout.splitlines()
    told: dict[str, Any] = json.loads(lines[-1])
    assert told.keys() == KEYS
    assert (told["num_env_workers"], told["num_envs"], told["max_policy_lag"]) == (workers, 4, lag)
    figures = told["steps_per_s"]
    assert tuple(figures) == FIGURES
    assert (figures["link"] is None) == (workers == 0)
    for figure in figures.values():
        if figure is not None:
            assert 0 < figure["low"] <= figure["median"] <= figure["high"]
            assert figure["num_slices"] == 5
    check_shares(told)
    assert told["bottleneck"]["sentence"] in lines
    assert any("the whole" in line and f"{figures['whole']['median']:,.0f}" in line for line in lines)
    assert set(told["trainer_cpu"]["tick_us_by_group_size"]) == {"1", "4", "16", "64"}
    for lag_of in told["loop_lag_s"].values():
        assert 0 <= lag_of["p50"] <= lag_of["p99"] <= lag_of["max"]
    assert told["loop_lag_within_goal"] == all(each["p99"] <= 0.010 for each in told["loop_lag_s"].values())
    assert "round 5 of 5" in done.stderr
    assert not left(tmp_path), "temporary files, or a run's folder"


def left(tmp_path: Path) -> list[str]:
    """What a bench left there, beside torch's own cache."""
    return [path.name for path in tmp_path.iterdir() if not path.name.startswith("torchinductor")]


def check_shares(told: dict[str, Any]) -> None:
    """Ceilings and shares follow from the figures."""
    rate = {name: figure["median"] for name, figure in told["steps_per_s"].items() if figure is not None}
    parts = [rate[name] for name in ("environments", "link", "inference") if name in rate]
    sampling = min(parts) if "link" in rate else 1 / sum(1 / part for part in parts)
    both = rate["sampling"], rate["learner"]
    whole = min(both) if told["max_policy_lag"] else 1 / sum(1 / part for part in both)
    assert told["ceilings"] == {"sampling": pytest.approx(sampling), "whole": pytest.approx(whole)}
    assert told["shares"]["sampling"] == pytest.approx(rate["sampling"] / sampling)
    assert told["shares"]["whole"] == pytest.approx(rate["whole"] / whole)
    for name in FIGURES[:-1]:
        share = told["shares"][f"whole_of_{name}"]
        assert share == (pytest.approx(rate["whole"] / rate[name]) if name in rate else None)
    assert told["bottleneck"]["name"] == "learner" or rate["learner"] >= rate["sampling"]


def test_numbers_that_are_to_be_measured_are_measured_first(tmp_path: Path) -> None:
    done = bench(tmp_path, "task.environment.num_env_workers=0", "task.environment.envs_per_worker=auto")
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["num_envs"] == 256 // 64
    assert f"envs_per_worker = {told['num_envs']}" in done.stderr


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("task.environment.num_env_workers=-1", "task.environment.num_env_workers"),
        ("task.environment.id=NoSuch-v0", "unknown to Gymnasium"),
    ],
)
def test_bad_input_is_refused_as_by_a_run(tmp_path: Path, override: str, text: str) -> None:
    assert text in bench(tmp_path, override, status=2).stderr


def test_no_configuration_at_all_is_a_slip(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aiorl", "bench"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environ(tmp_path),
    )
    assert done.returncode == 2
    assert "name a TOML file, or write at least one --set" in done.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_an_environment_that_raises_is_told_with_its_traceback(tmp_path: Path, workers: int) -> None:
    done = bench(
        tmp_path,
        "task.environment.id=tests.integration.worlds:Chain",
        'task.environment.kwargs={raise_in = "step", after = 300}',
        f"task.environment.num_env_workers={workers}",
        status=1,
    )
    assert "RuntimeError: the chain broke in step" in done.stderr
    assert "worlds.py" in done.stderr
    assert not left(tmp_path)


@pytest.mark.parametrize(
    ("number", "while_it"), [(signal.SIGINT, "round 1"), (signal.SIGTERM, "opening inference, learner and a run")]
)
def test_a_signal_ends_it_without_a_trace(tmp_path: Path, number: signal.Signals, while_it: str) -> None:
    with subprocess.Popen(
        command("task.environment.num_env_workers=1", seconds=60),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ(tmp_path),
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        killer = threading.Timer(100, process.kill)
        killer.start()
        try:
            told = []
            for line in process.stderr:
                told.append(line)
                if while_it in line:
                    break
            children = psutil.Process(process.pid).children(recursive=True)
            assert children, told
            process.send_signal(number)
            rest = process.stderr.read()
            assert process.wait(30) == 128 + number, [*told, rest]
        finally:
            killer.cancel()
            killer.join()
            process.kill()
    assert "Traceback" not in rest
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    assert not left(tmp_path)


def test_stepping_knows_no_torch() -> None:
    code = "import sys, aiorl.bench.stepping, aiorl.bench.costless; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env=environ(Path(tempfile.gettempdir())), check=False).returncode
        == 0
    )


@pytest.mark.parametrize(("shape", "dtype"), [((4,), "float32"), ((3, 8, 8), "uint8")])
def test_costless_environments_look_like_those_that_they_stand_for(shape: tuple[int, ...], dtype: str) -> None:
    info = EnvironmentInfo(ArraySpec(shape, dtype), ArraySpec((), "int64"), 5, "same_step", None)
    group = EnvironmentGroup(costless(info), 6)
    try:
        assert group.info == info
        assert group.reset([1] * 6).shape == (6, *shape)
        tick = group.step(np.zeros(6, np.int64))
        assert tick.observations.dtype == dtype
        assert not (tick.terminated | tick.truncated).any()
        assert math.isclose(float(tick.rewards.sum()), 6.0)
    finally:
        group.close()
