"""What a run goes on from, what it refuses to go on from, and what it leaves untouched then."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from aiorl.config import load_config
from aiorl.errors import CheckpointCorrupt, CheckpointMissing, ConfigError, RunMismatch
from aiorl.learning.checkpoint import CheckpointStore
from aiorl.learning.snapshot import Buffers, Contents
from aiorl.preparation import check, prepare, restore
from aiorl.tasks.ppo import PPO
from tests.integration.running import SMALL

if TYPE_CHECKING:
    from pathlib import Path

    from aiorl.config import Config
    from aiorl.monitoring.folder import RunFolder
    from aiorl.preparation import Prepared, Resume

pytestmark = pytest.mark.anyio


def configured(exp_dir: Path | str, *overrides: str) -> Config:
    return load_config(None, [f"trainer.exp_dir={exp_dir}", *SMALL, *overrides])


def prepared(config: Config, resume: Resume = "auto") -> Prepared:
    return prepare(config, None, None, None, None, resume)


async def saved(config: Config, num_steps: int = 6) -> RunFolder:
    """A folder of a run that has left a checkpoint."""
    folder = prepared(config).folder
    assert restore(config, folder, "auto") is None
    contents = Contents(
        model={"weight": torch.full((2,), float(num_steps))},
        optimizer={"state": {}, "param_groups": []},
        scheduler={},
        state={"num_steps": num_steps},
    )
    await CheckpointStore(folder.checkpoints, only_most_recent=True).save(Buffers().copy(contents))
    return folder


# ---------------------------------------------------------------------- before anything is written
def test_a_compiler_that_torch_does_not_know_is_a_fault(tmp_path: Path) -> None:
    known = configured(tmp_path / "run", "trainer.compiler.model=true", "trainer.compiler.backend=eager")
    check(known)
    with pytest.raises(ConfigError, match=r"trainer\.compiler\.backend.*did you mean \"inductor\""):
        check(configured(tmp_path / "run", "trainer.compiler.model=true", "trainer.compiler.backend=inductr"))


def test_a_run_that_must_be_resumed_and_cannot_be_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match="holds no checkpoint to resume"):
        prepared(configured(tmp_path / "new"), "must")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_checkpoint_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".saving_000001_step_2").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".saving_000001_step_2" / "manifest.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointMissing, match=str(tmp_path)):
        prepared(configured(tmp_path), "must")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_must_be_resumed_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointMissing, match=r"a new folder holds no checkpoint.*trainer\.exp_dir"):
        prepared(load_config(None, SMALL), "must")
    assert not list(tmp_path.iterdir())


def test_a_configuration_with_faults_makes_no_folder(tmp_path: Path) -> None:
    """And all of them are told."""
    config = configured(tmp_path / "new", "task.environment.id=NoSuch-v0", f"link.endpoint=ipc://{'long' * 40}")
    with pytest.raises(ConfigError) as caught:
        prepared(config)
    assert {fault.path for fault in caught.value.faults} == {"link.endpoint", "task.environment.id"}
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- what is built
def test_weights_are_a_function_of_the_seed_and_the_host_keeps_its_generator(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second, other = (check(configured(tmp_path, f"trainer.seed={seed}")).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_what_was_given_is_taken(tmp_path: Path) -> None:
    config = configured(tmp_path)
    task, model = PPO(), check(config)

    def optimizer(params: object) -> torch.optim.Optimizer:
        raise AssertionError("built too early")

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        raise AssertionError("built too early")

    built = prepare(config, task, model, optimizer, schedule, "auto")
    assert built.task is task
    assert built.model is model
    assert built.optimizer is optimizer
    assert built.lr_scheduler is schedule
    assert built.folder.path == tmp_path


# ---------------------------------------------------------------------- going on
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_new_run_writes_what_it_was_made_with(tmp_path: Path, resume: Resume) -> None:
    config = configured(tmp_path / "a" / "b")
    folder = prepared(config, resume).folder
    assert restore(config, folder, resume) is None
    assert load_config(folder.config_file) == config
    assert json.loads(folder.provenance_file.read_text())["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("resume", ["auto", "must"])
async def test_a_run_with_a_checkpoint_is_gone_on_from(tmp_path: Path, resume: Resume) -> None:
    """Its file is that of the newest start, the differences that it may have included."""
    await saved(configured(tmp_path))
    config = configured(tmp_path, "trainer.max_epochs=7", "optimizer.lr=0.25")
    folder = prepared(config, resume).folder
    contents = restore(config, folder, resume)
    assert contents is not None
    assert contents.state == {"num_steps": 6}
    assert contents.model["weight"].tolist() == [6.0, 6.0]
    assert load_config(folder.config_file) == config
    assert len(json.loads(folder.provenance_file.read_text())["earlier_starts"]) == 1


async def test_a_run_that_must_not_be_gone_on_from_is_refused(tmp_path: Path) -> None:
    config = configured(tmp_path)
    folder = await saved(config)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(RunMismatch, match="holds a run already") as caught:
        restore(configured(tmp_path, "trainer.max_epochs=7"), folder, "never")
    assert caught.value.folder == tmp_path
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("resume", ["auto", "must"])
async def test_every_difference_that_makes_another_run_is_listed(tmp_path: Path, resume: Resume) -> None:
    folder = await saved(configured(tmp_path))
    before = folder.config_file.read_bytes()
    config = configured(tmp_path, "task.gamma=0.5", "model.hidden_sizes=[8]", "trainer.seed=3", "trainer.max_epochs=9")
    with pytest.raises(RunMismatch) as caught:
        restore(config, folder, resume)
    lines = str(caught.value).splitlines()
    assert [line.strip() for line in lines[1:-1]] == [
        "trainer.seed: 1337 → 3",
        "task.gamma: 0.99 → 0.5",
        "model.hidden_sizes: [16] → [8]",
    ]
    assert folder.config_file.read_bytes() == before


async def test_a_run_without_a_configuration_file_is_gone_on_from(tmp_path: Path) -> None:
    """The trainer alone writes none."""
    config = configured(tmp_path)
    folder = await saved(config)
    folder.config_file.unlink()
    assert restore(config, folder, "must") is not None
    assert load_config(folder.config_file) == config


async def test_nothing_begins_anew_over_a_corrupt_checkpoint(tmp_path: Path) -> None:
    config = configured(tmp_path)
    folder = await saved(config)
    for path in folder.checkpoints.glob("*/training.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointCorrupt):
        restore(config, folder, "auto")


async def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = configured("~/mine")
    folder = await saved(config)
    assert folder.path == tmp_path / "mine"
    assert restore(config, prepared(config, "must").folder, "must") is not None
