"""The folder of a run: what lies where, who owns it, and files that are replaced whole or not at all.

Everything here blocks (disk, and git for the provenance): call it before the loop starts, after it ended, or in a
thread. It knows no torch; what lies in ``checkpoints/`` is the learner's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import logging
import logging.handlers
import math
import os
import platform
import queue
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aiorl.errors import ConfigError, Fault, RunFolderBusy, RunFolderError
from aiorl.monitoring.metrics import EpochRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

# Distributions whose versions a run depends on, those that are installed.
_DISTRIBUTIONS = (
    "aiorl", "torch", "numpy", "gymnasium", "pyzmq", "msgpack", "uvloop", "pydantic", "tomlkit", "cyclopts", "rich",
    "psutil", "nvidia-ml-py", "safetensors", "tensorboardX", "ale-py", "box2d", "mujoco", "minigrid", "envpool",
)  # fmt: skip
# Log records that wait for the disk; beyond them records are dropped, and logging says so on standard error.
_MAX_WAITING_RECORDS = 10_000


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run's files lie.

    Constructing one touches no disk; ``create`` makes the folder.

    Attributes:
        path: The folder.
        log_dir_name: Name of the folder in it that holds TensorBoard events and ``run.log``.
    """

    path: Path
    log_dir_name: str = "logs"

    @classmethod
    def create(
        cls, exp_dir: str | None, exp_name: str, *, root: str | Path = "runs", log_dir_name: str = "logs"
    ) -> RunFolder:
        """Make the folder of a run, or take an existing one that is named.

        Args:
            exp_dir: The folder; None for ``<root>/<exp_name>/run_<k>`` with the first k that is free, where two
                processes at once get different ones.
            exp_name: Name of the experiment.
            root: Where experiments lie.
            log_dir_name: Name of the folder for logs.

        Raises:
            ConfigError: It cannot be made or written; the fault is on ``trainer.exp_dir``.
        """
        if found := cls.faults(exp_dir, exp_name, root=root):
            raise ConfigError(found)
        path = _place(exp_dir, exp_name, root)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if exp_dir is None:
                path = _first_free(path)
        except (OSError, ValueError) as error:
            raise ConfigError([_fault(exp_dir, f"{path} cannot be made: {_said(error)}")]) from error
        return cls(path, log_dir_name)

    @classmethod
    def named(cls, exp_dir: str) -> RunFolder:
        """The folder that ``trainer.exp_dir`` names, ``~`` included, whether it is there or not."""
        return cls(_place(exp_dir, "", ""))

    @staticmethod
    def faults(exp_dir: str | None, exp_name: str, *, root: str | Path = "runs") -> list[Fault]:
        """What keeps ``create`` from making and writing the folder; makes folders to see, and leaves nothing."""
        path = _place(exp_dir, exp_name, root)
        try:
            existing = next(each for each in (path, *path.parents) if os.path.lexists(each))
            if not existing.is_dir():
                return [_fault(exp_dir, f"{path} leads through {existing}, which is no folder")]
        except (OSError, ValueError) as error:
            return [_fault(exp_dir, f"{path} cannot be used: {_said(error)}")]
        try:
            # Mode bits say nothing to root, nor on a read-only file system or in /proc: only trying does.
            with tempfile.TemporaryDirectory(prefix=".aiorl-", dir=existing) as probe:
                (Path(probe) / path.relative_to(existing)).mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            failing = "written" if path == existing else "made"
            return [_fault(exp_dir, f"{path} cannot be {failing}: {_said(error)}")]
        return []

    @property
    def config_file(self) -> Path:
        """The resolved configuration, TOML."""
        return self.path / "config.toml"

    @property
    def calibration_file(self) -> Path:
        """The measured numbers of workers and environments, where they were measured."""
        return self.path / "calibration.json"

    @property
    def provenance_file(self) -> Path:
        """Versions, commit, host and command line."""
        return self.path / "provenance.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per epoch."""
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        """How the run ended."""
        return self.path / "summary.json"

    @property
    def log_dir(self) -> Path:
        """TensorBoard events and ``run.log``."""
        return self.path / self.log_dir_name

    @property
    def log_file(self) -> Path:
        """What was logged."""
        return self.log_dir / "run.log"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints, a folder each."""
        return self.path / "checkpoints"

    @property
    def ending(self) -> str | None:
        """How the run ended, in words; None for one that has not, or was killed."""
        try:
            summary = dict(json.loads(self.summary_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        error = summary.get("error")
        return f"its run {summary.get('status')}{f', {error}' if error else ''}"

    @property
    def holds_checkpoint(self) -> bool:
        """Whether there is at least one whole checkpoint to go on from."""
        return any(not manifest.parent.name.startswith(".") for manifest in self.checkpoints.glob("*/manifest.json"))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Own the folder; at the end, however the process ends, it is free again.

        Raises:
            RunFolderBusy: Another live trainer owns it; the message names its process and host.
            RunFolderError: The lock's file cannot be written.
        """
        path = self.path / ".lock"
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written: {_said(error)}", folder=self.path) from error
        with file:
            try:
                # The kernel's lock dies with its owner: what an earlier run left in the file is no obstacle.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise RunFolderBusy(f"{self.path} is in use by {owner}", folder=self.path) from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise RunFolderError(f"{path} cannot be locked: {_said(error)}", folder=self.path) from error
                logger.warning("%s is on a file system without locks: nothing keeps a second run out", self.path)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)

    def write_config(self, text: str) -> None:
        """Write the resolved configuration."""
        _replace(self.config_file, text)

    def write_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Write what was measured, so that it is not measured again."""
        _replace(self.calibration_file, dump_json(calibration, indent=2))

    def read_calibration(self) -> dict[str, Any] | None:
        """What `write_calibration` wrote; None where there is nothing, or nothing that can be read."""
        try:
            found = json.loads(self.calibration_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write_provenance(self, extra: Mapping[str, Any] | None = None) -> None:
        """Write what this run was made with; what earlier starts in the folder wrote stays under ``earlier_starts``.

        Args:
            extra: More to write, for example the device.
        """
        earlier: list[Any] = []
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            previous = dict(json.loads(self.provenance_file.read_text(encoding="utf-8")))
            earlier = [*previous.pop("earlier_starts", []), previous]
        record = {**_provenance(), **(extra or {})}
        _replace(self.provenance_file, dump_json(record | ({"earlier_starts": earlier} if earlier else {}), indent=2))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write how the run ended, or stands."""
        _replace(self.summary_file, dump_json(summary, indent=2))

    def truncate_metrics(self, num_epochs: int) -> int:
        """Remove the metrics of epochs after ``num_epochs``, and a last line that was torn by a kill.

        Args:
            num_epochs: Epochs that the checkpoint has learned, counted from 1.

        Returns:
            How many lines were removed.
        """
        try:
            lines = self.metrics_file.read_bytes().splitlines()
        except FileNotFoundError:
            return 0
        kept = [line for line in lines if _epoch(line) <= num_epochs]
        _replace(self.metrics_file, b"".join(line + b"\n" for line in kept).decode())
        return len(lines) - len(kept)


