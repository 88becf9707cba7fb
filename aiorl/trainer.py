"""The trainer: builds the parts, wires them in the order of the picture in `aiorl`, and owns the task group that they run in.

    workers ──► rollout ──► batcher ──► policy
                   └──► channel ──► learner ──► checkpoints, metrics

Everything is a context that is entered here and left in reverse, whatever ends the run; the first cause is what is raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

import torch

from aiorl.assembly import open_sampling
from aiorl.calibration import settle_environments
from aiorl.compute.device import Placement, TorchSettings, faster_threads
from aiorl.compute.threads import in_thread
from aiorl.environments.config import LinkConfig
from aiorl.environments.supervisor import open_workers
from aiorl.errors import first_cause
from aiorl.learning.checkpoint import CheckpointStore, load_weights
from aiorl.learning.learner import Learner
from aiorl.learning.parallel import visible_devices
from aiorl.learning.snapshot import Buffers
from aiorl.learning.training import Parts, Training
from aiorl.learning.weights import load_into
from aiorl.monitoring.config import LoggerConfig
from aiorl.monitoring.folder import RunFolder
from aiorl.monitoring.metrics import EpisodeWindow
from aiorl.monitoring.sinks import Recorder
from aiorl.monitoring.system import SystemStatistics
from aiorl.session import Outcome, Session, summary_of
from aiorl.tasks.base import Hooks, ReinforcementLearningTask, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from aiorl.environments.supervisor import Workers
    from aiorl.learning.config import ReinforcementLearningTrainerConfig
    from aiorl.learning.optim import LRSchedulerFactory, OptimizerFactory
    from aiorl.learning.snapshot import Contents
    from aiorl.models.base import Model

logger = logging.getLogger(__name__)

_SMALL_PARAMETERS = 1_000_000


class ReinforcementLearningTrainer:
    """Trains a model on a task.

    Args:
        config: The ``[trainer]`` table.
        link: The ``[link]`` table.
        logger: The ``[logger]`` table.
    """

    def __init__(
        self,
        config: ReinforcementLearningTrainerConfig,
        *,
        link: LinkConfig | None = None,
        logger: LoggerConfig | None = None,
    ) -> None:
        self.config = config
        self._link = link or LinkConfig()
        self._logger = logger or LoggerConfig()

    async def train(
        self,
        model: Model,
        task: ReinforcementLearningTask,
        optimizer: OptimizerFactory,
        lr_scheduler: LRSchedulerFactory,
    ) -> State:
        """Trains until one of the configured limits is met, and leaves a checkpoint.

        The folder gets no ``config.toml``, since only ``[trainer]`` is known here: `aiorl.open_run` writes one, which ``eval`` wants.
        Touches neither signals nor logging nor the global random state of its host. Cancelling stops at once, closes everything and
        leaves no new checkpoint.

        Args:
            model: The model; trained in place.
            task: What is learned.
            optimizer: ``(params) -> torch.optim.Optimizer``.
            lr_scheduler: ``(optimizer) -> torch.optim.lr_scheduler.LRScheduler``.

        Returns:
            The counters at the end.

        Raises:
            ValueError: `task` is no `ReinforcementLearningTask`.
            ConfigError: The run's folder or an address cannot be used.
            RunFolderBusy: Another trainer has the folder.
            WorkerError: A worker failed.
            AiorlError: See `aiorl.errors`.
        """
        if not isinstance(task, ReinforcementLearningTask):
            raise ValueError(f"task must be a ReinforcementLearningTask, not {type(task).__name__}")
        config = self.config
        started_at = time.perf_counter()
        folder = await in_thread(RunFolder.create, config.exp_dir, config.exp_name, log_dir_name=config.log_dir_name)
        with folder.lock():
            await in_thread(folder.write_provenance)
            restored = None
            if folder.holds_checkpoint:
                store = CheckpointStore(folder.checkpoints, only_most_recent=True)
                restored = (await in_thread(store.load)).contents
            await settle_environments(config, task, model, self._link, folder)
            session = Session(folder, restored=restored, started_at=started_at)
            outcome = await self.run_session(session, model, task, optimizer, lr_scheduler)
        return outcome.state

    async def run_session(
        self,
        session: Session,
        model: Model,
        task: ReinforcementLearningTask,
        optimizer: OptimizerFactory,
        lr_scheduler: LRSchedulerFactory,
    ) -> Outcome:
        """`train` in a folder that the caller has made and locked. Writes ``summary.json`` however it ends."""
        state = State()
        window = EpisodeWindow()
        training: list[Training] = []
        failure: BaseException | None = None
        first: list[Exception] = []
        num_before = int(session.restored.state["num_samples"]) if session.restored is not None else 0
        reason = ""
        try:
            async with asyncio.TaskGroup() as tasks:
                try:
                    reason = await self._run(
                        tasks, session, training, state, window, model, task, optimizer, lr_scheduler
                    )
                except Exception as error:
                    first.append(error)  # a task group would list it last
                    raise
        except BaseExceptionGroup as group:
            failure = first_cause(BaseExceptionGroup("a run failed", [*first, *group.exceptions]))
            if asyncio.current_task().cancelling():  # type: ignore[union-attr] # an outside cancellation that met a failing child
                logger.error("the run was cancelled while it failed: %s", failure)  # noqa: TRY400
                raise asyncio.CancelledError from failure
            raise failure from failure.__cause__
        except BaseException as error:
            failure = error
            raise
        finally:
            wall_s = (training[0].last_step_at if training else time.perf_counter()) - session.started_at
            outcome = Outcome(
                state,
                reason,
                window.return_mean if window.num_episodes else None,
                wall_s,
                training[0].given_up if training else 0,
                max(0, state.num_samples - num_before),
            )
            summary = summary_of(outcome, failure, stopped=bool(training and training[0].stopped))
            try:
                await in_thread(session.folder.write_summary, summary)
            except OSError as error:
                logger.error("summary.json was not written: %s", error)  # noqa: TRY400 - the failure itself goes first
        return outcome

    async def _run(
        self,
        tasks: asyncio.TaskGroup,
        session: Session,
        trainings: list[Training],
        state: State,
        window: EpisodeWindow,
        model: Model,
        task: ReinforcementLearningTask,
        optimizer: OptimizerFactory,
        lr_scheduler: LRSchedulerFactory,
    ) -> str:
        config, sampling, restored = self.config, self.config.sampling, session.restored
        hooks = Hooks(task, session.callbacks)
        device = torch.device("cpu")
        incarnation = int(restored.extra["incarnation"]) + 1 if restored is not None else 0
        seed = config.seed
        env_seed = task.environment.env_seed
        building = tasks.create_task(
            in_thread(self._build, model, device, optimizer, lr_scheduler, restored), name="build"
        )
        async with contextlib.AsyncExitStack() as stack:
            workers = await stack.enter_async_context(
                open_workers(
                    task.get_environment(),
                    task.environment,
                    self._link,
                    env_seed=seed if env_seed is None else env_seed,
                    incarnation=incarnation,
                    force_sync=sampling.force_sync,
                )
            )
            learning, scheduler = await building
            if restored is not None:
                state.load_state_dict(restored.state)
                window.load_state_dict(restored.extra["episodes"])
                await hooks.call("on_after_load_checkpoint", state)
            settings = TorchSettings(num_threads=await in_thread(self._num_threads, model, task, workers, device))
            place = await stack.enter_async_context(Placement("learning", settings))
            sampled = await stack.enter_async_context(
                open_sampling(
                    workers,
                    model,
                    task,
                    config,
                    device=device,
                    settings=settings,
                    version=state.policy_version,
                    num_epochs=state.num_epochs,
                    noise_counts=restored.extra["noise_counts"].numpy() if restored is not None else None,
                    epoch_is_over=_asks(task, state),
                )
            )
            batcher, rollout = sampled.batcher, sampled.rollout
            learner = Learner(
                model=model,
                task=task,
                optimizer=learning,
                scheduler=scheduler,
                config=config,
                state=state,
                hooks=hooks,
                placement=place,
                device=device,
                max_overshoot=max(group.num_envs for group in workers.groups) * sampling.min_trajectory_length - 1,
                quiet=lambda: workers.on_loop or (batcher.idle and workers.link_idle()),
            )
            recorder = await stack.enter_async_context(
                Recorder(
                    session.folder.metrics_file,
                    session.folder.log_dir,
                    self._logger,
                    resume_epoch=state.num_epochs,
                )
            )
            system = await stack.enter_async_context(SystemStatistics(config, visible_devices=visible_devices()))
            buffers = Buffers()
            await in_thread(buffers.reserve, model.state_dict(), learning.state_dict())
            training = Training(
                Parts(
                    config=config,
                    state=state,
                    task=task,
                    hooks=hooks,
                    window=window,
                    learner=learner,
                    placement=place,
                    policy=sampled.policy,
                    batcher=batcher,
                    rollout=rollout,
                    channel=sampled.channel,
                    recorder=recorder,
                    store=CheckpointStore(
                        session.folder.checkpoints, only_most_recent=config.checkpoint.only_save_most_recent
                    ),
                    buffers=buffers,
                    system=system.latest,
                    incarnation=incarnation,
                ),
                tasks,
                lambda record: session.report(record),
            )
            trainings.append(training)
            session.ready(training, workers)
            helpers = {
                tasks.create_task(workers.watch(), name="watch workers"),
                tasks.create_task(rollout.run(), name="rollout"),
            }
            try:
                return await training.run()
            finally:
                for helper in helpers:
                    helper.cancel()
                await asyncio.wait(helpers)

    # ------------------------------------------------------------------ building
    def _build(
        self,
        model: Model,
        device: torch.device,
        optimizer: OptimizerFactory,
        lr_scheduler: LRSchedulerFactory,
        restored: Contents | None,
    ) -> tuple[Optimizer, LRScheduler]:
        """Optimizer and scheduler over the model, in the state of the checkpoint where there is one. In a thread: it imports."""
        model.to(device)
        checkpoint = self.config.checkpoint
        if restored is None and checkpoint.load_from_ckpt_path is not None:
            load_into(model, load_weights(checkpoint.load_from_ckpt_path), strict=checkpoint.load_strict)
        if restored is not None:
            load_into(model, dict(restored.model), strict=True)
        built = optimizer(model.parameters())
        scheduler = lr_scheduler(built)
        if restored is not None:
            built.load_state_dict(dict(restored.optimizer))
            scheduler.load_state_dict(dict(restored.scheduler))
        return built, scheduler

    def _num_threads(
        self, model: Model, task: ReinforcementLearningTask, workers: Workers, device: torch.device
    ) -> int:
        """Torch's intra-op threads: as configured, or measured where the network is not small."""
        config = self.config
        if config.num_threads != "auto":
            return config.num_threads
        small = sum(parameter.numel() for parameter in model.parameters()) < _SMALL_PARAMETERS
        evaluate = getattr(model, "value", None)
        if small or config.sampling.force_sync or config.deterministic or evaluate is None:
            return 1
        info = workers.info.observation
        rows = torch.zeros(
            (task.minibatch_size or config.sampling.num_epoch_samples, *info.shape),
            dtype=getattr(torch, info.dtype),
            device=device,
        )

        def step() -> None:
            evaluate(rows).sum().backward()
            model.zero_grad()

        return faster_threads(step)


def _asks(task: ReinforcementLearningTask, state: State) -> Callable[[int], bool] | None:
    """The task's say in when an epoch is over, where it has one."""
    if type(task).epoch_is_over is ReinforcementLearningTask.epoch_is_over:
        return None

    def epoch_is_over(num_rows: int) -> bool:
        state.num_epoch_samples = num_rows
        return task.epoch_is_over(state)

    return epoch_is_over
