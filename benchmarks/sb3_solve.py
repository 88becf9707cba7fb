"""The same race by Stable-Baselines3, with the hyper-parameters that its zoo has for CartPole-v1.

    python benchmarks/sb3_solve.py 3          # the seed

Needs ``pip install stable-baselines3``. Prints what ``solve.py`` does.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from typing import Any

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

BOUND, WINDOW = 475.0, 20


class Watch(BaseCallback):  # type: ignore[misc] # of a package that only this script needs
    """Ends training when the mean return of 20 episodes is 475."""

    def __init__(self) -> None:
        super().__init__()
        self.returns: deque[float] = deque(maxlen=WINDOW)

    def _on_step(self) -> bool:
        self.returns.extend(info["episode"]["r"] for info in self.locals["infos"] if "episode" in info)
        solved = len(self.returns) == WINDOW and sum(self.returns) / WINDOW >= BOUND
        if solved:
            print("SOLVED", flush=True)
        return not solved


def falling(start: float) -> Any:
    """A value that falls linearly to 0 at the end of training."""
    return lambda left: left * start


def main() -> None:
    """Trains until the bound is met, or for 100,000 steps."""
    seed = int(sys.argv[1])
    torch.set_num_threads(1)
    model = PPO(
        "MlpPolicy",
        make_vec_env("CartPole-v1", n_envs=8, seed=seed),
        n_steps=32,
        batch_size=256,
        n_epochs=20,
        gae_lambda=0.8,
        gamma=0.98,
        ent_coef=0.0,
        learning_rate=falling(1e-3),
        clip_range=falling(0.2),
        seed=seed,
        device="cpu",
    )
    watch = Watch()
    model.learn(100_000, callback=watch)
    print(
        json.dumps({"num_samples": model.num_timesteps, "return_mean": sum(watch.returns) / max(1, len(watch.returns))})
    )


if __name__ == "__main__":
    main()