@contextlib.contextmanager
def log_to(folder: RunFolder, level: int = logging.INFO) -> Iterator[None]:
    """Write what the logger ``aiorl`` and those below it get into the folder's ``run.log``, appending.

    A thread writes, so that a slow disk does not hold whoever logs. At the end everything is written, the thread is
    joined, and the logger is as it was.
    """
    folder.log_dir.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder.log_file, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    waiting: queue.Queue[Any] = queue.Queue(_MAX_WAITING_RECORDS)
    handler = logging.handlers.QueueHandler(waiting)
    handler.setLevel(level)
    listener = logging.handlers.QueueListener(waiting, file)
    ours = logging.getLogger("aiorl")
    before = ours.level
    ours.setLevel(min(level, ours.getEffectiveLevel()))
    ours.addHandler(handler)
    listener.start()
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before)
        handler.close()
        listener.stop()
        file.close()


def dump_json(value: Any, indent: int | None = None) -> str:
    """JSON text of plain data, NumPy scalars and paths; what is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()  # a NumPy scalar: on the host
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _place(exp_dir: str | None, exp_name: str, root: str | Path) -> Path:
    """The folder that is named, or the one under which runs are numbered."""
    return (Path(exp_dir).expanduser() if exp_dir is not None else Path(root) / exp_name).absolute()


def _first_free(parent: Path) -> Path:
    """Make ``run_<k>`` with the first k that is free; mkdir is what decides between two that try at once."""
    number = 0
    while True:
        path = parent / f"run_{number}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _fault(exp_dir: str | None, message: str) -> Fault:
    value = f'"{exp_dir}"' if exp_dir is not None else '"none"'
    return Fault("trainer.exp_dir", message, value=value, remedy="name a folder that can be written")


def _said(error: OSError | ValueError) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _epoch(line: bytes) -> float:
    """The epoch of a line of metrics; infinite for one that is torn."""
    try:
        return EpochRecord.from_json(line).epoch
    except ValueError:
        return math.inf


def _replace(path: Path, text: str) -> None:
    """Replace a file's content: after a kill at any point it is the old or the new, whole."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text if text.endswith("\n") or not text else f"{text}\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _provenance() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "working_folder": str(Path.cwd()),
        "import_path": _import_path(),
        "git_commit": _git_commit(),
        "host": platform.node(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "pid": os.getpid(),
        "versions": versions,
    }


def _import_path() -> list[str]:
    """Where modules are imported from, but for what is installed."""
    installed = (sys.prefix, sys.base_prefix)
    folders = [Path(entry).absolute() for entry in sys.path]
    return [str(path) for path in folders if path.is_dir() and not any(map(path.is_relative_to, installed))]


def _git_commit() -> str | None:
    """The commit of the working folder, ``-dirty`` after it where files differ from it; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
