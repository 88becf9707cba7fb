"""An environment 50 times slower than the rest, in a real worker: what it costs the others, and what becomes of its trajectories."""

from __future__ import annotations

import asyncio
import statistics
from typing import TYPE_CHECKING

import pytest
import uvloop

from benchmarks.no_lockstep import NUM_ENVS, NUM_WORKERS, STEP_S, loss_of, measure, sample, workers_of
from benchmarks.waiting import Waiting

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from aiorl.sampling.trajectory import TrajectoryBatch

SLOW = NUM_WORKERS * NUM_ENVS - 1
ATTEMPTS = 3  # the machine may be busy with other things


def run(work: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(debug=False, loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


@pytest.mark.parametrize("lag", [0, 1])
def test_its_trajectories_arrive_whole_and_are_used(lag: int) -> None:
    latest: dict[int, list[int]] = {}  # (episode, step) learned last, by environment
    num_rows = dict.fromkeys(range(SLOW + 1), 0)

    def look(batch: TrajectoryBatch) -> None:
        for env, start, length in zip(batch.environments, batch.starts, batch.lengths, strict=True):
            for row in range(start, start + length):
                name = batch.observations[row, 1:].astype(int).tolist()
                if int(env) in latest:
                    episode, step = latest[int(env)]
                    assert name == ([episode, step + 1] if step + 1 < Waiting.length else [episode + 1, 0])
                latest[int(env)] = name
                num_rows[int(env)] += 1

    async def play() -> None:
        async with workers_of(step_s=0.0005, with_slow=True) as workers:
            await sample(workers, seconds=2.0, lag=lag, num_epoch_samples=256, look=look)

    run(play())
    assert num_rows[SLOW] >= 10
    # In a worker of its own, the slow environment holds back only what steps beside it.
    assert num_rows[0] > 2 * num_rows[SLOW]


def test_the_other_workers_lose_little() -> None:
    found = []
    for _ in range(ATTEMPTS):
        pairs = run(measure(lag=0, num_pairs=3, seconds=0.5, step_s=0.002, num_epoch_samples=256))
        found.append(loss_of(pairs).median)
        assert statistics.median(slow.last / even.last for even, slow in pairs) < 0.5  # it is slow indeed
        if found[-1] < 0.15:
            return
    raise AssertionError(f"the other workers lost {found} of their throughput")


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1])
def test_the_other_workers_lose_less_than_a_twentieth(lag: int) -> None:
    loss = loss_of(run(measure(lag=lag, num_pairs=20, seconds=3.0, step_s=STEP_S)))
    assert loss.high < 0.05, loss
