"""Runs of the program as real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]

SMALL = (
    "trainer.sampling.num_epoch_samples=256",
    "trainer.sampling.max_wait_time=0.0",
    "task.minibatch_size=128",
    "task.num_update_epochs=1",
    "task.environment.envs_per_worker=4",
    "model.hidden_sizes=[16]",
    "logger.tensorboard=false",
)
"""Overrides that make a run small and quick."""


def arguments(exp_dir: Path, *overrides: str, verb: str = "run") -> list[str]:
    """``python -m aiorl run`` with no file and small settings."""
    sets = [f"trainer.exp_dir={exp_dir}", *SMALL, *overrides]
    return [
        sys.executable,
        "-X",
        "dev",
        "-W",
        "error",
        "-m",
        "aiorl",
        verb,
        *(part for each in sets for part in ("--set", each)),
    ]


def environ(exp_dir: Path) -> dict[str, str]:
    """The environment of a process that finds the tests' worlds."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "AIORL_TEST_STICK": str(exp_dir / "stick")}


def run_to_end(exp_dir: Path, *overrides: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Runs to the end."""
    return subprocess.run(
        arguments(exp_dir, *overrides),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=environ(exp_dir),
    )


class Process:
    """A run that is going on, watched through its output and its files."""

    def __init__(self, exp_dir: Path, process: subprocess.Popen[str]) -> None:
        self.exp_dir = exp_dir
        self.process = process
        self.output: list[str] = []
        self._epochs = threading.Condition()
        self._num_epochs = 0
        self._reader = threading.Thread(target=self._read, name="output of a run")
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            with self._epochs:
                if "epoch=" in line:
                    self._num_epochs += 1
                self._epochs.notify_all()
        with self._epochs:
            self._num_epochs = 10**9
            self._epochs.notify_all()

    def wait_for_epoch(self, timeout: float = 30.0) -> None:
        """Returns when the run has reported an epoch more than when it was called."""
        with self._epochs:
            goal = self._num_epochs + 1
            assert self._epochs.wait_for(lambda: self._num_epochs >= goal, timeout), "".join(self.output)
        assert self.process.poll() is None, "".join(self.output)

    def wait_for(self, text: str, timeout: float = 30.0) -> None:
        """Returns when a line of the output holds `text`."""
        with self._epochs:
            assert self._epochs.wait_for(lambda: any(text in line for line in self.output), timeout), self.text

    def end(self, timeout: float = 30.0) -> int:
        """Waits for the end; returns the exit status."""
        status = self.process.wait(timeout)
        self._reader.join()
        return status

    @property
    def text(self) -> str:
        return "".join(self.output)


@contextmanager
def running(exp_dir: Path, *overrides: str, cwd: Path | None = None) -> Iterator[Process]:
    """A run that goes on until the body ends it; killed where it does not."""
    command = arguments(exp_dir, "logger.interval_s=0.01", *overrides)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environ(exp_dir),
        cwd=cwd,
        start_new_session=True,
    ) as process:
        run = Process(exp_dir, process)
        try:
            yield run
        finally:
            if process.poll() is None:
                process.kill()
            run.end()


def summary(exp_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((exp_dir / "summary.json").read_text())
    return content


def metrics(exp_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (exp_dir / "metrics.jsonl").read_text().splitlines()]
