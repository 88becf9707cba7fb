"""Signals: drained, checkpointed, left with 128 + n; never an orphan."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import psutil
import pytest

from aiorl.learning.checkpoint import CheckpointStore
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
