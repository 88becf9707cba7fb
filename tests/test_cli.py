"""The verbs, as real processes: what they print where, and what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aiorl.config import json_schema, load_config

ROOT = Path(__file__).parents[1]

CONFIG = """
[trainer]
exp_name = "walk"
seed = 3
max_samples = 512
[trainer.sampling]
num_epoch_samples = 256
max_wait_time = 0.0
[task]
minibatch_size = 128
num_update_epochs = 1
[task.environment]
id = "own_walk:Walk"
envs_per_worker = 4
num_env_workers = 0
[model]
hidden_sizes = [8]
[logger]
tensorboard = false
interval_s = 0.001
"""

WALK = """
import gymnasium
import numpy as np


class Walk(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gymnasium.spaces.Box(0.0, 9.0, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        self.at = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.at += 1
        return np.full(1, self.at, np.float32), 2.0, self.at == 5, False, {}

    def render(self):
        return np.full((16, 16, 3), 40 * self.at, np.uint8)
"""


def aiorl(folder: Path, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    """``python -m aiorl`` in a folder."""
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-m", "aiorl", *arguments],
        input=typed,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder whose configuration names an environment that lies beside it."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.toml").write_text(CONFIG)
    (own / "own_walk.py").write_text(WALK)
    return tmp_path


def last_object(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    *_, last = done.stdout.splitlines()
    parsed: dict[str, Any] = json.loads(last)
    return parsed


def test_a_run_tells_its_folder_its_end_and_the_command_that_plays_it(folder: Path) -> None:
    done = aiorl(folder, "run", "own/config.toml", "--set", "trainer.max_samples=300")
    assert done.returncode == 0, done.stderr
    first, ended, following = done.stdout.splitlines()
    assert first == "run folder: runs/walk/run_0"
    assert re.fullmatch(
        r"ended, max_samples = 300 is reached: 512 samples in [\d.]+ s \(\d+ per second\), 100 episodes, "
        r"mean return 10\.00",
        ended,
    )
    assert following == "next: python -m aiorl eval runs/walk/run_0"
    assert [line for line in done.stderr.splitlines() if line.startswith("epoch=2 samples=512 ")]

    clip = ("--video", "clips/walk.gif")
    played = aiorl(folder, *following.split()[4:], "--episodes", "20", *clip)
    assert played.returncode == 0, played.stderr
    checkpoint, told, shown, _ = played.stdout.splitlines()
    assert checkpoint == "runs/walk/run_0/checkpoints/000001_step_4, trained on 512 samples"
    assert told.startswith(
        "20 episodes with greedy actions: return 10.00 ± 0.00, from 10.00 to 10.00; mean length 5.0; "
    )
    assert shown == "the first episode is in clips/walk.gif"
    with Image.open(folder / "clips" / "walk.gif") as image:
        assert image.n_frames == 6  # type: ignore[attr-defined] # of every image with frames
    figures = last_object(played)
    assert figures["episode_return_mean"] == 10.0
    assert figures["episode_return_std"] == 0.0
    assert figures["episodes"] == 20
    assert figures["num_samples"] == 512

    alone = aiorl(folder, "eval", "runs/walk/run_0", "--episodes", "3", "--sample", "--json")
    assert len(alone.stdout.splitlines()) == 1
    assert last_object(alone)["episodes"] == 3
    assert last_object(alone)["optimal"] is False


def test_check_prints_what_would_be_run_and_nothing_else(folder: Path) -> None:
    done = aiorl(folder, "check", "own/config.toml", "--set", "optimizer.lr=2e-3", "--set", "optimizer.lr=3e-3")
    assert (done.returncode, done.stderr) == (0, "")
    resolved = tomllib.loads(done.stdout)
    assert resolved["optimizer"]["lr"] == 3e-3
    assert resolved["task"]["gamma"] == 0.99
    (folder / "resolved.toml").write_text(done.stdout)
    again = load_config(folder / "resolved.toml")
    assert again == load_config(folder / "own" / "config.toml", ["optimizer.lr=3e-3"])
    assert not (folder / "runs").exists()


def test_check_measures_nothing(folder: Path) -> None:
    done = aiorl(folder, "check", "own/config.toml", "--set", "task.environment.envs_per_worker=auto")
    assert (done.returncode, done.stderr) == (0, "")
    assert tomllib.loads(done.stdout)["task"]["environment"]["envs_per_worker"] == "auto"


def test_check_prints_the_schema(tmp_path: Path) -> None:
    done = aiorl(tmp_path, "check", "--schema")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json_schema()


def test_a_console_beside_a_run_and_its_end_ends_the_run(folder: Path) -> None:
    typed = """
await run.pause()
1 / 0
print("samples", run.statistics().counters["num_samples"], run.statistics().status)
run.set("optimizer.lr", 1e-4)
print("lr", run.config.optimizer.lr)
await run.resume()
"""
    done = aiorl(folder, "repl", "own/config.toml", "--set", "trainer.max_samples=1_000_000_000", typed=typed)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "run folder: runs/walk/run_0"
    assert re.fullmatch(r"samples \d+ paused", lines[1])
    assert lines[2] == "lr 0.0001"
    assert lines[3].startswith("ended, its console was left: ")
    assert "ZeroDivisionError" in done.stderr
    assert "epoch=" not in done.stderr
    summary = json.loads((folder / "runs" / "walk" / "run_0" / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert summary["num_samples"] > 0


def test_a_quiet_run_says_nothing_on_standard_error_and_one_without_limits_says_so(folder: Path) -> None:
    endless = ("--set", "trainer.max_samples=none")
    done = aiorl(folder, "run", "own/config.toml", "-q", "--repl", *endless, typed="await anext(run)\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1] == "no limit is set, so that it goes on until it is stopped"
    assert "EpochReport(epoch=1" in done.stdout


def test_a_reader_that_has_left_is_no_program_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-W", "error", "-m", "aiorl", "check", "--schema"],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_do_not_end_a_run(folder: Path, closed: str) -> None:
    """Sockets would otherwise get their numbers, and whoever prints would write to a socket."""
    command = f"{sys.executable} -X dev -m aiorl run own/config.toml --set task.environment.num_env_workers=1 {closed}"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert ("next: " in done.stdout) == (closed in {"<&-", "2>&-"})
    assert ("checkpoint written" in done.stderr) == (closed in {"<&-", ">&-"})
    summary = json.loads((folder / "runs" / "walk" / "run_0" / "summary.json").read_text())
    assert summary["status"] == "finished"
    refused = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m aiorl run missing.toml {closed}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert refused.returncode == 2
    assert ("does not exist" in refused.stderr) == (closed in {"<&-", ">&-"})


def test_a_tilde_in_exp_dir_is_the_home_for_a_run_that_must_go_on_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    arguments = ("run", "own/config.toml", "--set", "trainer.exp_dir=~/mine")
    assert aiorl(folder, *arguments, "--set", "trainer.max_samples=256").returncode == 0
    done = aiorl(folder, *arguments, "--resume", "must")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "mine" / "summary.json").read_text())["num_samples"] == 512


def test_an_evaluation_is_interrupted_while_an_environment_is_made(folder: Path) -> None:
    assert aiorl(folder, "run", "own/config.toml").returncode == 0
    (folder / "own" / "own_walk.py").write_text(
        WALK.replace("self.render_mode = render_mode", "print('making', flush=True); import time; time.sleep(600)")
    )
    with subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-m", "aiorl", "eval", "runs/walk/run_0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "making\n"
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.3)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=5)
    assert (process.returncode, told) == (130, "")
