"""Runs that were stopped, failed or were copied, and go on: from where, and with what."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import ExponentialLR

import aiorl
from aiorl.compute.distributions import Categorical
from aiorl.errors import CheckpointCorrupt
from aiorl.learning.checkpoint import CheckpointStore, load_weights
from aiorl.models.base import Model
from aiorl.monitoring.metrics import depends_on_clock
from aiorl.preparation import check
from aiorl.tasks.config import PPOConfig
from aiorl.tasks.ppo import PPO
from tests.integration.running import SMALL, metrics, summary

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from aiorl.config import Config
    from aiorl.learning.snapshot import Contents
    from aiorl.sampling.trajectory import TrajectoryBatch

pytestmark = pytest.mark.anyio

ROWS, ENVS = 256, 4  # of an epoch, as SMALL says; it makes two optimizer steps


def configured(exp_dir: Path, *overrides: str) -> Config:
    local = "task.environment.num_env_workers=0"
    return aiorl.load_config(None, [f"trainer.exp_dir={exp_dir}", *SMALL, local, *overrides])


async def run_through(config: Config, **options: Any) -> list[aiorl.EpochReport]:
    async with aiorl.open_run(config, **options) as run:
        reports = [report async for report in run]
        await run.wait()
    return reports


def newest(exp_dir: Path) -> Contents:
    return CheckpointStore(exp_dir / "checkpoints", only_most_recent=True).load().contents


class Watched:
    """An optimizer factory and a callback that note what a run begins with."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.optimizer_state: dict[int, dict[str, Tensor]] = {}
        self.loaded: list[int] = []
        self.started: dict[str, Any] = {}
        self.callback = self._callback()

    def build(self, params: Iterable[nn.Parameter]) -> Adam:
        self.optimizer = Adam(params, lr=1e-3, fused=True)
        return self.optimizer

    def _callback(self) -> aiorl.Callback:
        watched = self

        class Begins(aiorl.Callback):
            def on_after_load_checkpoint(self, state: aiorl.State) -> None:
                watched.loaded.append(state.num_epochs)

            def on_training_start(self, state: aiorl.State) -> None:
                watched.started = dict(state.state_dict())
                watched.weights = [weight.detach().clone() for weight in watched.optimizer.param_groups[0]["params"]]
                watched.optimizer_state = {
                    number: {name: value.clone() for name, value in state_of.items()}
                    for number, state_of in watched.optimizer.state_dict()["state"].items()
                }

        return Begins()

    def has_weights_of(self, config: Config, weights: dict[str, Tensor]) -> bool:
        names = [name for name, _ in check(config).named_parameters()]
        return len(names) == len(self.weights) and all(
            torch.equal(weights[name], own) for name, own in zip(names, self.weights, strict=True)
        )


