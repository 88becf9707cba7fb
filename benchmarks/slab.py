"""Observations in shared memory against observations in messages: what a tick costs at either end, by its size.

    python benchmarks/slab.py [--kib 1 4 16 64 256 1024 2048] [--pairs 20] [--seconds 0.1]

A worker process hosts two groups of 16 environments that return a row and do nothing else; the trainer copies each tick's
observations into a page, as training does, and steps on. One such worker uses a slab and another one messages; they are driven
in turn, pair after pair. Printed are the medians of ticks per second, the processor time that a tick takes of the trainer's and
of the worker's process (all their threads), and the median and quartiles of the ratio of ticks per second within a pair.
`aiorl.environments.slab.MIN_BYTES` is taken from it.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from contextlib import asynccontextmanager
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
    from collections.abc import AsyncIterator, Sequence

    from aiorl.environments.make import Group
    from aiorl.environments.supervisor import Workers

NUM_ENVS = 16
NEVER, ALWAYS = 2**62, 0
WARM_UP_S = 0.2


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


class Bench:
    """One worker, and what has been measured of it."""

    def __init__(self, workers: Workers, process: psutil.Process) -> None:
        self.rates: list[float] = []
        self._workers = workers
        self._process = process
        self._pages = [
            np.empty((group.num_envs, *workers.info.observation.shape), np.uint8) for group in workers.groups
        ]
        self._trainer_s = 0.0
        self._started_s = 0.0
        self._num_ticks = 0

    async def start(self) -> None:
        """Starts the environments, and warms up."""
        for group in self._workers.groups:
            await group.reset()
        await drive_all(self._workers, self._pages, WARM_UP_S)
        self._started_s = self._worker_s()

    async def measure(self, seconds: float) -> None:
        """Steps for a while."""
        since, trainer = time.perf_counter(), time.process_time()
        num_ticks = await drive_all(self._workers, self._pages, seconds)
        self._trainer_s += time.process_time() - trainer
        self._num_ticks += num_ticks
        self.rates.append(num_ticks / (time.perf_counter() - since))

    def _worker_s(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system

    def __str__(self) -> str:
        trainer, worker = (
            used / self._num_ticks * 1e6 for used in (self._trainer_s, self._worker_s() - self._started_s)
        )
        return f"{statistics.median(self.rates):10,.0f} {trainer:8.0f} {worker:8.0f}"


@asynccontextmanager
async def opened(num_bytes: int, min_bytes: int) -> AsyncIterator[Bench]:
    """A worker whose groups' observations of `num_bytes` lie in a slab unless that is below `min_bytes`."""
    slab.MIN_BYTES = min_bytes  # type: ignore[misc]  # a run has no setting for it
    spec = EnvironmentSpec("slab:Still", {"num_bytes": num_bytes // NUM_ENVS})
    config = EnvironmentConfig(num_env_workers=1, envs_per_worker=2 * NUM_ENVS)
    others = set(psutil.Process().children())
    async with open_workers(spec, config, LinkConfig(), env_seed=1, incarnation=0, force_sync=False) as workers:
        (process,) = set(psutil.Process().children()) - others
        bench = Bench(workers, process)
        await bench.start()
        yield bench


async def compare(num_bytes: int, pairs: int, seconds: float) -> str:
    """A line of the table."""
    async with opened(num_bytes, NEVER) as messages, opened(num_bytes, ALWAYS) as shared:
        for _ in range(pairs):
            await messages.measure(seconds)
            await shared.measure(seconds)
        ratios = [ours / theirs for ours, theirs in zip(shared.rates, messages.rates, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return f"{num_bytes // 1024:8,} | {messages} | {shared} | {middle:5.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kib", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 2048], help="of a group's tick")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.1)
    args = parser.parse_args()
    columns = f"{'ticks/s':>10} {'trainer':>8} {'worker':>8}"
    print(f"{'':8} | {'in messages':28} | {'in a slab':28} | ratio of")
    print(f"{'KiB':>8} | {columns} | {columns} | ticks/s (quartiles)")
    for kib in args.kib:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            print(runner.run(compare(kib * 1024, args.pairs, args.seconds)), flush=True)
    print("trainer, worker: processor time of a tick, us")


if __name__ == "__main__":
    main()
