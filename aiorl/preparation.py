"""What is built before a run starts: preflight, task, model and folder; and what it goes on from. Everything here blocks.

It is imported and called in a thread, since it imports torch and constructs environments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from aiorl.compute.compiler import known_backends
from aiorl.config import Config, differences, load_config, to_toml
from aiorl.environments.link import check_endpoint
from aiorl.environments.preflight import preflight
from aiorl.errors import CheckpointError, CheckpointMissing, ConfigError, Fault, RunMismatch, UnsupportedSpace
from aiorl.learning.checkpoint import CheckpointStore, check_weights
from aiorl.learning.optim import build_lr_scheduler, build_optimizer
from aiorl.models.base import build_model
from aiorl.monitoring.folder import RunFolder
from aiorl.section import suggestion
from aiorl.tasks.base import build_task

if TYPE_CHECKING:
    from aiorl.environments.config import EnvironmentConfig
    from aiorl.learning.optim import LRSchedulerFactory, OptimizerFactory
    from aiorl.learning.snapshot import Contents
    from aiorl.models.base import Model
    from aiorl.tasks.base import ReinforcementLearningTask

Resume = Literal["auto", "never", "must"]


@dataclass(slots=True)
class Prepared:
    """What is built before the trainer starts."""

    task: ReinforcementLearningTask
    model: Model
    optimizer: OptimizerFactory
    lr_scheduler: LRSchedulerFactory
    folder: RunFolder


def check(config: Config, task: ReinforcementLearningTask | None = None, model: Model | None = None) -> Model:
    """Preflight: builds one environment and the model, and looks at the run's folder, without starting anything. Blocks.

    Returns:
        The model, its weights drawn from the run's seed.

    Raises:
        ConfigError: With every fault found.
    """
    return _built(config, task, model)[1]


def _built(
    config: Config, task: ReinforcementLearningTask | None, model: Model | None
) -> tuple[ReinforcementLearningTask, Model]:
    """Task and model, where nothing is in the way of a run."""
    trainer = config.trainer
    faults = [*RunFolder.faults(trainer.exp_dir, trainer.exp_name), *_faulty_weights(config), *_faulty_backend(config)]
    try:
        check_endpoint(config.link.endpoint)
    except ConfigError as error:
        faults.extend(error.faults)
    try:
        task = task or build_task(config.task)
        environment = config.task.environment
        num_env_workers = environment.num_env_workers
        if trainer.sampling.force_sync or num_env_workers == "auto":
            num_env_workers = 0
        info = preflight(
            task.get_environment(), num_env_workers=num_env_workers, env_cleanup_time=environment.env_cleanup_time
        )
        if model is None:
            with torch.random.fork_rng(devices=()):
                torch.default_generator.manual_seed(trainer.seed)  # and not the host's GPU generators
                model = build_model(config.model, info)
    except ConfigError as error:
        faults.extend(error.faults)
    except UnsupportedSpace as error:
        remedy = "choose another environment, or wrap it"
        faults.append(Fault("task.environment.id", str(error), f'"{config.task.environment.id}"', remedy))
    if faults or task is None or model is None:
        raise ConfigError(faults)
    return task, model


def _faulty_weights(config: Config) -> list[Fault]:
    """What keeps a new run from starting from ``load_from_ckpt_path``; one that goes on does not look there."""
    trainer, path = config.trainer, config.trainer.checkpoint.load_from_ckpt_path
    if path is None or (trainer.exp_dir is not None and RunFolder.named(trainer.exp_dir).holds_checkpoint):
        return []
    try:
        check_weights(path)
    except CheckpointError as error:
        remedy = "name a run's folder, a checkpoint or a .safetensors file"
        return [Fault("trainer.checkpoint.load_from_ckpt_path", str(error), f'"{path}"', remedy)]
    return []


def _faulty_backend(config: Config) -> list[Fault]:
    """What is wrong with the compiler back end, where anything is compiled."""
    compiler = config.trainer.compiler
    if not compiler.model:
        return []
    known = known_backends()
    if compiler.backend in known:
        return []
    remedy = suggestion(compiler.backend, known)
    return [Fault("trainer.compiler.backend", "is no compiler back end of torch", f'"{compiler.backend}"', remedy)]


def prepare(
    config: Config,
    task: ReinforcementLearningTask | None,
    model: Model | None,
    optimizer: OptimizerFactory | None,
    lr_scheduler: LRSchedulerFactory | None,
    resume: Resume,
) -> Prepared:
    """Builds task and model and makes the folder. Blocks.

    Raises:
        CheckpointMissing: ``resume = "must"`` and there is nothing to resume.
        ConfigError: With every fault that the preflight found.
    """
    where = config.trainer.exp_dir
    if resume == "must" and (where is None or not RunFolder.named(where).holds_checkpoint):
        raise CheckpointMissing(
            f"{where or 'a new folder'} holds no checkpoint to resume: name the run's folder as trainer.exp_dir"
        )
    task, model = _built(config, task, model)
    trainer = config.trainer
    return Prepared(
        task,
        model,
        optimizer or build_optimizer(config.optimizer),
        lr_scheduler or build_lr_scheduler(config.lr_scheduler, trainer.total_samples),
        RunFolder.create(trainer.exp_dir, trainer.exp_name, log_dir_name=trainer.log_dir_name),
    )


def made_with(folder: RunFolder) -> EnvironmentConfig | None:
    """The environments of the run that is gone on from; None where there is no such run. Blocks."""
    if not (folder.holds_checkpoint and folder.config_file.exists()):
        return None
    return load_config(folder.config_file).task.environment


def restore(config: Config, folder: RunFolder, resume: Resume) -> Contents | None:
    """What the run goes on from, after comparing configurations; writes the folder's first files. Blocks.

    Raises:
        RunMismatch: The folder's run was configured otherwise, or must not be gone on from.
    """
    restored: Contents | None = None
    if folder.holds_checkpoint:
        if resume == "never":
            raise RunMismatch(
                f"{folder.path} holds a run already: choose another trainer.exp_dir, or resume it", folder=folder.path
            )
        if folder.config_file.exists():
            changed = differences(load_config(folder.config_file), config)
            if changed:
                lines = "\n".join(f"  {difference}" for difference in changed)
                raise RunMismatch(
                    f"the run in {folder.path} was made with another configuration:\n{lines}\n"
                    "set these back, or choose another trainer.exp_dir",
                    folder=folder.path,
                )
        restored = CheckpointStore(folder.checkpoints, only_most_recent=True).load().contents
    folder.summary_file.unlink(missing_ok=True)  # how an earlier part of the run ended
    folder.write_config(to_toml(config))
    folder.write_provenance()
    return restored
