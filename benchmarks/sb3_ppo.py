"""The same work by Stable-Baselines3's in-process PPO: what ``configs/w2.toml`` says, in its words.

    python benchmarks/sb3_ppo.py 3          # the seed

Needs ``pip install stable-baselines3``. Prints one line of JSON, as ``ppo.py`` does.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

NUM_ENVS = 16


def main() -> None:
    """Trains, and prints the figures."""
    seed = int(sys.argv[1])
    torch.set_num_threads(1)  # with two it is slower
    model = PPO(
        "MlpPolicy",
        make_vec_env("CartPole-v1", n_envs=NUM_ENVS, seed=seed),
        n_steps=2048 // NUM_ENVS,
        batch_size=512,
        n_epochs=4,
        learning_rate=3e-4,
        gamma=0.99,
        gae_lambda=0.95,
        clip_range=0.2,
        ent_coef=0.01,
        vf_coef=0.5,
        max_grad_norm=0.5,
        policy_kwargs={"net_arch": [64, 64]},
        seed=seed,
        device="cpu",
        stats_window_size=100,
    )
    started = time.perf_counter()
    model.learn(200_704)
    seconds = time.perf_counter() - started
    returns = [episode["r"] for episode in model.ep_info_buffer]
    figures = {
        "num_samples": model.num_timesteps,
        "seconds": round(seconds, 3),
        "samples_per_s": round(model.num_timesteps / seconds),
        "return_mean": round(float(np.mean(returns)), 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
