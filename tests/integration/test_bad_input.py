"""Bad input to real processes: one clear message, the right exit status, nothing started and nothing left."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.running import SMALL, environ, summary
from tests.test_evaluation import saved_run

if TYPE_CHECKING:
    from pathlib import Path

MODULE = """
import gymnasium
import numpy as np


class Broken(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self):
        raise OSError("the simulator's licence has run out")


class Worded(gymnasium.Env):
    observation_space = gymnasium.spaces.Text(10)
    action_space = gymnasium.spaces.Discrete(2)


class Stillborn(Broken):
    def __init__(self):
        pass

    def reset(self, *, seed=None, options=None):
        raise ValueError("no such level")
"""


def aiorl(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m aiorl`` in a folder of the user's."""
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-m", "aiorl", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=folder,
        env=environ(folder),
    )


def refused(done: subprocess.CompletedProcess[str], *messages: str) -> None:
    """It ended with 2, and standard error holds these lines and no traceback."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    for message in messages:
        assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_every_fault_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "faulty.toml").write_text(
        "[trainer]\nsead = 1\nclip_grad_norm = 'much'\n"
        "[trainer.sampling]\nnum_epoch_samples = 100\nmin_trajectory_length = 20\nmax_trajectory_length = 10\n"
    )
    done = aiorl(tmp_path, "run", "faulty.toml", "--set", "task.gamma=1.5")
    refused(
        done,
        "error: the configuration has 4 faults:",
        'faulty.toml: trainer.sead = 1: is unknown; did you mean "seed"?',
        'faulty.toml: trainer.clip_grad_norm = "much": ',
        "faulty.toml: trainer.sampling.min_trajectory_length = 20: ",
        "--set: task.gamma = 1.5: ",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["faulty.toml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "missing.toml"], "missing.toml: does not exist"),
        (["run", "--set", "trainer.seed"], "trainer.seed: is no override"),
        (["check", "broken.toml"], "broken.toml: is not valid TOML"),
        (["run"], "CONFIG: is missing"),
        (["rnu", "broken.toml"], 'Unknown command "rnu". Did you mean "run"?'),
        (["run", "broken.toml", "--resume", "maybe"], '"auto", "never", "must"'),
        (["eval"], "RUN requires an argument"),
        (["eval", "somewhere", "--episodes", "0"], "Must be >= 1"),
    ],
)
def test_misuse_of_the_command_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "broken.toml").write_text("[trainer\n")
    refused(aiorl(tmp_path, *arguments), message)


def test_a_folder_and_an_address_that_cannot_be_had_and_an_unknown_environment(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        settings = ["trainer.exp_dir=file/run", f"link.endpoint={endpoint}", "task.environment.id=CartPoal-v1"]
        done = aiorl(tmp_path, "run", *(part for each in settings for part in ("--set", each)))
    refused(
        done,
        "the configuration has 3 faults:",
        'trainer.exp_dir = "file/run": ',
        "file, which is no folder",
        f'link.endpoint = "{endpoint}": is in use',
        'task.environment.id = "CartPoal-v1": is unknown to Gymnasium',
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("verb", "name", "message"),
    [
        ("run", "raising:Anything", "cannot be imported: ZeroDivisionError: division by zero"),
        ("check", "worlds:Broken", "cannot be constructed: OSError: the simulator's licence has run out"),
        ("run", "worlds:Worded", "observation space Text(1, 10"),
    ],
)
def test_an_environment_that_cannot_be_used(tmp_path: Path, verb: str, name: str, message: str) -> None:
    """Modules are found beside the configuration, whatever the working folder is."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "worlds.py").write_text(MODULE)
    (own / "raising.py").write_text("1 / 0\n")
    (own / "config.toml").write_text(f'[task.environment]\nid = "{name}"\n')
    refused(aiorl(tmp_path, verb, "own/config.toml"), f'task.environment.id = "{name}": ', message)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize(
    ("num_env_workers", "world", "cause"),
    [
        (0, "tests.integration.worlds:Chain", "raised in step: RuntimeError: the chain broke in step"),
        (1, "worlds:Stillborn", "raised in reset: ValueError: no such level"),
    ],
)
def test_an_environment_that_raises_while_it_is_played(
    tmp_path: Path, num_env_workers: int, world: str, cause: str
) -> None:
    (tmp_path / "worlds.py").write_text(MODULE)
    sets = [*SMALL, "trainer.exp_dir=run", f"task.environment.num_env_workers={num_env_workers}"]
    sets += [f"task.environment.id={world}", *(["task.environment.kwargs.raise_in=step"] * (num_env_workers == 0))]
    done = aiorl(tmp_path, "run", *(part for each in sets for part in ("--set", each)))
    assert done.returncode == 1, done.stderr
    assert f"error: the environment of worker 0 {cause}\n" in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert "aiorl/runs.py" not in done.stderr
    told = summary(tmp_path / "run")
    assert told["status"] == "failed"
    assert cause in told["error"]


def test_a_run_that_is_another_one_is_not_gone_on_with(tmp_path: Path) -> None:
    saved_run(tmp_path, "task.gamma=0.9")
    world = "task.environment.id=tests.test_evaluation:Uneven"
    sets = [world, "model.hidden_sizes=[]", "trainer.seed=5", "trainer.exp_dir=run", "task.gamma=0.5"]
    done = aiorl(tmp_path, "run", *(part for each in sets for part in ("--set", each)))
    refused(done, "was made with another configuration", "  task.gamma: 0.9 → 0.5\n")
    done = aiorl(tmp_path, "run", "--set", "trainer.exp_dir=new", "--resume", "must")
    refused(done, "holds no checkpoint to resume")


@pytest.mark.parametrize("verb", ["check", "run"])
def test_what_a_run_could_not_use_is_found_before_anything_starts(tmp_path: Path, verb: str) -> None:
    (tmp_path / "own.py").write_text(
        "from aiorl.tasks.ppo import PPO\n\n\nclass Own(PPO):\n"
        "    def __init__(self, config):\n        raise OSError('no task today')\n"
    )
    sets = ["trainer.exp_dir=/proc/x", "trainer.checkpoint.load_from_ckpt_path=nope", "task.name=own:Own"]
    refused(
        aiorl(tmp_path, verb, *(part for each in sets for part in ("--set", each))),
        "the configuration has 3 faults:",
        'trainer.exp_dir = "/proc/x": ',
        'trainer.checkpoint.load_from_ckpt_path = "nope": nope is no checkpoint',
        'task.name = "own:Own": cannot be constructed: OSError: no task today',
        'own.py", line 6, in __init__',
    )
    refused(aiorl(tmp_path, verb, "--set", "trainer.log_dir_name=checkpoints"), "trainer.log_dir_name")
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["own.py"]


def test_a_program_error_keeps_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from aiorl.tasks.ppo import PPO\n\n\nclass Own(PPO):\n"
        "    def compute_loss(self, *arguments):\n        return 1 / 0\n"
    )
    sets = ["task.name=own:Own", "task.environment.num_env_workers=0", "trainer.exp_dir=run", "trainer.max_epochs=1"]
    done = aiorl(tmp_path, "run", *(part for each in sets for part in ("--set", each)))
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert 'own.py", line 6' in done.stderr
