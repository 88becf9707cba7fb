"""The folder of a run: numbering, faults, the lock, and files that are whole or not there."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from aiorl.errors import ConfigError, RunFolderBusy, RunFolderError
from aiorl.learning.config import RUN_FOLDER_NAMES
from aiorl.monitoring.folder import RunFolder, dump_json, log_to
from aiorl.monitoring.metrics import EpochRecord

if TYPE_CHECKING:
    from pathlib import Path


def line(epoch: int) -> bytes:
    return EpochRecord.make(epoch=epoch, num_samples=epoch * 10, time_s=0.5, metrics={}).to_json().encode()


def test_the_first_free_number_is_taken(tmp_path: Path) -> None:
    (tmp_path / "pole" / "run_0").mkdir(parents=True)
    (tmp_path / "pole" / "run_1").write_text("a file takes a number too")
    (tmp_path / "pole" / "run_3").mkdir()
    assert RunFolder.create(None, "pole", root=tmp_path).path == tmp_path / "pole" / "run_2"
    assert RunFolder.create(None, "pole", root=tmp_path).path == tmp_path / "pole" / "run_4"


def test_a_relative_root_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunFolder.create(None, "pole").path == tmp_path / "runs" / "pole" / "run_0"


def test_many_at_once_get_different_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as executor:
        folders = list(executor.map(lambda _: RunFolder.create(None, "pole", root=tmp_path).path, range(40)))
    assert sorted(folder.name for folder in folders) == sorted(f"run_{number}" for number in range(40))


def test_a_named_folder_is_made_or_taken(tmp_path: Path) -> None:
    first = RunFolder.create(str(tmp_path / "a" / "b"), "pole", log_dir_name="journal")
    first.write_config("x = 1")
    again = RunFolder.create(str(tmp_path / "a" / "b"), "pole", log_dir_name="journal")
    assert again == first
    assert again.config_file.read_text() == "x = 1\n"
    assert again.log_file == tmp_path / "a" / "b" / "journal" / "run.log"


def test_a_path_through_a_file_is_a_fault_and_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    exp_dir = str(tmp_path / "file" / "x" / "run")
    with pytest.raises(ConfigError, match=r"leads through .*file, which is no folder") as raised:
        RunFolder.create(exp_dir, "pole")
    (fault,) = raised.value.faults
    assert fault.path == "trainer.exp_dir"
    assert fault.value == f'"{exp_dir}"'
    assert RunFolder.faults(str(tmp_path / "new" / "run"), "pole") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_the_root_may_be_at_fault_too(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(ConfigError, match=r"runs, which is no folder"):
        RunFolder.create(None, "pole", root=tmp_path / "runs")


def test_a_dangling_link_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="which is no folder"):
        RunFolder.create(str(tmp_path / "link"), "pole")


def test_a_name_too_long_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long"):
        RunFolder.create(str(tmp_path / ("x" * 300)), "pole")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_folder_that_cannot_be_written_is_a_fault() -> None:
    # Not even root makes a folder in /proc, whatever its mode bits say.
    for exp_dir in ("/proc/aiorl", "/proc"):
        (fault,) = RunFolder.faults(exp_dir, "pole")
        assert fault.path == "trainer.exp_dir"
        with pytest.raises(ConfigError, match=f"{exp_dir} cannot be (made|written)"):
            RunFolder.create(exp_dir, "pole")


def test_looking_for_faults_leaves_nothing(tmp_path: Path) -> None:
    assert RunFolder.faults(str(tmp_path / "a" / "b"), "pole") == []
    assert RunFolder.faults(str(tmp_path), "pole") == []
    (fault,) = RunFolder.faults(str(tmp_path / ("x" * 300)), "pole")
    assert "too long" in fault.message
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_is_the_home_for_whoever_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder.named("~/run").path == tmp_path / "run" == RunFolder.create("~/run", "pole").path


def test_logs_may_not_take_the_name_of_another_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    records = (folder.config_file, folder.calibration_file, folder.provenance_file, folder.metrics_file)
    assert sorted(path.name for path in (*records, folder.summary_file, folder.checkpoints)) == sorted(RUN_FOLDER_NAMES)


@pytest.mark.parametrize(
    ("summary", "told"),
    [
        (None, None),
        ({"status": "finished", "error": None}, "its run finished"),
        ({"status": "failed", "error": "OSError: no disk"}, "its run failed, OSError: no disk"),
    ],
)
def test_how_a_run_ended(tmp_path: Path, summary: dict[str, str] | None, told: str | None) -> None:
    folder = RunFolder(tmp_path)
    if summary is not None:
        folder.write_summary(summary)
    assert folder.ending == told


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="run cannot be made: Permission denied"):
        RunFolder.create(str(tmp_path / "locked" / "run"), "pole")


HOLD = """
import sys
from pathlib import Path
from aiorl.monitoring.folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_live_trainer_is_refused_and_a_dead_one_is_no_obstacle(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunFolderBusy, match=rf"in use by process {other.pid} on ") as raised, folder.lock():
            pass
        assert raised.value.folder == tmp_path
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert f"process {other.pid}" in (tmp_path / ".lock").read_text()  # it could not clean up
    with folder.lock():
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()


