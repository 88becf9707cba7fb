"""Sampling alone: environments, link, batcher and acting of a configuration, and nobody who learns.

    python benchmarks/sampling.py configs/w2.toml task.environment.num_env_workers=2 task.environment.envs_per_worker=128

Prints one line of JSON: the median of the transitions per second of some slices, and the workers and environments.
"""

from __future__ import annotations

import json
import statistics
import sys

import torch
import uvloop

import aiorl
from aiorl.environments.supervisor import open_workers
from aiorl.models.base import build_model
from aiorl.tasks.base import build_task
from aiorl.throughput import sampling_alone

NUM_SLICES, SLICE_S, WARM_UP_S = 5, 1.0, 0.5


async def main() -> None:
    """Samples for some seconds."""
    path, *overrides = sys.argv[1:]
    config = aiorl.load_config(path, overrides=overrides)
    task, environment, trainer = build_task(config.task), config.task.environment, config.trainer
    async with open_workers(
        task.get_environment(), environment, config.link, env_seed=trainer.seed, incarnation=0, force_sync=False
    ) as workers:
        torch.manual_seed(trainer.seed)
        model = build_model(config.model, workers.info)
        async with sampling_alone(workers, model, task, trainer, device=torch.device("cpu")) as alone:
            await alone.warm_up(WARM_UP_S, num_ticks=20)
            slices = [await alone.measure(SLICE_S) for _ in range(NUM_SLICES)]
    figures = {
        "samples_per_s": round(statistics.median(each.steps_per_s for each in slices), 1),
        "trainer_us_per_tick": round(1e6 * statistics.median(each.cpu_s / each.num_ticks for each in slices), 1),
        "num_workers": environment.num_env_workers,
        "num_envs": workers.num_envs,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    uvloop.run(main())
