"""Prints what a tick and a row cost the trainer, in units of the reference: ``python -m tests.bench.cost NUM_ENV_WORKERS``.

In a process of its own, without debugging, on the loop that `run` takes.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile

import torch

from aiorl.bench.trainer_cost import trainer_costs
from aiorl.config import load_config
from aiorl.environments.preflight import preflight
from aiorl.preparation import prepare
from aiorl.standalone import loop_factory


async def measure(exp_dir: str, num_env_workers: int) -> list[float]:
    config = load_config(
        None,
        [
            f"trainer.exp_dir={exp_dir}",
            "trainer.sampling.num_epoch_samples=2048",
            "trainer.sampling.max_wait_time=0.0",
            f"task.environment.num_env_workers={num_env_workers}",
        ],
    )
    prepared = prepare(config, None, None, None, None, "auto")
    info, environment = preflight(prepared.task.get_environment()), prepared.task.environment
    async with trainer_costs(
        info, prepared.model, prepared.task, config.trainer, environment, config.link, device=torch.device("cpu")
    ) as costs:
        for _ in range(5):
            await costs.measure(0.1)
        found = costs.fit()
        assert found is not None
        return [found.per_tick_us / found.reference_us, found.per_row_us / found.reference_us]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=loop_factory("auto")) as runner:
        sys.stdout.write(json.dumps(runner.run(measure(folder, int(sys.argv[1])))))