def test_the_lock_holds_within_one_process_and_ends_with_its_block(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def fail_inside() -> None:
        with folder.lock():
            with pytest.raises(RunFolderBusy, match=f"process {os.getpid()} "), folder.lock():
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    with folder.lock():
        pass


def test_a_lock_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"\.lock cannot be written"), RunFolder(tmp_path / "absent").lock():
        pass


def test_provenance_tells_what_the_run_was_made_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    work = tmp_path / "work"
    subprocess.run([*git, "init", "--quiet", str(work)], check=True)
    monkeypatch.chdir(work)
    (work / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "one"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    folder = RunFolder.create(str(tmp_path / "run"), "pole")
    folder.write_provenance({"device": "cpu"})
    first = json.loads(folder.provenance_file.read_text())
    assert first["git_commit"] == commit
    assert first["device"] == "cpu"
    assert first["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "numpy", "gymnasium", "pyzmq"} <= set(first["versions"])
    assert {"host", "command", "started", "working_folder"} <= set(first)

    (work / "file").write_text("two")
    folder.write_provenance()
    folder.write_provenance()
    third = json.loads(folder.provenance_file.read_text())
    assert third["git_commit"] == f"{commit}-dirty"
    assert [start["git_commit"] for start in third["earlier_starts"]] == [commit, f"{commit}-dirty"]
    assert third["earlier_starts"][0] == first

    folder.provenance_file.write_text('{"torn')
    monkeypatch.chdir(tmp_path)
    folder.write_provenance()
    assert json.loads(folder.provenance_file.read_text())["git_commit"] is None


def test_the_summary_holds_plain_finite_numbers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_summary({"status": "failed"})
    folder.write_summary(
        {
            "status": "stopped",
            "episode_return_mean": math.nan,
            "wall_s": np.float32(0.5),
            "num_samples": np.int64(7),
            "nested": [math.inf, {"a": np.float64("-inf")}, (1.5, True, None)],
            "folder": tmp_path,
        }
    )
    assert json.loads(folder.summary_file.read_text()) == {
        "status": "stopped",
        "episode_return_mean": None,
        "wall_s": 0.5,
        "num_samples": 7,
        "nested": [None, {"a": None}, [1.5, True, None]],
        "folder": str(tmp_path),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]  # no temporary file stays


def test_json_refuses_what_is_not_plain() -> None:
    with pytest.raises(TypeError):
        dump_json({"a": object()})


@pytest.mark.parametrize(
    ("content", "kept", "removed"),
    [
        (b"".join(line(epoch) + b"\n" for epoch in range(1, 6)), [1, 2, 3], 2),
        (line(1) + b"\n" + line(2) + b"\n" + line(3)[:20], [1, 2], 1),
        (line(1) + b"\n" + line(2), [1, 2], 0),  # whole, and only its newline is missing
        (line(1) + b"\n" + b"\0" * 64, [1], 1),
        (b"", [], 0),
    ],
)
def test_metrics_beyond_the_checkpoint_are_removed(
    tmp_path: Path, content: bytes, kept: list[int], removed: int
) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics_file.write_bytes(content)
    assert folder.truncate_metrics(3) == removed
    assert folder.metrics_file.read_bytes() == b"".join(line(epoch) + b"\n" for epoch in kept)


def test_no_metrics_are_nothing_to_remove(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).truncate_metrics(3) == 0
    assert list(tmp_path.iterdir()) == []


def test_only_a_whole_checkpoint_counts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not folder.holds_checkpoint
    unfinished = folder.checkpoints / ".saving_000001_step_5"
    unfinished.mkdir(parents=True)
    (unfinished / "manifest.json").write_text("{}")
    assert not folder.holds_checkpoint
    unfinished.rename(folder.checkpoints / "000001_step_5")
    assert folder.holds_checkpoint


def test_the_log_goes_to_the_folder_and_stops_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    ours, elsewhere = logging.getLogger("aiorl.somewhere"), logging.getLogger("elsewhere")
    root = logging.getLogger("aiorl")
    before = (root.level, list(root.handlers))
    with log_to(folder):
        ours.info("epoch %d", 1)
        ours.debug("too fine")
        elsewhere.warning("not ours")
        try:
            raise ValueError("the cause")
        except ValueError:
            ours.exception("it failed")
    ours.warning("after the end")
    with log_to(folder):
        ours.info("epoch 2")
    text = folder.log_file.read_text()
    assert "INFO aiorl.somewhere: epoch 1\n" in text
    assert "ValueError: the cause" in text
    assert text.index("epoch 1") < text.index("it failed") < text.index("epoch 2")
    assert not any(word in text for word in ("too fine", "not ours", "after the end"))
    assert (root.level, root.handlers) == before


def test_a_host_that_logs_more_keeps_its_level(tmp_path: Path) -> None:
    root = logging.getLogger("aiorl")
    root.setLevel(logging.DEBUG)
    try:
        with log_to(RunFolder(tmp_path)):
            assert root.isEnabledFor(logging.DEBUG)
        assert root.level == logging.DEBUG
    finally:
        root.setLevel(logging.NOTSET)
    assert RunFolder(tmp_path).log_file.read_text() == ""


def test_no_torch_is_imported() -> None:
    code = "import sys, aiorl.monitoring.folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
