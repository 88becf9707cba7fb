"""Signals: drained, checkpointed, left with 128 + n; never an orphan."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
import pytest

from aiorl.learning.checkpoint import CheckpointStore
from aiorl.standalone import PATIENCE_S
from tests.integration.running import metrics, run_to_end, running, summary

if TYPE_CHECKING:
    from pathlib import Path

ENDLESS = ("trainer.max_samples=1000000000", "task.environment.num_env_workers=2")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_checkpoints_and_leaves(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path, *ENDLESS) as run:
        run.wait_for_epoch()
        workers = psutil.Process(run.process.pid).children()
        assert len(workers) == 2
        os.kill(run.process.pid, number)
        assert run.end() == 128 + number, run.text
        assert not any(worker.is_running() for worker in workers)
    told = summary(tmp_path)
    assert told["status"] == "stopped"
    assert number.name in told["reason"]
    loaded = CheckpointStore(tmp_path / "checkpoints", only_most_recent=True).load().contents
    assert loaded.exact
    assert loaded.state["num_epochs"] == told["num_epochs"] == metrics(tmp_path)[-1]["epoch"]
    assert "Traceback" not in run.text


def test_a_terminal_interrupt_reaches_the_whole_group_and_still_drains(tmp_path: Path) -> None:
    with running(tmp_path, *ENDLESS) as run:
        run.wait_for_epoch()
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.end() == 130, run.text
    assert summary(tmp_path)["status"] == "stopped"
    assert "Traceback" not in run.text


def test_a_second_interrupt_leaves_at_once_without_orphans(tmp_path: Path) -> None:
    never = "task.environment.id=tests.integration.worlds:Sticky"
    with running(
        tmp_path, *ENDLESS, never, "trainer.drain_timeout=600.0", "task.environment.env_cleanup_time=0.1"
    ) as run:
        run.wait_for_epoch()
        workers = psutil.Process(run.process.pid).children()
        (tmp_path / "stick").touch()
        os.kill(run.process.pid, signal.SIGINT)
        run.wait_for("finishing")
        with pytest.raises(subprocess.TimeoutExpired):
            run.process.wait(0.2)  # it drains, for ever; and two interrupts within 50 ms would count as one
        os.kill(run.process.pid, signal.SIGINT)
        assert run.end() == 130, run.text
        assert not any(worker.is_running() for worker in workers)
    assert summary(tmp_path)["status"] == "stopped"
    assert "Traceback" not in run.text


def test_a_loop_that_an_environment_holds_up_hears_a_further_interrupt(tmp_path: Path) -> None:
    never = "task.environment.id=tests.integration.worlds:Sticky"
    with running(tmp_path, ENDLESS[0], never, "task.environment.num_env_workers=0") as run:
        run.wait_for_epoch()
        (tmp_path / "stick").touch()
        run.wait_for("stuck")
        os.kill(run.process.pid, signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            run.process.wait(PATIENCE_S + 0.1)  # it cannot drain; and what follows sooner might be the same impatience
        os.kill(run.process.pid, signal.SIGINT)
        assert run.end(timeout=5.0) == 130, run.text
    assert "Traceback" not in run.text


def test_what_cannot_be_drained_is_given_up_in_time(tmp_path: Path) -> None:
    never = "task.environment.id=tests.integration.worlds:Sticky"
    with running(
        tmp_path, *ENDLESS, never, "trainer.drain_timeout=0.2", "task.environment.env_cleanup_time=0.1"
    ) as run:
        run.wait_for_epoch()
        (tmp_path / "stick").touch()
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.end() == 143, run.text
    told = summary(tmp_path)
    assert told["status"] == "stopped"
    loaded = CheckpointStore(tmp_path / "checkpoints", only_most_recent=True).load().contents
    assert loaded.state["num_epochs"] == told["num_epochs"]
    assert metrics(tmp_path)[-1]["epoch"] <= told["num_epochs"]


def test_sigusr1_writes_a_checkpoint_and_training_goes_on(tmp_path: Path) -> None:
    with running(tmp_path, *ENDLESS) as run:
        run.wait_for_epoch()
        assert not list(tmp_path.glob("checkpoints/*"))
        os.kill(run.process.pid, signal.SIGUSR1)
        run.wait_for("checkpoint written")
        assert list(tmp_path.glob("checkpoints/*/manifest.json"))
        run.wait_for_epoch()
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.end() == 143


def test_a_killed_trainer_leaves_no_worker(tmp_path: Path) -> None:
    with running(tmp_path, *ENDLESS) as run:
        run.wait_for_epoch()
        workers = psutil.Process(run.process.pid).children()
        assert len(workers) == 2
        run.process.kill()
        assert psutil.wait_procs(workers, timeout=5)[1] == []


def test_a_stopped_run_is_gone_on_with(tmp_path: Path) -> None:
    with running(tmp_path, *ENDLESS) as run:
        run.wait_for_epoch()
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.end() == 143
    before = summary(tmp_path)
    goal = before["num_samples"] + 1000
    done = run_to_end(tmp_path, f"trainer.max_samples={goal}", "task.environment.num_env_workers=2")
    assert done.returncode == 0, done.stderr
    after = summary(tmp_path)
    assert after["status"] == "finished"
    assert after["num_samples"] >= goal
    assert after["num_epochs"] > before["num_epochs"]
    lines = metrics(tmp_path)
    assert [line["epoch"] for line in lines] == list(range(1, after["num_epochs"] + 1))
    assert all(a["time_s"] < b["time_s"] for a, b in itertools.pairwise(lines))


@pytest.mark.parametrize("num_interrupts", [1, 2])
def test_a_constructor_that_does_not_come_back_holds_nobody_up(tmp_path: Path, num_interrupts: int) -> None:
    (tmp_path / "own.py").write_text(
        "import time\nfrom aiorl.models.mlp import MLP\n\n\nclass Slow(MLP):\n"
        "    def __init__(self, *arguments):\n        print('constructing', flush=True)\n        time.sleep(600)\n"
    )
    with running(tmp_path / "run", "model.name=own:Slow", cwd=tmp_path) as run:
        run.wait_for("constructing")
        started = time.monotonic()
        for _ in range(num_interrupts):
            os.kill(run.process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                run.process.wait(0.2)
        assert run.end() == 130, run.text
        assert time.monotonic() - started < (1.0 if num_interrupts == 2 else 3.0)
    assert run.text.splitlines()[-1] == "stopped at once"
    assert "Traceback" not in run.text
    assert not (tmp_path / "run").exists()


def test_an_update_that_does_not_come_back_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import time\nfrom aiorl.tasks.ppo import PPO\n\n\nclass Slow(PPO):\n"
        "    def compute_loss(self, *arguments):\n        print('learning', flush=True)\n        time.sleep(600)\n"
    )
    with running(tmp_path / "run", *ENDLESS, "task.name=own:Slow", cwd=tmp_path) as run:
        run.wait_for("learning")
        workers = psutil.Process(run.process.pid).children()
        for _ in range(3):
            os.kill(run.process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                run.process.wait(0.2)
        assert run.end() == 130, run.text
        assert psutil.wait_procs(workers, timeout=5)[1] == []
    assert run.text.splitlines()[-1] == "stopped at once"
    assert "Traceback" not in run.text


def test_interrupts_while_the_process_ends_change_nothing(tmp_path: Path) -> None:
    with running(tmp_path, *ENDLESS) as run:
        run.wait_for_epoch()
        os.kill(run.process.pid, signal.SIGTERM)
        run.wait_for("to go on: ")
        while run.process.poll() is None:
            os.kill(run.process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                run.process.wait(0.002)
        assert run.end() == 143, run.text
    assert "Traceback" not in run.text
