"""A run inside its host's loop: watched, paused, steered, left; and what happens when something in it fails."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import sys
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

import aiorl
from aiorl.errors import ConfigError, EnvironmentRaised, RunFolderBusy, RunMismatch, WorkerDied
from aiorl.learning.checkpoint import CheckpointStore
from tests.integration.running import ROOT, SMALL, metrics, summary

if TYPE_CHECKING:
    from pathlib import Path

    from aiorl.config import Config

pytestmark = pytest.mark.anyio

CHAIN = "task.environment.id=tests.integration.worlds:Chain"


@pytest.fixture(autouse=True)
def importable_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])


def _config(exp_dir: Path, *overrides: str) -> Config:
    return aiorl.load_config(None, [f"trainer.exp_dir={exp_dir}", *SMALL, *overrides])


async def test_reports_come_in_order_and_end_with_the_run(tmp_path: Path) -> None:
    config = _config(tmp_path, "trainer.max_epochs=5", "task.environment.num_env_workers=0")
    async with aiorl.open_run(config) as run:
        reports = [report async for report in run]
        outcome = await run.wait()
    assert [report.epoch for report in reports] == [1, 2, 3, 4, 5]
    assert [report.num_samples for report in reports] == [256 * epoch for epoch in range(1, 6)]
    assert [report.policy_version for report in reports] == [1, 2, 3, 4, 5]
    assert outcome.state.num_samples == 5 * 256
    assert outcome.state.num_steps == 10
    assert [line["epoch"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]
    told = summary(tmp_path)
    assert told["status"] == "finished"
    assert told["num_samples"] == 5 * 256
    assert told["samples_per_s"] == pytest.approx(told["num_samples"] / told["wall_s"])


async def test_an_epoch_has_the_samples_that_were_asked_for(tmp_path: Path) -> None:
    """400 asked, 400 delivered, and never more than a group beyond."""
    config = _config(
        tmp_path,
        "trainer.max_epochs=4",
        "trainer.sampling.num_epoch_samples=400",
        "task.environment.num_env_workers=2",
        "task.environment.envs_per_worker=6",
    )
    async with aiorl.open_run(config) as run:
        kept = [report.metrics["sampling/kept_rows"] async for report in run]
    assert all(400 <= (rows or 0) < 403 for rows in kept)


async def test_leaving_the_context_finishes_the_epoch_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    async with aiorl.open_run(_config(tmp_path)) as run:
        async for report in run:
            if report.epoch >= 2:
                break
    told = summary(tmp_path)
    assert told["status"] == "stopped"
    assert told["num_epochs"] == metrics(tmp_path)[-1]["epoch"]
    loaded = CheckpointStore(tmp_path / "checkpoints", only_most_recent=True).load().contents
    assert loaded.state["num_epochs"] == told["num_epochs"]


async def test_leaving_with_an_exception_ends_at_once(tmp_path: Path) -> None:
    """Without draining, for which there would be an hour."""
    with pytest.raises(ZeroDivisionError):
        async with aiorl.open_run(
            _config(tmp_path, "trainer.drain_timeout=3600.0", "trainer.sampling.num_epoch_samples=100000")
        ) as run:
            raise ZeroDivisionError(run.statistics().status)
    assert summary(tmp_path)["status"] == "stopped"


async def test_cancelling_the_host_ends_the_run(tmp_path: Path) -> None:
    started = asyncio.Event()

    async def host() -> None:
        async with aiorl.open_run(_config(tmp_path)) as run:
            await anext(run)
            started.set()
            await run.wait()

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(host())
        await started.wait()
        task.cancel()
    assert task.cancelled()
    assert not psutil.Process().children()


async def test_a_pause_holds_everything_and_a_resume_goes_on(tmp_path: Path) -> None:
    async with aiorl.open_run(_config(tmp_path, "task.environment.num_env_workers=1")) as run:
        await anext(run)
        await run.pause()
        before = run.statistics()
        assert before.status == "paused"
        for _ in range(50):
            await asyncio.sleep(0.002)
        after = run.statistics()
        assert after.batcher.num_rows == before.batcher.num_rows
        assert after.counters["num_steps"] == before.counters["num_steps"]
        path = await run.save_checkpoint()
        assert (path / "manifest.json").is_file()
        await run.resume()
        report = await anext(run)
        later = await anext(run)
        assert later.epoch == report.epoch + 1
        assert run.statistics().status == "running"


async def test_a_pause_at_any_moment_leaves_an_exact_checkpoint(tmp_path: Path) -> None:
    """Whatever the pause falls into, saving does not wait for what the pause holds back, and is never cut inside an update."""
    async with aiorl.open_run(_config(tmp_path, "task.num_update_epochs=4")) as run:
        await anext(run)
        for number in range(12):
            for _ in range(7 * number):  # another moment of the epoch each time
                await asyncio.sleep(0)
            await run.pause()
            async with asyncio.timeout(20):
                path = await run.save_checkpoint()
            loaded = CheckpointStore(tmp_path / "checkpoints", only_most_recent=True).load(path).contents
            assert loaded.exact
            assert loaded.state["num_steps"] == 8 * loaded.state["num_epochs"]
            await run.resume()


async def test_a_run_that_learned_nothing_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = _config(tmp_path, CHAIN, 'task.environment.kwargs={raise_in="nan"}', "trainer.max_epochs=2")
    async with aiorl.open_run(config) as run:
        outcome = await run.wait()
    assert outcome.state.num_steps == 0
    assert "nothing was learned" in caplog.text


async def test_a_save_whose_caller_was_cancelled_wedges_nothing(tmp_path: Path) -> None:
    async with aiorl.open_run(_config(tmp_path)) as run:
        await anext(run)
        await run.pause()
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await run.save_checkpoint()
        assert (await run.save_checkpoint()).exists()
        await run.resume()
        assert (await run.save_checkpoint()).exists()
        await anext(run)
    loaded = CheckpointStore(tmp_path / "checkpoints", only_most_recent=True).load().contents
    assert loaded.exact
    assert loaded.state["num_steps"] == 2 * loaded.state["num_epochs"]


async def test_saves_and_pauses_of_a_run_that_has_ended_do_not_hang(tmp_path: Path) -> None:
    async with aiorl.open_run(_config(tmp_path, "trainer.max_epochs=2")) as run:
        await run.wait()
        with pytest.raises(aiorl.AiorlError, match="ended"):
            await run.save_checkpoint()
        await run.pause()
        run.stop("too late")
        assert run.statistics().status == "ended"
    told = summary(tmp_path)
    assert told["status"] == "finished"
    assert "max_epochs" in told["reason"]


async def test_a_limit_that_is_raised_at_the_last_moment_is_followed(tmp_path: Path) -> None:
    """Whether the run is over is decided once for each epoch, however late the limits change."""
    async with aiorl.open_run(_config(tmp_path, "trainer.max_epochs=2")) as run:
        run.add_listener(lambda record: run.set("trainer.max_epochs", 4) if record.epoch == 2 else None)
        outcome = await run.wait()
    assert outcome.state.num_epochs in (2, 4)


async def test_others_learn_of_a_failure_too(tmp_path: Path) -> None:
    """A task of the host beside the body, which is all that a failing run cancels."""
    reports: list[int] = []
    opened: asyncio.Future[aiorl.Run] = asyncio.get_running_loop().create_future()

    async def watch() -> None:
        run = await opened
        with pytest.raises(aiorl.AiorlError, match="the chain broke in step"):
            await run.wait()
        reports.extend([report.epoch async for report in run])

    config = _config(tmp_path, CHAIN, 'task.environment.kwargs={raise_in="step", after=200}')
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watch())
        with pytest.raises(EnvironmentRaised):
            async with aiorl.open_run(config) as run:
                opened.set_result(run)
                await asyncio.get_running_loop().create_future()
    assert reports == list(range(1, len(reports) + 1))


async def test_the_body_keeps_its_own_exception_group(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup, match="mine") as caught:
        async with aiorl.open_run(_config(tmp_path)) as run:
            await anext(run)
            raise ExceptionGroup("mine", [ValueError("one"), KeyError("two")])
    assert [type(error) for error in caught.value.exceptions] == [ValueError, KeyError]


class Breaking(aiorl.Callback):
    """Raises in one hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._break)

    def _break(self, state: aiorl.State) -> None:
        raise ZeroDivisionError(f"after {state.num_epochs} epochs")


