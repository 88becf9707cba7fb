"""Observations in shared memory against observations in messages: what a tick costs at either end, by its size.

    python benchmarks/slab.py [--kib 1 4 16 64 256 1024 2048] [--pairs 5] [--seconds 0.5]

One worker process hosts two groups of 16 environments that return a row and do nothing else. The trainer copies each tick's
observations into a page, as training does, and steps on. The two ways alternate, pair after pair. Printed are medians over the
pairs of ticks per second and of the processor time that a tick takes of the trainer's and of the worker's process (all their
threads), and the ratio of ticks per second within a pair, with its range. `aiorl.environments.slab.MIN_BYTES` is taken from it.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import psutil
import uvloop

from aiorl.environments import slab
from aiorl.environments.config import EnvironmentConfig, LinkConfig
from aiorl.environments.spaces import EnvironmentSpec
from aiorl.environments.supervisor import open_workers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiorl.environments.make import Group
    from aiorl.environments.supervisor import Workers

NUM_ENVS = 16
NEVER, ALWAYS = 2**62, 0


class Still(gymnasium.Env[Any, Any]):
    """Shows the same row of `num_bytes` for ever."""

    def __init__(self, num_bytes: int) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 255, (num_bytes,), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(2)
        self._row = np.arange(num_bytes).astype(np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The row."""
        return self._row, {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """The row."""
        return self._row, 0.0, False, False, {}


@dataclass(frozen=True)
class Cost:
    """What one measurement found."""

    ticks_per_s: float
    trainer_us: float
    worker_us: float


async def drive(group: Group, page: Any, until: float) -> int:
    """Steps a group until a time of the clock. Returns the ticks."""
    actions = np.zeros(group.num_envs, np.int64)
    num_ticks = 0
    while time.perf_counter() < until:
        tick = await group.step(actions)
        np.copyto(page, tick.observations)
        num_ticks += 1
    return num_ticks


async def drive_all(workers: Workers, pages: Sequence[Any], seconds: float) -> int:
    """Steps all groups. Returns the ticks."""
    until = time.perf_counter() + seconds
    async with asyncio.TaskGroup() as tasks:
        driving = [
            tasks.create_task(drive(group, page, until)) for group, page in zip(workers.groups, pages, strict=True)
        ]
    return sum(task.result() for task in driving)


def worker_time_s() -> float:
    """Processor time of the children of this process."""
    times = [child.cpu_times() for child in psutil.Process().children()]
    return sum(each.user + each.system for each in times)


async def measure(num_bytes: int, seconds: float, min_bytes: int) -> Cost:
    """One worker, whose groups' observations of `num_bytes` lie in a slab unless they are below `min_bytes`."""
    slab.MIN_BYTES = min_bytes  # type: ignore[misc]  # what a run has no setting for
    spec = EnvironmentSpec("slab:Still", {"num_bytes": num_bytes // NUM_ENVS})
    config = EnvironmentConfig(num_env_workers=1, envs_per_worker=2 * NUM_ENVS)
    async with open_workers(spec, config, LinkConfig(), env_seed=1, incarnation=0, force_sync=False) as workers:
        pages = [np.empty_like(await group.reset()) for group in workers.groups]
        await drive_all(workers, pages, seconds / 5)  # a warm-up
        since, trainer, worker = time.perf_counter(), time.process_time(), worker_time_s()
        num_ticks = await drive_all(workers, pages, seconds)
        return Cost(
            num_ticks / (time.perf_counter() - since),
            (time.process_time() - trainer) / num_ticks * 1e6,
            (worker_time_s() - worker) / num_ticks * 1e6,
        )


def median(costs: Sequence[Cost]) -> Iterator[float]:
    """Of each figure."""
    for name in ("ticks_per_s", "trainer_us", "worker_us"):
        yield statistics.median(getattr(cost, name) for cost in costs)


def compare(num_bytes: int, pairs: int, seconds: float) -> str:
    """A line of the table."""
    messages, shared = [], []
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for _ in range(pairs):
            messages.append(runner.run(measure(num_bytes, seconds, NEVER)))
            shared.append(runner.run(measure(num_bytes, seconds, ALWAYS)))
    ratios = [ours.ticks_per_s / theirs.ticks_per_s for ours, theirs in zip(shared, messages, strict=True)]
    figures = [
        f"{rate:10,.0f} {trainer:8.0f} {worker:8.0f}" for rate, trainer, worker in map(median, (messages, shared))
    ]
    return f"{num_bytes // 1024:8,} | {' | '.join(figures)} | {statistics.median(ratios):5.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kib", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 2048], help="of a group's tick")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5)
    args = parser.parse_args()
    columns = f"{'ticks/s':>10} {'trainer':>8} {'worker':>8}"
    print(f"{'':8} | {'in messages':28} | {'in a slab':28} | ratio of")
    print(f"{'KiB':>8} | {columns} | {columns} | ticks/s (range)")
    for kib in args.kib:
        print(compare(kib * 1024, args.pairs, args.seconds), flush=True)
    print("trainer, worker: processor time of a tick, us")


if __name__ == "__main__":
    main()
