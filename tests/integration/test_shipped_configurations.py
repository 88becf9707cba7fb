"""The configurations that are shipped do what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.running import ROOT, metrics, summary

if TYPE_CHECKING:
    from pathlib import Path


def _aiorl(*arguments: str, flags: tuple[str, ...] = (), timeout: float = 110.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-m", "aiorl", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=ROOT,
    )


def _solve_cartpole(exp_dir: Path, seed: int, *overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    sets = (f"trainer.exp_dir={exp_dir}", f"trainer.seed={seed}", *overrides)
    done = _aiorl("run", "configs/cartpole.toml", *(part for each in sets for part in ("--set", each)))
    assert done.returncode == 0, done.stderr
    played = _aiorl("eval", str(exp_dir), "--episodes", "100", "--json")
    assert played.returncode == 0, played.stderr
    result: dict[str, Any] = json.loads(played.stdout.splitlines()[-1])
    return summary(exp_dir), result


def test_cartpole_is_solved(tmp_path: Path) -> None:
    told, played = _solve_cartpole(tmp_path, seed=1)
    assert told["status"] == "finished"
    assert played["episodes"] == 100
    assert played["episode_return_mean"] >= 475.0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2, 3, 4])
def test_cartpole_is_solved_within_a_minute_on_every_seed(tmp_path: Path, seed: int) -> None:
    told, played = _solve_cartpole(tmp_path, seed)
    assert played["episode_return_mean"] >= 475.0
    assert told["wall_s"] <= 60.0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4])
def test_cartpole_is_solved_at_a_policy_lag_of_one(tmp_path: Path, seed: int) -> None:
    _, played = _solve_cartpole(tmp_path, seed, "trainer.sampling.max_policy_lag=1")
    assert played["episode_return_mean"] >= 475.0
    assert max(line["metrics"]["sampling/lag_max"] for line in metrics(tmp_path)) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_acrobot_swings_up(tmp_path: Path, seed: int) -> None:
    sets = ("--set", f"trainer.exp_dir={tmp_path}", "--set", f"trainer.seed={seed}")
    done = _aiorl("run", "configs/acrobot.toml", *sets, timeout=900.0)
    assert done.returncode == 0, done.stderr
    told = summary(tmp_path)
    assert told["num_samples"] <= 500_000 + 2048
    assert told["episode_return_mean"] >= -100.0


def test_a_run_is_quiet_where_every_warning_is_an_error(tmp_path: Path) -> None:
    """asyncio's debug mode included, in the trainer and, by the same flags, in its workers.

    Other work on the machine can hold any process up for the 0.1 s that asyncio complains of ("Executing ... took"); what the run
    itself does for so long shows each time. So one quiet run of three is asked for, and nothing but that complaint is forgiven.
    """
    slow: list[str] = []
    for attempt in range(3):
        exp_dir = tmp_path / str(attempt)
        sets = ("--set", "trainer.max_samples=20000", "--set", f"trainer.exp_dir={exp_dir}")
        done = _aiorl("run", "configs/cartpole.toml", *sets, flags=("-X", "dev", "-W", "error"))
        assert done.returncode == 0, done.stderr
        output = done.stderr + done.stdout
        for unwanted in ("Warning", "Traceback", "was never"):
            assert unwanted not in output
        lines = metrics(exp_dir)
        assert summary(exp_dir)["num_samples"] == lines[-1]["num_samples"] >= 20_000
        assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
        assert all(line["metrics"]["learner/approx_kl"] is not None for line in lines)
        held_up = [line for line in output.splitlines() if "Executing" in line]
        if not held_up:
            return
        slow += held_up
    pytest.fail("\n".join(slow))


PONG = (
    "trainer.max_samples=192",
    "trainer.sampling.num_epoch_samples=96",
    "task.minibatch_size=48",
    "task.num_update_epochs=1",
    "task.environment.kwargs.max_num_frames_per_episode=60",
)
"""Overrides that make a run of Pong short, and its episodes."""


@pytest.mark.parametrize("num_env_workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_pong_trains_and_is_played(tmp_path: Path, num_env_workers: int) -> None:
    pytest.importorskip("ale_py", reason='ALE is installed by pip install "aiorl[atari]"')
    sets = (*PONG, f"trainer.exp_dir={tmp_path}", f"task.environment.num_env_workers={num_env_workers}")
    done = _aiorl("run", "configs/pong.toml", *(part for each in sets for part in ("--set", each)))
    assert done.returncode == 0, done.stderr
    told = summary(tmp_path)
    assert told["num_samples"] >= 192
    assert told["num_episodes"] >= 8  # of 15 steps, each of 4 frames; 8 environments make 24 steps each, 4 make 48
    assert all(line["metrics"]["learner/loss"] is not None for line in metrics(tmp_path))
    played = _aiorl("eval", str(tmp_path), "--episodes", "2", "--json")
    assert played.returncode == 0, played.stderr
    result = json.loads(played.stdout.splitlines()[-1])
    assert result["episodes"] == 2
    assert result["episode_length_mean"] == 15


@pytest.mark.slow
@pytest.mark.parametrize("vectorization_mode", ["vector_entry_point", "envpool"])
def test_cartpole_is_learned_by_vector_environments(tmp_path: Path, vectorization_mode: str) -> None:
    if vectorization_mode == "envpool":
        pytest.importorskip("envpool", reason='EnvPool is installed by pip install "aiorl[envpool]"')
    sets = (
        "--set",
        f"trainer.exp_dir={tmp_path}",
        "--set",
        f"task.environment.vectorization_mode={vectorization_mode}",
    )
    done = _aiorl("run", "configs/cartpole.toml", *sets, "--set", "trainer.max_samples=40_000")
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path)["episode_return_mean"] > 100.0
    played = _aiorl("eval", str(tmp_path), "--episodes", "20", "--json")
    assert played.returncode == 0, played.stderr
    assert json.loads(played.stdout.splitlines()[-1])["episode_return_mean"] > 150.0
