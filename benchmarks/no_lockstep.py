"""What an environment that is 50 times slower than the rest costs the others: only its own worker waits for it.

    python benchmarks/no_lockstep.py [--lag 0] [--pairs 20] [--seconds 3] [--step-s 0.005]

Environments wait instead of computing, so that two cores serve every worker. Two sets of workers, of which one has the slow
environment in its last worker, are sampled in turn, pair after pair, in changing order. Compared is the throughput of all workers but
the last. Printed are medians with their range, and the median loss over the pairs with its 95 % interval.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from aiorl.environments.config import EnvironmentConfig, LinkConfig
from aiorl.environments.make import seed_of
from aiorl.environments.spaces import EnvironmentSpec
from aiorl.environments.supervisor import open_workers
from aiorl.models.config import MLPConfig
from aiorl.models.mlp import MLP
from aiorl.sampling.batcher import MicroBatcher
from aiorl.sampling.channel import Channel
from aiorl.sampling.config import SamplingConfig
from aiorl.sampling.policy import NumpyActing, Policy
from aiorl.sampling.rollout import Rollout

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from aiorl.environments.supervisor import Workers
    from aiorl.sampling.trajectory import TrajectoryBatch

STEP_S = 0.005
NUM_WORKERS, NUM_ENVS = 3, 4  # of a worker, in two groups


@dataclass(frozen=True)
class Throughput:
    """Transitions per second that were delivered."""

    others: float  # of all workers but the last
    last: float


async def sample(
    workers: Workers,
    *,
    seconds: float,
    lag: int,
    num_epoch_samples: int = 512,
    look: Callable[[TrajectoryBatch], None] | None = None,
) -> Throughput:
    """Samples for about that long, and shows each epoch to `look`; the learner takes no time."""
    config = SamplingConfig(num_epoch_samples=num_epoch_samples, max_wait_time=0.0, max_policy_lag=lag)
    model = MLP(workers.info, MLPConfig(name="mlp", hidden_sizes=(64, 64)))
    policy = Policy(NumpyActing(model.policy_layers(), model.activation), optimal=False)
    channel: Any = Channel(lag + 1)
    first_slow = (NUM_WORKERS - 1) * NUM_ENVS
    async with MicroBatcher(policy.act, max_batch_size=NUM_WORKERS * NUM_ENVS // 2, max_wait_time=0.0) as batcher:
        rollout = Rollout(
            workers.groups, info=workers.info, config=config, batcher=batcher, policy=policy, channel=channel, seed=1
        )
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(rollout.run())
            counts = [0, 0]
            epoch, started, ended = 0, 0.0, 0.0
            while not epoch or ended - started < seconds:
                sealed = await channel.get()
                ended = time.perf_counter()
                if not epoch:
                    started = ended  # the first epoch is the warm-up
                else:
                    for segment in sealed.segments:
                        counts[segment.first_env >= first_slow] += segment.num_transitions
                if look is not None:
                    look(sealed.gather())
                sealed.release(rollout.pool)
                epoch += 1
                policy.publish(epoch, policy.snapshot())
                rollout.learned(epoch)
            running.cancel()
    return Throughput(counts[0] / (ended - started), counts[1] / (ended - started))


def workers_of(*, step_s: float, with_slow: bool) -> AbstractAsyncContextManager[Workers]:
    """Workers whose environments wait; with the slow one, or without."""
    config = EnvironmentConfig(id="CartPole-v1", num_env_workers=NUM_WORKERS, envs_per_worker=NUM_ENVS)
    slow_seed = seed_of(1, NUM_WORKERS * NUM_ENVS - 1, 0) if with_slow else -1
    spec = EnvironmentSpec("benchmarks.waiting:Waiting", {"step_s": step_s, "slow_seed": slow_seed})
    return open_workers(spec, config, LinkConfig(), env_seed=1, incarnation=0, force_sync=False)


async def measure(
    *, lag: int, num_pairs: int, seconds: float, step_s: float, num_epoch_samples: int = 512
) -> list[tuple[Throughput, Throughput]]:
    """Pairs of what was delivered without the slow environment and with it."""
    pairs = []
    async with workers_of(step_s=step_s, with_slow=False) as even, workers_of(step_s=step_s, with_slow=True) as slow:
        for index in range(num_pairs):
            found = {}
            for workers in (even, slow) if index % 2 else (slow, even):
                found[workers is slow] = await sample(
                    workers, seconds=seconds, lag=lag, num_epoch_samples=num_epoch_samples
                )
            pairs.append((found[False], found[True]))
    return pairs


@dataclass(frozen=True)
class Loss:
    """Share of the others' throughput that the slow environment cost."""

    median: float
    low: float  # ends of the median's 95 % interval; infinite with fewer than six pairs
    high: float


def loss_of(pairs: list[tuple[Throughput, Throughput]]) -> Loss:
    """Median over the pairs, and its interval between two order statistics, whatever the distribution is."""
    losses = sorted(1 - slow.others / even.others for even, slow in pairs)
    count, rank, outside = len(losses), 0, 0.5 ** len(losses)
    while 2 * outside <= 0.05:
        rank += 1
        outside += math.comb(count, rank) * 0.5**count
    low, high = (losses[rank - 1], losses[-rank]) if rank else (-math.inf, math.inf)
    return Loss(statistics.median(losses), low, high)


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lag", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--step-s", type=float, default=STEP_S)
    args = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        pairs = runner.run(measure(lag=args.lag, num_pairs=args.pairs, seconds=args.seconds, step_s=args.step_s))
    for name, found in (("even", [even for even, _ in pairs]), ("one slow", [slow for _, slow in pairs])):
        others, last = spread([each.others for each in found]), spread([each.last for each in found])
        print(f"{name:9} the other workers: {others} steps/s; the last worker: {last} steps/s")
    loss = loss_of(pairs)
    print(f"the others lose {loss.median:.1%} ({loss.low:.1%} to {loss.high:.1%}) at max_policy_lag = {args.lag}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
