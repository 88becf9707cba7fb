"""How the rate of sampling grows with the worker processes, each with environments whose step computes for 1 ms.

    python benchmarks/scaling.py --workers 1 2

The numbers of workers take turns. Printed are the median transitions per second of each, with their range, and the share of what as
many workers would make if each made what one alone does.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics

import torch

import aiorl
from aiorl.environments.supervisor import open_workers
from aiorl.models.base import build_model
from aiorl.tasks.base import build_task
from aiorl.throughput import sampling_alone

SLICE_S = 2.0


async def rate(num_workers: int) -> float:
    """Transitions per second of sampling with `num_workers` workers of 8 environments."""
    table = "task.environment"
    config = aiorl.load_config(
        "configs/w2.toml",
        overrides=[
            f"{table}.id=benchmarks.spinning:Spinning", f"{table}.num_env_workers={num_workers}",
            f"{table}.envs_per_worker=8",
        ],
    )  # fmt: skip
    task, environment, trainer = build_task(config.task), config.task.environment, config.trainer
    async with open_workers(
        task.get_environment(), environment, config.link, env_seed=trainer.seed, incarnation=0, force_sync=False
    ) as workers:
        model = build_model(config.model, workers.info)
        async with sampling_alone(workers, model, task, trainer, device=torch.device("cpu")) as alone:
            await alone.warm_up(SLICE_S / 4, num_ticks=10)
            return (await alone.measure(SLICE_S)).steps_per_s


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rates: dict[int, list[float]] = {num_workers: [] for num_workers in arguments.workers}
    for _ in range(arguments.rounds):
        for num_workers, measured in rates.items():
            measured.append(asyncio.run(rate(num_workers)))
    first = arguments.workers[0]
    for num_workers, measured in rates.items():
        shares = [each / (one / first * num_workers) for each, one in zip(measured, rates[first], strict=True)]
        print(
            f"{num_workers} workers: {statistics.median(measured):,.0f} steps/s ({min(measured):,.0f} to {max(measured):,.0f}), "
            f"{statistics.median(shares):.0%} of linear ({min(shares):.0%} to {max(shares):.0%})"
        )


if __name__ == "__main__":
    main()
