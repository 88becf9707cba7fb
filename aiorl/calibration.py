"""``num_env_workers = "auto"`` and ``envs_per_worker = "auto"``: numbers chosen by measuring, at the start of a run.

    one environment's step ──► candidates, from cheap to costly ──► sampling alone with each ──► the smallest that is fast

Candidates are measured by the same rollout, batcher, policy and workers that the run will use, on the run's own loop. The
result is written into the run's folder, and a run that goes on there takes it from there: it is never measured twice.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from aiorl.candidates import Choice, Measured, Space, chosen, search
from aiorl.compute.config import CompilerConfig
from aiorl.compute.device import LOOP_BUDGET_S
from aiorl.compute.threads import in_thread
from aiorl.environments.local import in_daemon_thread, reported
from aiorl.environments.make import EnvironmentGroup, seed_of
from aiorl.environments.preflight import preflight
from aiorl.environments.supervisor import open_workers
from aiorl.errors import ConfigError, Fault
from aiorl.throughput import sampling_alone
from aiorl.toml import literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiorl.environments.config import EnvironmentConfig, LinkConfig
    from aiorl.environments.spaces import EnvironmentSpec
    from aiorl.learning.config import ReinforcementLearningTrainerConfig
    from aiorl.models.base import Model
    from aiorl.monitoring.folder import RunFolder
    from aiorl.tasks.base import ReinforcementLearningTask

logger = logging.getLogger(__name__)

BUDGET_S: Final = 10.0
_PROBE_S: Final = 3.0  # an environment that takes longer to be made, reset and stepped once is not measured
_PROBE_STEPS_S: Final = 0.1
_PROBED_VECTOR: Final = 64  # environments of a vector environment that is probed
_RESETS_S: Final = 1.0  # for which the resets of environments in process may hold the loop up
_WARM_UP_S: Final = 0.05
_SLICE_S: Final = 0.3
NUMBERS: Final = ("num_env_workers", "envs_per_worker", "groups_per_worker")


@dataclass(frozen=True, slots=True)
class Probe:
    """What one environment is like.

    Attributes:
        step_s: Median seconds of a step.
        reset_s: Of resetting it.
        is_awaitable: Whether it can only be hosted by the trainer's own loop.
    """

    step_s: float
    reset_s: float
    is_awaitable: bool


async def settle_environments(
    config: ReinforcementLearningTrainerConfig,
    task: ReinforcementLearningTask,
    model: Model,
    link: LinkConfig,
    folder: RunFolder,
    *,
    made_with: EnvironmentConfig | None = None,
) -> EnvironmentConfig:
    """Puts numbers in the place of "auto" in ``task.environment``, where it is there.

    Under ``force_sync`` the environments step in process and nothing is measured, so that the run is reproducible.

    Args:
        config: ``[trainer]``.
        task: Its ``environment``, and that of its ``config``, have numbers when this returns.
        model: Whose policy acts meanwhile.
        link: Between trainer and workers.
        folder: The run's; the result is written there, and what is there already is taken as it is.
        made_with: The numbers that the run in this folder was made with, where they were given and not measured.

    Returns:
        ``task.environment``.

    Raises:
        ConfigError: Whatever is chosen, another setting stands against it.
        EnvironmentRaised, WorkerDied, LinkError: As at the start of a run.
    """
    asked = task.environment
    if not asked.is_auto:
        return asked
    recorded = await in_thread(folder.read_calibration)
    if recorded is not None and (known := _known(recorded, asked)) is not None:
        logger.info("environments as they were measured before: %s", known)
    elif made_with is not None and not made_with.is_auto:
        known = Choice(*made_with.numbers(), made_with.groups_per_worker)
    elif config.sampling.force_sync:
        known = Space(asked, config.sampling, num_cores=1).default(slow=False, in_process=True)
    else:
        known, measured = await measure_environments(config, task, model, link)
        await in_thread(folder.write_calibration, _record(asked, known, measured))
    settled = _settled(asked, known)
    if task.config.environment == asked:
        task.config = task.config.model_copy(update={"environment": settled})
    task.environment = settled
    return settled


async def measure_environments(
    config: ReinforcementLearningTrainerConfig, task: ReinforcementLearningTask, model: Model, link: LinkConfig
) -> tuple[Choice, list[Measured]]:
    """Chooses by measuring, within about ten seconds; what was measured comes along.

    An environment that is too slow to be measured gets a default, and a line in the log.
    """
    deadline = time.perf_counter() + BUDGET_S
    environment, spec = task.environment, task.get_environment()
    space = Space(environment, config.sampling, num_cores=len(os.sched_getaffinity(0)))
    logger.info("measuring how many environments and workers sample fastest")
    try:
        async with asyncio.timeout(_PROBE_S):
            probe = await in_daemon_thread(lambda: _probe(spec, config.seed, environment), lambda _: None, 0.0)
    except TimeoutError:
        known = space.default(slow=True, in_process=False)
        logger.warning("an environment took more than %g s to be made and stepped: %s, unmeasured", _PROBE_S, known)
        return known, []
    most_local = int(min(LOOP_BUDGET_S / max(probe.step_s, 1e-9), _RESETS_S / max(probe.reset_s, 1e-9)))
    if probe.is_awaitable:
        most_local = space.most_envs
    space.limit(most_local=most_local, only_local=probe.is_awaitable)

    async def measure(choice: Choice) -> float | None:
        """Steps per second; None where there is no time left."""
        try:
            async with asyncio.timeout(deadline - time.perf_counter()):
                rate = await _rate(config, task, model, link, spec, _settled(environment, choice))
        except TimeoutError:
            return None
        logger.info("%s: %s steps/s", choice, f"{rate:,.0f}")
        return rate

    measured = await search(space, measure)
    if not measured:
        known = space.default(slow=True, in_process=probe.is_awaitable)
        logger.warning("the environments are too slow to be measured in %g s: %s, unmeasured", BUDGET_S, known)
        return known, []
    known = chosen(measured)
    logger.info("environments: %s", known)
    return known, measured


def _probe(spec: EnvironmentSpec, env_seed: int, environment: EnvironmentConfig) -> Probe:
    """Looks at one environment, and steps it for a moment. Blocks."""
    info = preflight(spec, env_cleanup_time=environment.env_cleanup_time)
    if info.is_awaitable:
        return Probe(0.0, 0.0, is_awaitable=True)
    num_envs = (
        _PROBED_VECTOR if spec.vectorization_mode != "sync" else 1
    )  # a step of these costs much the same for any number
    with reported(0, "constructor"):
        group = EnvironmentGroup(spec, num_envs)
    try:
        started = time.perf_counter()
        with reported(0, "reset"):
            group.reset([seed_of(env_seed, env, 0) for env in range(num_envs)])
        reset_s = time.perf_counter() - started
        generator = np.random.default_rng(env_seed)
        durations: list[float] = []
        with reported(0, "step"):
            while not durations or sum(durations) < _PROBE_STEPS_S:
                actions = generator.integers(info.num_actions, size=num_envs)
                started = time.perf_counter()
                group.step(actions)
                durations.append(time.perf_counter() - started)
        return Probe(median(durations) / num_envs, reset_s / num_envs, is_awaitable=False)
    finally:
        group.close()


async def _rate(
    config: ReinforcementLearningTrainerConfig,
    task: ReinforcementLearningTask,
    model: Model,
    link: LinkConfig,
    spec: EnvironmentSpec,
    environment: EnvironmentConfig,
) -> float:
    """Environment steps per second of sampling alone in such environments."""
    seed = config.seed if environment.env_seed is None else environment.env_seed
    config = config.model_copy(
        update={"compiler": CompilerConfig()}
    )  # compiling takes longer than all that is measured
    async with (
        open_workers(spec, environment, link, env_seed=seed, incarnation=0, force_sync=False) as workers,
        sampling_alone(workers, model, task, config, device=torch.device("cpu")) as alone,
    ):
        await alone.warm_up(_WARM_UP_S)
        return (await alone.measure(_SLICE_S)).steps_per_s


def _settled(asked: EnvironmentConfig, choice: Choice) -> EnvironmentConfig:
    """The table with a choice in it.

    Raises:
        ConfigError: The choice, made for an earlier part of the run, breaks a rule of the table.
    """
    settled = asked.model_copy(
        update={name: getattr(choice, name) for name in NUMBERS if getattr(asked, name) == "auto"}
    )
    faults = [
        Fault(f"task.environment.{fields[0]}", message, literal(getattr(settled, fields[0])), remedy)
        for fields, (message, remedy) in settled.breaches()
    ]
    if faults:
        raise ConfigError(faults)
    return settled


def _asked(environment: EnvironmentConfig) -> dict[str, Any]:
    """The question that a measurement answers, as JSON has it."""
    names = (*NUMBERS, "id", "kwargs", "wrappers", "vectorization_mode")
    asked: dict[str, Any] = json.loads(json.dumps({name: getattr(environment, name) for name in names}, default=str))
    return asked


def _record(asked: EnvironmentConfig, known: Choice, measured: list[Measured]) -> dict[str, Any]:
    """What is written down."""
    return {
        "asked": _asked(asked),
        **asdict(known),
        "measured": [asdict(each.choice) | {"steps_per_s": round(each.steps_per_s, 1)} for each in measured],
    }


def _known(recorded: Mapping[str, Any], asked: EnvironmentConfig) -> Choice | None:
    """What was measured, where it answers the same question."""
    if recorded.get("asked") != _asked(asked):
        return None
    workers, envs, groups = (recorded.get(name) for name in NUMBERS)
    if not (isinstance(workers, int) and isinstance(envs, int) and (isinstance(groups, int) or groups == "auto")):
        return None
    return Choice(workers, envs, groups)
