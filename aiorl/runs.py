"""A run as an object, opened inside somebody's loop by `open_run`.

| what waits                 | for, and who ends the wait                                       | ends otherwise with            |
|----------------------------|------------------------------------------------------------------|--------------------------------|
| ``async for epoch in run`` | the next epoch's report (the epoch loop)                         | the run's end                  |
| `Run.wait`                 | the run's end (the epoch loop)                                   | cancelled, when the run fails  |
| leaving `open_run`         | the open epoch and a checkpoint (``drain_timeout`` at the latest)| a second cancellation          |

Reports that nobody reads queue up to 1,000; beyond that the oldest is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiorl.compute.threads import in_thread
from aiorl.config import with_values
from aiorl.errors import AiorlError, ConfigError, Fault, WorkerError, first_cause
from aiorl.session import Outcome, Session, summary_of
from aiorl.settings import is_changeable, with_field
from aiorl.tasks.hooks import State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping
    from pathlib import Path

    from aiorl.config import Config
    from aiorl.environments.supervisor import Workers
    from aiorl.learning.optim import LRSchedulerFactory, OptimizerFactory
    from aiorl.learning.snapshot import Contents
    from aiorl.learning.training import Training
    from aiorl.models.base import Model
    from aiorl.monitoring.folder import RunFolder
    from aiorl.monitoring.metrics import EpochRecord
    from aiorl.preparation import Resume
    from aiorl.tasks.base import Callback, ReinforcementLearningTask

logger = logging.getLogger(__name__)

MAX_UNREAD_REPORTS = 1_000


@dataclass(frozen=True, slots=True)
class EpochReport:
    """What one learned epoch brought.

    Attributes:
        epoch: Its number, from 1.
        num_samples: Environment transitions of the whole run so far.
        policy_version: Version of the weights that it made.
        episode_return_mean: Over the last 100 episodes; nan before the first.
        episodes: Episodes of the whole run so far.
        samples_per_s: Environment transitions per second of the epoch, its learning included.
        metrics: Every metric, by ``group/name``; None for what is missing or not finite.
    """

    epoch: int
    num_samples: int
    policy_version: int
    episode_return_mean: float
    episodes: int
    samples_per_s: float
    metrics: Mapping[str, float | None]

    @classmethod
    def of(cls, record: EpochRecord) -> EpochReport:
        """The report that says what `record` says."""

        def figure(name: str) -> float:
            value = record.metrics[name]
            return math.nan if value is None else value

        return cls(
            epoch=record.epoch,
            num_samples=record.num_samples,
            policy_version=int(figure("learner/policy_version")),
            episode_return_mean=figure("episode/return_mean"),
            episodes=int(figure("episode/num_episodes")),
            samples_per_s=figure("sampling/samples_per_s"),
            metrics=record.metrics,
        )


@dataclass(frozen=True, slots=True)
class RunStatistics:
    """A look at a run while it goes on.

    Attributes:
        status: ``"running"``, ``"paused"``, ``"stopping"`` or ``"ended"``.
        counters: The counters of `State`, by name.
        episode_return_mean: Over the last 100 episodes; nan before the first.
        waits_for: What sampling waits for, in words.
        batcher: Figures of the micro-batcher.
        workers: Figures of the workers and their link.
        metrics: Those of the last epoch.
    """

    status: str
    counters: Mapping[str, int | float]
    episode_return_mean: float
    waits_for: str
    batcher: Any
    workers: Mapping[str, float]
    metrics: Mapping[str, float | None]


class Run:
    """A run that is going on. `open_run` makes it; all of it belongs to the loop that it was opened in.

    Attributes:
        folder: Where its files are.
        config: Its configuration, with what `set` changed.
        outcome: How it ended; None before.
    """

    def __init__(self, config: Config, folder: Path, training: Training, workers: Workers) -> None:
        self.config = config
        self.folder = folder
        self.outcome: Outcome | None = None
        self._training = training
        self._workers = workers
        self._reports: deque[EpochReport] = deque(maxlen=MAX_UNREAD_REPORTS)
        self._news = asyncio.Event()
        self._ended = asyncio.Event()
        self._last: EpochReport | None = None
        self._original = config
        self._failure: BaseException | None = None
        self._listeners: list[Callable[[EpochRecord], object]] = []

    # ------------------------------------------------------------------ watching
    def __aiter__(self) -> Run:
        """Reports of epochs, each given once."""
        return self

    async def __anext__(self) -> EpochReport:
        """The oldest report that nobody has read; waits for the next one. Ends with the run, also where that failed: see `wait`."""
        while not self._reports:
            if self._ended.is_set():
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._reports.popleft()

    async def wait(self) -> Outcome:
        """Waits until the run has ended by itself or was stopped. Cancelling the wait leaves the run alone.

        Raises:
            AiorlError: The run failed; its failure is the cause.
        """
        await self._ended.wait()
        if self.outcome is None:
            raise AiorlError(f"the run failed: {self._failure}") from self._failure
        return self.outcome

    def statistics(self) -> RunStatistics:
        """A look at the run; works after its end too."""
        parts = self._training.parts
        status = (
            "ended"
            if self._ended.is_set()
            else "stopping"
            if self._training.stopped
            else "paused"
            if parts.rollout.ledger.paused
            else "running"
        )
        return RunStatistics(
            status=status,
            counters=parts.state.state_dict(),
            episode_return_mean=parts.window.return_mean,
            waits_for=parts.rollout.ledger.describe(),
            batcher=parts.batcher.statistics(),
            workers=self._workers.statistics(),
            metrics=self._last.metrics if self._last is not None else {},
        )

    def add_listener(self, listener: Callable[[EpochRecord], object]) -> None:
        """Calls `listener` with every epoch's record from now on, on the loop: it must be brief, and not raise."""
        self._listeners.append(listener)

    def add_callback(self, callback: Callback) -> None:
        """Tells `callback` about the run from now on, after the task and the callbacks before it."""
        self._training.parts.hooks.register(callback)

    # ------------------------------------------------------------------ steering
    async def pause(self) -> None:
        """Holds sampling and learning. Returns when no step is outstanding and the update that was under way is done."""
        await self._training.pause()

    async def resume(self) -> None:
        """Goes on after `pause`."""
        self._training.resume()

    async def save_checkpoint(self) -> Path:
        """Writes a checkpoint at the next epoch end, or now while the run is paused between epochs.

        Returns:
            Its folder. Cancelling the wait does not call the checkpoint off.

        Raises:
            CheckpointError: It could not be written; the run goes on.
            AiorlError: The run has ended.
        """
        return await self._training.save_checkpoint()

    def request_checkpoint(self) -> None:
        """Asks for a checkpoint at the next epoch end, without waiting for it."""
        _ = self._training.request_checkpoint()

    def hurry(self) -> None:
        """Closing does not wait for environments from now on: workers that do not come back at once are killed."""
        self._workers.hurry()

    def stop(self, reason: str = "stopped") -> None:
        """Lets the epoch that is open be finished, within ``drain_timeout``, and ends the run with a checkpoint."""
        self._training.stop(reason)

    def set(self, path: str, value: Any) -> None:
        """Changes a setting while the run goes on, from the next minibatch or epoch on.

        Args:
            path: TOML path: ``optimizer.lr``; a stop condition, ``drain_timeout``, the clipping of gradients or the checkpoint
                intervals of ``[trainer]``; a coefficient of ``[task]``.
            value: As in the configuration.

        Raises:
            ConfigError: There is no such setting, it cannot be changed in a run that goes on, or the value is wrong. Nothing
                is changed then.
            AiorlError: The run has ended.
        """
        if self._ended.is_set():
            raise AiorlError(f"{path} cannot be changed: the run has ended")
        if not is_changeable(path):
            remedy = "stop the run, and resume it with the other value"
            raise ConfigError([Fault(path, "cannot be changed while a run goes on", repr(value), remedy, "Run.set")])
        if path.startswith("task."):
            task = self._training.parts.task
            section = with_field(task.config, path.removeprefix("task."), value)
            own = task.config == self.config.task
            task.reconfigure(section)
            if own:
                self.config = self.config.model_copy(update={"task": section})
        else:
            self.config = with_values(self.config, {path: value}, source="Run.set")
            if path == "optimizer.lr":
                self._training.set_learning_rate(self.config.optimizer.lr)
            else:
                self._training.reconfigure(self.config.trainer)
        self._training.settings[path] = [self._configured(path), value]
        logger.info("%s is %r from now on", path, value)

    # ------------------------------------------------------------------ for open_run
    def _report(self, record: EpochRecord) -> None:
        self._last = EpochReport.of(record)
        self._reports.append(self._last)
        self._news.set()
        for listener in self._listeners:
            listener(record)

    def _end(self, training: asyncio.Task[Outcome]) -> None:
        """The run is over, however it ended."""
        if training.cancelled():
            self._failure = AiorlError("the run was cancelled")
        elif (failure := training.exception()) is not None:
            self._failure = failure
        else:
            self.outcome = training.result()
        self._ended.set()
        self._news.set()

    def _take_over(self, settings: Mapping[str, list[Any]]) -> None:
        """Sets what an earlier part of this run had set, unless the configuration says something else by now."""
        for path, (configured, value) in settings.items():
            if path != "optimizer.lr" and self._configured(path) == configured:  # the schedule itself keeps the rate
                self.set(path, value)

    def _configured(self, path: str) -> Any:
        value: Any = self._original
        for step in path.split("."):
            value = getattr(value, step, None)
        return value


