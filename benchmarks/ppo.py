"""One training run of aiorl, timed from the first action to the last optimizer step.

    python benchmarks/ppo.py configs/w2.toml trainer.seed=3 trainer.sampling.max_policy_lag=1

Prints one line of JSON: transitions, seconds, transitions per second, the mean return of the last 100 episodes, and
the median seconds of an epoch and its parts.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time

import aiorl
from aiorl.tasks.hooks import Callback, State

PARTS = ("epoch_s", "sample_s", "prepare_s", "learn_s")


class Clock(Callback):
    """Notes when training starts and when each epoch is learned."""

    started = ended = 0.0

    def on_training_start(self, state: State) -> None:
        """Nothing has been stepped yet."""
        self.started = time.perf_counter()

    def on_epoch_end(self, state: State) -> None:
        """The epoch's last optimizer step is done."""
        self.ended = time.perf_counter()


async def main() -> None:
    """Trains, and prints the figures."""
    path, *overrides = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        config = aiorl.load_config(
            path, overrides=[f'trainer.exp_dir="{folder}/run"', "logger.terminal=false", *overrides]
        )
        clock = Clock()
        async with aiorl.open_run(config, callbacks=[clock]) as run:
            epochs = [epoch async for epoch in run]
    seconds = clock.ended - clock.started
    last = epochs[-1]
    figures = {
        "num_samples": last.num_samples,
        "seconds": round(seconds, 3),
        "samples_per_s": round(last.num_samples / seconds),
        "return_mean": round(last.episode_return_mean, 1),
    } | {name: round(statistics.median(e.metrics[f"time/{name}"] or 0.0 for e in epochs), 4) for name in PARTS}
    print(json.dumps(figures))


if __name__ == "__main__":
    try:
        import uvloop
    except ImportError:
        asyncio.run(main())
    else:
        uvloop.run(main())
