"""Sampling alone by Stable-Baselines3: the rollouts of its in-process PPO on CartPole-v1, which never learns.

    python benchmarks/sb3_sampling.py 3          # the seed

Needs ``pip install stable-baselines3``. Prints what ``sampling.py`` does.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

NUM_ENVS, NUM_ROLLOUTS = 16, 40


class Nothing(BaseCallback):  # type: ignore[misc] # of a package that only this script needs
    """Goes on."""

    def _on_step(self) -> bool:
        return True


def main() -> None:
    """Collects some rollouts of 2,048 transitions."""
    torch.set_num_threads(1)
    model = PPO(
        "MlpPolicy", make_vec_env("CartPole-v1", n_envs=NUM_ENVS, seed=int(sys.argv[1])), n_steps=128, device="cpu"
    )
    _, callback = model._setup_learn(10_000_000, Nothing())
    rates = []
    for _ in range(NUM_ROLLOUTS):
        started = time.perf_counter()
        model.collect_rollouts(model.env, callback, model.rollout_buffer, n_rollout_steps=model.n_steps)
        rates.append(NUM_ENVS * model.n_steps / (time.perf_counter() - started))
    print(json.dumps({"samples_per_s": round(statistics.median(rates), 1), "num_envs": NUM_ENVS}))


if __name__ == "__main__":
    main()