def import_torch() -> tuple[Any, Any, Any]:
    """Imports what imports torch, the modules of preparation, calibration and trainer: a second or more, and not on the loop."""
    importlib.import_module("torch._dynamo")  # the first optimizer needs it
    preparation, calibration, trainer = (
        importlib.import_module(f"aiorl.{name}") for name in ("preparation", "calibration", "trainer")
    )
    return preparation, calibration, trainer


async def settled(config: Config, task: ReinforcementLearningTask, model: Model, folder: RunFolder) -> Config:
    """The configuration with numbers in the place of "auto" in ``[task.environment]``; see `aiorl.calibration`."""
    asked = task.environment
    if not asked.is_auto:
        return config
    preparation, calibration, _ = await in_thread(import_torch)
    made_with = await in_thread(preparation.made_with, folder)
    try:
        found = await calibration.settle_environments(
            config.trainer, task, model, config.link, folder, made_with=made_with
        )
    except WorkerError as error:  # an environment's failure is the run's, which has begun
        nothing = Outcome(State(), "", None, 0.0, 0, 0)
        await in_thread(folder.write_summary, summary_of(nothing, error, stopped=False))
        raise
    if config.task.environment != asked:  # the task was passed as an object, with environments of its own
        return config
    return with_values(config, {f"task.environment.{name}": getattr(found, name) for name in calibration.NUMBERS})