@pytest.mark.parametrize("hook", ["on_training_start", "on_epoch_end", "on_after_compute_loss", "on_training_end"])
async def test_what_a_hook_raises_is_what_ends_the_run(tmp_path: Path, hook: str) -> None:
    with pytest.raises(ZeroDivisionError):
        async with aiorl.open_run(_config(tmp_path, "trainer.max_epochs=2"), callbacks=[Breaking(hook)]) as run:
            await run.wait()
    assert summary(tmp_path)["status"] == "failed"
    assert not psutil.Process().children()


async def test_hooks_are_called_in_their_order(tmp_path: Path) -> None:
    calls: list[str] = []

    class Noting(aiorl.Callback):
        async def on_training_start(self, state: aiorl.State) -> None:
            calls.append("start")

        def on_epoch_start(self, state: aiorl.State) -> None:
            calls.append("epoch")

        def on_step_end(self, state: aiorl.State) -> None:
            calls.append("step")

        async def on_epoch_end(self, state: aiorl.State) -> None:
            calls.append(f"end {state.num_epochs}")

        def on_after_save_checkpoint(self, state: aiorl.State) -> None:
            calls.append("saved")

        def on_training_end(self, state: aiorl.State) -> None:
            calls.append("over")

    async with aiorl.open_run(_config(tmp_path, "trainer.max_epochs=2"), callbacks=[Noting()]) as run:
        await run.wait()
    epoch = ["epoch", "step", "step"]
    assert calls == ["start", *epoch, "end 1", *epoch, "end 2", "saved", "over"]


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ("trainer.max_steps=3", "max_steps = 3"),
        ("trainer.max_samples=300", "max_samples = 300"),
        ("trainer.max_seconds=0.01", "max_seconds"),
    ],
)
async def test_limits_end_the_run_at_an_epoch_end(tmp_path: Path, limit: str, reason: str) -> None:
    async with aiorl.open_run(_config(tmp_path, limit)) as run:
        outcome = await run.wait()
    assert reason in outcome.reason
    assert outcome.state.num_samples == 256 * outcome.state.num_epochs