async def test_a_run_goes_on_from_where_it_stood(tmp_path: Path) -> None:
    options = ("lr_scheduler.name=linear", f"trainer.max_samples={8 * ROWS}")
    reports = await run_through(configured(tmp_path, *options, "trainer.max_steps=6"))
    assert [report.epoch for report in reports] == [1, 2, 3]
    assert [report.metrics["learner/lr"] for report in reports] == pytest.approx([1e-3, 7e-3 / 8, 6e-3 / 8])
    before = newest(tmp_path)
    assert before.exact

    watched = Watched()
    config = configured(tmp_path, *options, "trainer.max_steps=8")
    more = await run_through(config, optimizer=watched.build, callbacks=[watched.callback], resume="must")
    assert watched.loaded == [3]
    assert watched.started == before.state
    assert {name: watched.started[name] for name in ("num_epochs", "num_steps", "num_samples", "policy_version")} == {
        "num_epochs": 3,
        "num_steps": 6,
        "num_samples": 3 * ROWS,
        "policy_version": 3,
    }
    assert watched.has_weights_of(config, dict(before.model))
    moments = before.optimizer["state"]
    assert watched.optimizer_state.keys() == moments.keys()
    assert all(
        torch.equal(value, watched.optimizer_state[number][name])
        for number, state in moments.items()
        for name, value in state.items()
    )
    assert all(state["step"] == 6 for state in watched.optimizer_state.values())

    (report,) = more
    assert (report.epoch, report.num_samples, report.policy_version) == (4, 4 * ROWS, 4)
    assert report.metrics["learner/lr"] == pytest.approx(5e-3 / 8)
    assert report.metrics["learner/num_steps"] == 8
    after = newest(tmp_path)
    assert after.extra["incarnation"] == before.extra["incarnation"] + 1 == 1
    assert after.state["elapsed_time_s"] > before.state["elapsed_time_s"]
    assert all(state["step"] == 8 for state in after.optimizer["state"].values())
    assert before.extra["noise_counts"].tolist() == [3 * ROWS // ENVS] * ENVS
    assert after.extra["noise_counts"].tolist() == [4 * ROWS // ENVS] * ENVS

    earlier, later = before.extra["episodes"], after.extra["episodes"]
    assert earlier["num_episodes"] == len(earlier["returns"]) == reports[-1].episodes
    assert 0 < earlier["num_episodes"] < later["num_episodes"] == report.episodes <= 100
    assert later["returns"][: len(earlier["returns"])] == earlier["returns"]
    assert later["lengths"][: len(earlier["lengths"])] == earlier["lengths"]
    assert report.episode_return_mean == pytest.approx(sum(later["returns"]) / len(later["returns"]))


async def test_the_window_holds_the_last_hundred_episodes(tmp_path: Path) -> None:
    """Each of the chain takes 10 steps: after 6 epochs of 256 there were 152, as 4 environments have done 38 each."""
    chain = "task.environment.id=tests.integration.worlds:Chain"
    await run_through(configured(tmp_path, chain, "trainer.max_epochs=6"))
    assert newest(tmp_path).extra["episodes"] == {"returns": [10.0] * 100, "lengths": [10] * 100, "num_episodes": 152}
    (report,) = await run_through(configured(tmp_path, chain, "trainer.max_epochs=7"))
    assert report.episodes == 152 + ENVS * (ROWS // ENVS // 10)  # the environments began anew
    assert len(newest(tmp_path).extra["episodes"]["returns"]) == 100


class Coin(Model):
    """Chooses each of two actions as often, whatever it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 1)

    def policy(self, observations: Tensor) -> Categorical:
        return Categorical(torch.zeros(len(observations), 2) * self.head.bias)

    def value(self, observations: Tensor) -> Tensor:
        values: Tensor = self.head(observations)
        return values.squeeze(1)


class NotesActions(PPO):
    """Notes what each environment did, epoch after epoch."""

    def __init__(self, config: PPOConfig) -> None:
        super().__init__(config)
        self.actions: list[list[int]] = [[] for _ in range(ENVS)]

    def build_rl_dataset(self, batch: TrajectoryBatch) -> dict[str, NDArray[Any]]:
        for trajectory in batch.trajectories():
            self.actions[trajectory.environment] += trajectory.actions.tolist()
        return super().build_rl_dataset(batch)


async def test_actions_are_drawn_on_from_where_they_stood(tmp_path: Path) -> None:
    """Three starts draw one stream of numbers for each environment, none twice and none left out."""
    actions: list[list[int]] = [[] for _ in range(ENVS)]
    for max_epochs in (1, 2, 4):
        chain = "task.environment.id=tests.integration.worlds:Chain"
        config = configured(tmp_path, chain, f"trainer.max_epochs={max_epochs}", "trainer.seed=5")
        assert isinstance(config.task, PPOConfig)
        task = NotesActions(config.task)
        await run_through(config, task=task, model=Coin())
        for own, more in zip(actions, task.actions, strict=True):
            own += more
    for env, own in enumerate(actions):
        noise = np.random.Generator(np.random.Philox(key=np.array([5, env], np.uint64))).random(len(own))
        assert own == (noise >= 0.5).astype(int).tolist()
        assert len(own) == 4 * ROWS // ENVS
    assert newest(tmp_path).extra["incarnation"] == 2


async def test_figures_have_neither_gap_nor_double_after_an_older_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with aiorl.open_run(configured(tmp_path)) as run:
            await anext(run)
            await run.save_checkpoint()
            at = newest(tmp_path).state["num_epochs"]
            async for report in run:
                if report.epoch >= at + 2:
                    raise ZeroDivisionError  # ends at once, without a checkpoint
    before = metrics(tmp_path)
    assert newest(tmp_path).state["num_epochs"] == at
    assert before[-1]["epoch"] >= at + 2
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 99')  # torn by a kill
    await run_through(configured(tmp_path, f"trainer.max_epochs={at + 4}"))
    after = metrics(tmp_path)
    assert [line["epoch"] for line in after] == list(range(1, int(at) + 5))
    assert [line["num_samples"] for line in after] == [ROWS * epoch for epoch in range(1, int(at) + 5)]
    assert after[: int(at)] == before[: int(at)]
    assert all(first["time_s"] < second["time_s"] for first, second in itertools.pairwise(after))
    assert summary(tmp_path)["num_epochs"] == at + 4


async def test_a_run_that_failed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with aiorl.open_run(configured(tmp_path)) as run:
            await anext(run)
            raise ZeroDivisionError
    assert metrics(tmp_path)
    await run_through(configured(tmp_path, "trainer.max_epochs=2"))
    assert [line["epoch"] for line in metrics(tmp_path)] == [1, 2]
    assert newest(tmp_path).extra["incarnation"] == 0


@pytest.mark.parametrize("schedule", ["constant", "linear"])
async def test_a_learning_rate_that_is_configured_anew_is_taken(tmp_path: Path, schedule: str) -> None:
    """Also over one that was set while the run went on; the schedule goes on from where it stands."""
    options = (f"lr_scheduler.name={schedule}", f"trainer.max_samples={4 * ROWS}")
    async with aiorl.open_run(configured(tmp_path, *options, "trainer.max_steps=2")) as run:
        run.set("optimizer.lr", 0.25)
        await run.wait()
    (report,) = await run_through(configured(tmp_path, *options, "trainer.max_steps=4", "optimizer.lr=0.0005"))
    assert report.metrics["learner/lr"] == pytest.approx(0.0005 * (0.75 if schedule == "linear" else 1.0))
    (report,) = await run_through(configured(tmp_path, *options, "trainer.max_steps=6", "optimizer.lr=0.0005"))
    assert report.metrics["learner/lr"] == pytest.approx(0.0005 * (0.5 if schedule == "linear" else 1.0))


async def test_a_scheduler_of_ones_own_goes_on(tmp_path: Path) -> None:
    rates = []
    for max_epochs in (1, 3):
        reports = await run_through(
            configured(tmp_path, f"trainer.max_epochs={max_epochs}"),
            lr_scheduler=lambda optimizer: ExponentialLR(optimizer, 0.5),
        )
        rates += [report.metrics["learner/lr"] for report in reports]
    assert rates == pytest.approx([1e-3 / 4, 1e-3 / 16, 1e-3 / 64])  # two steps an epoch, halved by each


def _steady(exp_dir: Path) -> list[dict[str, Any]]:
    """What must not depend on anything but the seed."""
    return [
        {
            **{name: value for name, value in line["metrics"].items() if not depends_on_clock(name)},
            "epoch": line["epoch"],
            "num_samples": line["num_samples"],
        }
        for line in metrics(exp_dir)
    ]


def _hashes(exp_dir: Path) -> list[str]:
    files = sorted(exp_dir.glob("checkpoints/*/model.safetensors"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


async def test_two_resumptions_of_one_checkpoint_are_equal_to_the_bit(tmp_path: Path) -> None:
    options = (
        "trainer.sampling.force_sync=true",
        "task.environment.num_env_workers=2",
        "trainer.checkpoint.only_save_most_recent=false",
        "trainer.checkpoint.save_every_n_steps=4",
    )
    first, second = tmp_path / "first", tmp_path / "second"
    await run_through(configured(first, *options, "trainer.max_epochs=3"))
    shutil.copytree(first, second)
    for exp_dir in (first, second):
        reports = await run_through(configured(exp_dir, *options, "trainer.max_epochs=7"), resume="must")
        assert [report.epoch for report in reports] == [4, 5, 6, 7]
    assert _steady(first) == _steady(second)
    assert len(_steady(first)) == 7
    assert _hashes(first) == _hashes(second)
    assert len(set(_hashes(first))) > 2  # where it was resumed from, its end, and others between


# ---------------------------------------------------------------------- weights of another run
async def test_a_new_run_may_begin_with_the_weights_of_another(tmp_path: Path) -> None:
    """With nothing else of it; and it goes on from its own checkpoint later."""
    teacher, own = tmp_path / "teacher", tmp_path / "own"
    await run_through(configured(teacher, "trainer.max_epochs=2"))
    weights = load_weights(teacher)
    watched = Watched()
    config = configured(own, f"trainer.checkpoint.load_from_ckpt_path={teacher}", "trainer.max_epochs=1")
    (report,) = await run_through(config, optimizer=watched.build, callbacks=[watched.callback])
    assert watched.has_weights_of(config, weights)
    assert not watched.has_weights_of(config, load_weights(own))
    assert not any(watched.started.values())
    assert not watched.optimizer_state
    assert not watched.loaded
    assert (report.epoch, report.num_samples, report.policy_version) == (1, ROWS, 1)
    assert newest(own).extra["incarnation"] == 0

    learned, again = load_weights(own), Watched()
    config = configured(own, f"trainer.checkpoint.load_from_ckpt_path={teacher}", "trainer.max_epochs=2")
    await run_through(config, optimizer=again.build, callbacks=[again.callback])
    assert again.has_weights_of(config, learned)
    assert again.started["num_epochs"] == 1


async def test_weights_that_do_not_fit_are_refused_or_left_out(tmp_path: Path) -> None:
    teacher, own = tmp_path / "teacher", tmp_path / "own"
    await run_through(configured(teacher, "trainer.max_epochs=1"))
    options = (
        f"trainer.checkpoint.load_from_ckpt_path={teacher}",
        "model.hidden_sizes=[16, 16]",
        "trainer.max_epochs=1",
    )
    with pytest.raises(CheckpointCorrupt, match="are not this model's"):
        await run_through(configured(own, *options))
    watched = Watched()
    config = configured(own, *options, "trainer.checkpoint.load_strict=false")
    await run_through(config, optimizer=watched.build, callbacks=[watched.callback])
    weights, fresh = load_weights(teacher), dict(check(config).named_parameters())
    for (name, drawn), begun in zip(fresh.items(), watched.weights, strict=True):
        fits = name in weights and weights[name].shape == drawn.shape
        assert torch.equal(begun, weights[name] if fits else drawn)
