"""Trains CartPole-v1 until the mean return of 20 episodes is 475, then says so on standard output.

    python benchmarks/solve.py configs/solve.toml trainer.seed=3

Prints ``SOLVED`` at that moment, so that whoever started the process can take the time from its start, and one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections import deque
from typing import Any

import gymnasium

import aiorl

BOUND, WINDOW = 475.0, 20
returns: deque[float] = deque(maxlen=WINDOW)


class Watched(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Notes the return of each episode; for environments in the trainer's process."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self._sum = 0.0

    def step(self, action: Any) -> Any:
        """Adds the reward, and notes the sum when the episode ends."""
        result = self.env.step(action)
        self._sum += float(result[1])
        if result[2] or result[3]:
            _noted().append(self._sum)
            self._sum = 0.0
        return result


def _noted() -> deque[float]:
    """The script's own list: the wrapper is imported a second time, as ``solve``."""
    found: deque[float] = sys.modules["__main__"].returns
    return found


async def main() -> None:
    """Trains until the bound is met, or ``max_samples``."""
    path, *overrides = sys.argv[1:]
    num_samples = 0
    with tempfile.TemporaryDirectory() as folder:
        fixed = [
            f'trainer.exp_dir="{folder}/run"',
            "logger.terminal=false",
            'task.environment.wrappers=["solve:Watched"]',
        ]
        async with aiorl.open_run(aiorl.load_config(path, overrides=[*fixed, *overrides])) as run:
            async for epoch in run:
                num_samples = epoch.num_samples
                if len(returns) == WINDOW and sum(returns) / WINDOW >= BOUND:
                    print("SOLVED", flush=True)
                    break
    print(json.dumps({"num_samples": num_samples, "return_mean": sum(returns) / max(1, len(returns))}))


if __name__ == "__main__":
    try:
        import uvloop
    except ImportError:
        asyncio.run(main())
    else:
        uvloop.run(main())