async def test_the_target_return_counts_once_there_are_a_hundred_episodes(tmp_path: Path) -> None:
    """Each episode of the chain returns 10, from the first one on."""
    async with aiorl.open_run(_config(tmp_path, CHAIN, "trainer.target_return=10.0")) as run:
        reports = [report async for report in run]
        outcome = await run.wait()
    assert "target_return" in outcome.reason
    assert [report.episodes >= 100 for report in reports] == [False] * (len(reports) - 1) + [True]
    assert reports[0].episode_return_mean == 10.0


async def test_a_checkpoint_can_be_asked_for(tmp_path: Path) -> None:
    async with aiorl.open_run(_config(tmp_path)) as run:
        path = await run.save_checkpoint()
        assert path.parent == tmp_path / "checkpoints"
        assert (path / "manifest.json").is_file()


async def test_settings_change_while_it_runs(tmp_path: Path) -> None:
    async with aiorl.open_run(_config(tmp_path)) as run:
        await anext(run)
        run.set("optimizer.lr", 1e-4)
        run.set("task.ent_coef", 0.0)
        with pytest.raises(ConfigError, match=r"optimizer\.lr"):
            run.set("optimizer.lr", "fast")
        with pytest.raises(ConfigError, match="cannot be changed while a run goes on"):
            run.set("task.environment.id", "Acrobot-v1")
        with pytest.raises(ConfigError, match="cannot be changed"):
            run.set("trainer.nothing", 1)
        await anext(run)
        report = await anext(run)
        assert report.metrics["learner/lr"] == pytest.approx(1e-4)
        run.set("trainer.max_epochs", report.epoch + 2)
        outcome = await run.wait()
        assert "max_epochs" in outcome.reason
    before = aiorl.load_config(tmp_path / "config.toml")
    assert before.optimizer.lr == 1e-3  # as configured, so that the same command resumes it
    async with aiorl.open_run(_config(tmp_path, f"trainer.max_epochs={report.epoch + 4}")) as run:
        again = await anext(run)
        assert again.epoch == report.epoch + 3
        assert again.metrics["learner/lr"] == pytest.approx(1e-4)
        assert getattr(run.config.task, "ent_coef") == 0.0  # noqa: B009 - a task's section need not have it
        assert (await run.wait()).state.num_epochs == report.epoch + 4