@contextlib.asynccontextmanager
async def open_run(
    config: Config,
    task: ReinforcementLearningTask | None = None,
    model: Model | None = None,
    optimizer: OptimizerFactory | None = None,
    lr_scheduler: LRSchedulerFactory | None = None,
    *,
    callbacks: Iterable[Callback] = (),
    resume: Resume = "auto",
) -> AsyncIterator[Run]:
    """Opens a run in the running loop: it trains from here on, whether it is iterated or not.

    Touches neither signals nor the loop's policy, logging or random state of its host. Leaving the context lets the open epoch be
    finished and learned, within ``drain_timeout``, and leaves a checkpoint; leaving it with an exception, or cancelled, ends the
    run at once. Where the run fails, the body is cancelled, as a task group's would be, and the failure itself is raised.

    Args:
        config: What `load_config` returned.
        task: Instead of the one that ``[task]`` names; likewise the others.
        model: The model.
        optimizer: ``(params) -> torch.optim.Optimizer``.
        lr_scheduler: ``(optimizer) -> torch.optim.lr_scheduler.LRScheduler``.
        callbacks: Told about the run, after the task.
        resume: ``"auto"`` goes on from the newest checkpoint in ``exp_dir`` where there is one, ``"never"`` refuses to, ``"must"``
            refuses to start anew.

    Raises:
        ConfigError: Something that was configured cannot be had; nothing was started.
        RunFolderError: The run's folder is in use, or another run's.
        AiorlError: Why the run failed; see `aiorl.errors`.
    """
    started_at = time.perf_counter()
    preparation, _, trainers = await in_thread(import_torch)
    prepared = await in_thread(preparation.prepare, config, task, model, optimizer, lr_scheduler, resume)
    folder = prepared.folder
    with folder.lock():
        config = await settled(config, prepared.task, prepared.model, folder)
        restored: Contents | None = await in_thread(preparation.restore, config, folder, resume)
        ready: asyncio.Future[Run] = asyncio.get_running_loop().create_future()

        def start(training: Training, workers: Workers) -> None:
            run = Run(config, folder.path, training, workers)
            session.report = run._report
            if restored is not None:
                run._take_over(restored.extra.get("settings", {}))
            if not ready.done():
                ready.set_result(run)

        session = Session(folder, restored, tuple(callbacks), started_at, ready=start)
        trainer = trainers.ReinforcementLearningTrainer(config.trainer, link=config.link, logger=config.logger)
        own: BaseException | None = None  # what the body raised
        try:
            async with asyncio.TaskGroup() as tasks:
                training = tasks.create_task(
                    trainer.run_session(
                        session, prepared.model, prepared.task, prepared.optimizer, prepared.lr_scheduler
                    ),
                    name="aiorl run",
                )
                run = await ready
                training.add_done_callback(run._end)
                try:
                    yield run
                except BaseException as error:
                    if not isinstance(error, asyncio.CancelledError):
                        own = error
                    training.cancel()
                    raise
                run.stop("its context was left")
        except BaseExceptionGroup as group:
            if own is not None:
                raise own from own.__cause__
            cause = first_cause(group)
            if asyncio.current_task().cancelling():  # type: ignore[union-attr] # an outside cancellation that met a failure
                raise asyncio.CancelledError from cause
            raise cause from cause.__cause__
