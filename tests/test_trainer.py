"""The trainer by itself, without a configuration file or a run object."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
import torch

import aiorl
from aiorl.learning.checkpoint import CheckpointStore
from aiorl.preparation import check
from aiorl.tasks.base import build_task
from tests.integration.running import SMALL, metrics, summary

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from aiorl.config import Config

pytestmark = pytest.mark.anyio


def _adam(params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)


def _halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Of torch's own kind: stepped once for each optimizer step."""
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)


async def _train(config: Config) -> aiorl.State:
    task, model = build_task(config.task), check(config)
    return await aiorl.ReinforcementLearningTrainer(config.trainer).train(model, task, _adam, _halving)


async def test_it_trains_to_its_limit_and_goes_on_from_its_folder(tmp_path: Path) -> None:
    overrides = [f"trainer.exp_dir={tmp_path}", *SMALL, "task.environment.num_env_workers=1"]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    state = await _train(aiorl.load_config(None, [*overrides, "trainer.max_epochs=3"]))
    assert (state.num_epochs, state.num_samples, state.num_steps, state.policy_version) == (3, 3 * 256, 6, 3)
    assert summary(tmp_path)["status"] == "finished"
    assert [line["metrics"]["learner/lr"] for line in metrics(tmp_path)] == [1e-2, 5e-3, 5e-3]

    state = await _train(aiorl.load_config(None, [*overrides, "trainer.max_epochs=5"]))
    assert (state.num_epochs, state.num_samples, state.num_steps) == (5, 5 * 256, 10)
    assert [line["epoch"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert metrics(tmp_path)[-1]["metrics"]["learner/lr"] == pytest.approx(2.5e-3)
    loaded = CheckpointStore(tmp_path / "checkpoints", only_most_recent=True).load().contents
    assert loaded.state == state.state_dict()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