async def test_the_host_keeps_its_settings(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    threads = torch.get_num_threads()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    loggers = list(logging.getLogger("aiorl").handlers), logging.getLogger("aiorl").level
    async with aiorl.open_run(_config(tmp_path, "trainer.max_epochs=2")) as run:
        await run.wait()
        assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads
    assert loggers == (list(logging.getLogger("aiorl").handlers), logging.getLogger("aiorl").level)


async def test_two_runs_in_one_loop(tmp_path: Path) -> None:
    options = ("trainer.max_epochs=3", "task.environment.num_env_workers=1")
    async with (
        aiorl.open_run(_config(tmp_path / "a", *options)) as first,
        aiorl.open_run(_config(tmp_path / "b", *options, "trainer.seed=2")) as second,
    ):
        assert (await first.wait()).state.num_epochs == (await second.wait()).state.num_epochs == 3


async def test_one_folder_has_one_run(tmp_path: Path) -> None:
    async with aiorl.open_run(_config(tmp_path, "task.environment.num_env_workers=0")) as run:
        await anext(run)
        with pytest.raises(RunFolderBusy):
            async with aiorl.open_run(_config(tmp_path, "task.environment.num_env_workers=0")):
                raise AssertionError("two runs in one folder")


async def test_another_configuration_is_another_run(tmp_path: Path) -> None:
    async with aiorl.open_run(_config(tmp_path, "trainer.max_epochs=1", "task.environment.num_env_workers=0")) as run:
        await run.wait()
    with pytest.raises(RunMismatch, match=r"task\.gamma: 0\.99 → 0\.5"):
        async with aiorl.open_run(
            _config(tmp_path, "trainer.max_epochs=2", "task.environment.num_env_workers=0", "task.gamma=0.5")
        ):
            raise AssertionError("it went on with another gamma")


@pytest.mark.parametrize("mode", ["process", "thread", "local"])
@pytest.mark.parametrize("where", ["step", "reset"])
async def test_an_environment_that_raises_ends_the_run_with_its_own_traceback(
    tmp_path: Path, mode: str, where: str
) -> None:
    placed = (
        ("task.environment.num_env_workers=0",)
        if mode == "local"
        else ("task.environment.num_env_workers=2", f"task.environment.env_worker_mode={mode}")
    )
    config = _config(tmp_path, CHAIN, f'task.environment.kwargs={{raise_in="{where}"}}', *placed)
    with pytest.raises(EnvironmentRaised, match=f"the chain broke in {where}") as caught:
        async with aiorl.open_run(config) as run:
            await run.wait()
    assert "worlds.py" in str(caught.value)
    assert summary(tmp_path)["status"] == "failed"
    assert f"the chain broke in {where}" in summary(tmp_path)["error"]
    assert not psutil.Process().children()


async def test_a_worker_that_is_killed_ends_the_run_promptly(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    killed_at = math.inf
    with pytest.raises(WorkerDied, match="SIGKILL"):
        async with aiorl.open_run(_config(tmp_path, "task.environment.num_env_workers=2")) as run:
            await anext(run)
            psutil.Process().children()[0].kill()
            killed_at = loop.time()
            await run.wait()
    assert loop.time() - killed_at < 2.0
    assert not psutil.Process().children()


async def test_episodes_shorter_than_the_minimum_end_the_run_instead_of_never(tmp_path: Path) -> None:
    config = _config(tmp_path, CHAIN, "task.environment.num_env_workers=1", "trainer.sampling.min_trajectory_length=20")
    with pytest.raises(aiorl.AiorlError, match="min_trajectory_length"):
        async with aiorl.open_run(config) as run:
            await run.wait()


async def test_the_trainer_refuses_what_is_no_task(tmp_path: Path) -> None:
    config = _config(tmp_path)
    with pytest.raises(ValueError, match="ReinforcementLearningTask"):
        await aiorl.ReinforcementLearningTrainer(config.trainer).train(
            torch.nn.Linear(1, 1),  # type: ignore[arg-type] # that is the point
            object(),  # type: ignore[arg-type]
            lambda params: torch.optim.Adam(params),
            lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer),
        )
