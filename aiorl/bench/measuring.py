"""Everything that a bench measures, open at once and taking turns, so that a busy machine is busy for all of it alike.

prepare ──► open every part ──► round after round: a slice of each ──► findings
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from aiorl.bench.ceilings import InferenceAlone, LearnerAlone, SteppedWorkers, stepped_processes
from aiorl.bench.costless import costless
from aiorl.bench.figures import Figure, Findings, Subject
from aiorl.bench.trainer_cost import GROUP_SIZES, trainer_costs
from aiorl.compute.device import Placement, TorchSettings
from aiorl.compute.threads import in_thread
from aiorl.config import with_values
from aiorl.environments.supervisor import open_workers
from aiorl.errors import AiorlError
from aiorl.monitoring.loop_lag import LoopLag
from aiorl.preparation import prepare
from aiorl.runs import open_run, settled
from aiorl.throughput import sampling_alone

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiorl.bench.ceilings import Ceiling
    from aiorl.bench.trainer_cost import TrainerCosts
    from aiorl.config import Config
    from aiorl.preparation import Prepared
    from aiorl.runs import Run
    from aiorl.throughput import SamplingAlone

logger = logging.getLogger(__name__)

SECONDS: Final = 15.0
"""Of measuring, by default; opening and closing everything takes another five to ten."""

_NUM_ROUNDS: Final = 5
_SHARES: Final = {"environments": 1.0, "link": 1.0, "inference": 0.5, "learner": 1.5, "sampling": 1.5, "whole": 3.0}
_COST_SHARE: Final = 0.5  # for each group size
_WARM_UP_S: Final = 0.2
_FOREVER: Final = 10**15


async def bench(config: Config, *, seconds: float = SECONDS) -> Findings:
    """Measures a configuration on this machine; leaves nothing behind.

    Args:
        config: What `load_config` returned. Its run's folder and limits are left out of account.
        seconds: Of measuring, in all.

    Raises:
        ConfigError: As before a run.
        EnvironmentRaised, WorkerDied, LinkError: As in a run.
    """
    with tempfile.TemporaryDirectory(prefix="aiorl-bench-") as scratch:
        config = with_values(config, {"trainer.exp_dir": str(Path(scratch, "parts")), **_ENDLESS}, source="bench")
        config = with_values(config, {"link.endpoint": _shareable(config.link.endpoint)})
        prepared = await in_thread(prepare, config, None, None, None, None, "auto")
        config = await settled(config, prepared.task, prepared.model, prepared.folder)
        async with _opened(config, prepared, Path(scratch, "whole")) as parts:
            return await parts.measure(seconds)


_ENDLESS: Final[dict[str, Any]] = {
    "trainer.max_samples": _FOREVER,  # a schedule wants to know an end
    "trainer.max_epochs": None,
    "trainer.max_steps": None,
    "trainer.max_seconds": None,
    "trainer.target_return": None,
}


def _shareable(endpoint: str) -> str:
    """An endpoint of the same kind that several can listen on at once."""
    return "tcp://127.0.0.1:*" if endpoint.startswith("tcp://") else "auto"


class WholeRun:
    """A run that trains while it is measured, and stands still between two slices."""

    def __init__(self, run: Run) -> None:
        self._run = run

    async def measure(self, duration_s: float) -> float:
        """See `Ceiling.measure`: whole epochs, so that sampling and learning have their true shares."""
        before = self._run.statistics().counters["num_samples"]
        started = time.perf_counter()
        await self._run.resume()
        async for _ in self._run:
            if time.perf_counter() - started >= duration_s:
                break
        await self._run.pause()
        wall_s = time.perf_counter() - started
        if self._run.outcome is not None:
            raise AiorlError(f"the run ended while it was measured: {self._run.outcome.reason}")
        return (self._run.statistics().counters["num_samples"] - before) / wall_s


class _Enough(Exception):
    """Ends a run at once, without its last epoch."""


@contextlib.asynccontextmanager
async def whole_run(config: Config) -> AsyncIterator[WholeRun]:
    """Opens a run, and gives it up at the end: nobody wants what it learned."""
    with contextlib.suppress(_Enough):
        async with open_run(config) as run:
            yield WholeRun(run)
            raise _Enough


class _Parts:
    """All that is open."""

    def __init__(
        self,
        subject: Subject,
        ceilings: dict[str, Ceiling],
        sampling: SamplingAlone,
        whole: WholeRun,
        costs: TrainerCosts,
        batch_rows: float,
    ) -> None:
        self._subject = subject
        self._ceilings = ceilings
        self._sampling = sampling
        self._whole = whole
        self._costs = costs
        self._batch_rows = batch_rows

    async def measure(self, seconds: float) -> Findings:
        """A slice of each in every round."""
        unit_s = seconds / _NUM_ROUNDS / (sum(_SHARES.values()) + _COST_SHARE * len(GROUP_SIZES))
        rates: dict[str, list[float]] = {name: [] for name in _SHARES}
        busy: list[float] = []
        sampling_lag, whole_lag = LoopLag(), LoopLag()
        for number in range(_NUM_ROUNDS):
            logger.info("bench: round %d of %d", number + 1, _NUM_ROUNDS)
            for name, ceiling in self._ceilings.items():
                rates[name].append(await ceiling.measure(unit_s * _SHARES[name]))
            with sampling_lag:
                sampled = await self._sampling.measure(unit_s * _SHARES["sampling"])
            rates["sampling"].append(sampled.steps_per_s)
            busy.append(sampled.cpu_s / sampled.wall_s)
            with whole_lag:
                rates["whole"].append(await self._whole.measure(unit_s * _SHARES["whole"]))
            await self._costs.measure(unit_s * _COST_SHARE)
        figures = {name: Figure.of(measured) for name, measured in rates.items() if measured}
        return Findings(
            self._subject,
            environments=figures["environments"],
            link=figures.get("link"),
            inference=figures["inference"],
            learner=figures["learner"],
            sampling=figures["sampling"],
            whole=figures["whole"],
            batch_rows=self._batch_rows,
            trainer_busy=float(np.median(busy)),
            sampling_lag=sampling_lag.statistics(),
            whole_lag=whole_lag.statistics(),
            trainer_cost=self._costs.fit(),
        )


@contextlib.asynccontextmanager
async def _opened(config: Config, prepared: Prepared, run_folder: Path) -> AsyncIterator[_Parts]:
    """Opens every part and warms it up."""
    trainer, task, model, link = config.trainer, prepared.task, prepared.model, config.link
    environment, spec = task.environment, task.get_environment()
    force_sync = trainer.sampling.force_sync
    env_seed = trainer.seed if environment.env_seed is None else environment.env_seed
    is_local = force_sync or environment.numbers()[0] == 0
    device = torch.device("cpu")
    settings = TorchSettings(num_threads=1 if trainer.num_threads == "auto" else trainer.num_threads)
    ceilings: dict[str, Ceiling] = {}
    async with contextlib.AsyncExitStack() as stack:
        logger.info("bench: opening sampling alone")
        own = open_workers(spec, environment, link, env_seed=env_seed, incarnation=0, force_sync=force_sync)
        workers = await stack.enter_async_context(own)
        alone = await stack.enter_async_context(sampling_alone(workers, model, task, trainer, device=device))
        await alone.warm_up(_WARM_UP_S)
        epoch = await alone.copy_epoch()
        batches = alone.sampling.batcher.statistics()
        batch_rows = batches.num_rows / max(1, batches.num_batches)

        logger.info("bench: opening environments%s", "" if is_local else " and link")
        if is_local:
            again = open_workers(spec, environment, link, env_seed=env_seed, incarnation=0, force_sync=force_sync)
            stepped = SteppedWorkers(await stack.enter_async_context(again))
            await stepped.reset()
            ceilings["environments"] = stepped
        else:
            processes = stepped_processes(spec, environment, env_seed=env_seed)
            ceilings["environments"] = await stack.enter_async_context(processes)
            behind = open_workers(
                costless(workers.info), environment, link, env_seed=0, incarnation=0, force_sync=False
            )
            linked = SteppedWorkers(await stack.enter_async_context(behind))
            await linked.reset()
            ceilings["link"] = linked

        logger.info("bench: opening inference, learner and a run")
        rows = (await in_thread(lambda: epoch[0].gather())).observations
        batch = np.resize(rows, (max(1, round(batch_rows)), *rows.shape[1:]))
        ceilings["inference"] = InferenceAlone(alone.sampling.policy, batch, settings)
        overshoot = max(group.num_envs for group in workers.groups) * trainer.sampling.min_trajectory_length - 1
        learner = LearnerAlone(
            prepared,
            trainer,
            epoch,
            max_overshoot=overshoot,
            placement=await stack.enter_async_context(Placement("bench learner", settings)),
            device=device,
        )
        await learner.measure(_WARM_UP_S)
        ceilings["learner"] = learner
        run_config = with_values(config, {"trainer.exp_dir": str(run_folder)}, source="bench")
        whole = await stack.enter_async_context(whole_run(run_config))
        await whole.measure(_WARM_UP_S)  # its first epochs
        costs = await stack.enter_async_context(
            trainer_costs(workers.info, model, task, trainer, environment, link, device=device)
        )
        subject = Subject(
            environment_id=environment.id,
            num_env_workers=0 if is_local else environment.numbers()[0],
            num_envs=workers.num_envs,
            num_groups=len(workers.groups),
            num_cores=len(os.sched_getaffinity(0)),
            max_policy_lag=trainer.sampling.max_policy_lag,
            waits=trainer.sampling.max_wait_time is None and not is_local,
            room_for_envs=trainer.sampling.most_envs,
        )
        yield _Parts(subject, ceilings, alone, whole, costs, batch_rows)
