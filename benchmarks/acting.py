"""How long acting on one batch takes, by back end, model and rows.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/acting.py [--rounds N] [--no-compiled]

Back ends take turns, round after round; each figure is the median over the rounds of microseconds per call, with the range from the first
to the third quartile. It is CPU time of the calling thread, so that other work on the machine disturbs little. Actions are sampled.
"""

from __future__ import annotations

import argparse
import time
import warnings
from statistics import median, quantiles
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from aiorl.compute.compiler import row_buckets
from aiorl.compute.config import CompilerConfig
from aiorl.compute.distributions import Categorical
from aiorl.environments.spaces import ArraySpec, EnvironmentInfo
from aiorl.models.base import Model
from aiorl.models.config import MLPConfig
from aiorl.models.mlp import MLP
from aiorl.sampling.policy import CompiledActing, NumpyActing, Policy, TorchActing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiorl.sampling.policy import Acting

ROUND_S = 0.05
CPU = torch.device("cpu")
VECTOR = EnvironmentInfo(ArraySpec((4,), "float32"), ArraySpec((), "int64"), 2, "same_step", None)
IMAGE = ArraySpec((4, 84, 84), "uint8")


class Convolutional(Model):
    """The network of Mnih et al. 2015 ("Human-level control through deep reinforcement learning"), for six actions."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU()),
        )
        self.policy_head = nn.Linear(512, 6)
        self.value_head = nn.Linear(512, 1)

    def policy(self, observations: Tensor) -> Categorical:
        """Of bytes, scaled here."""
        return Categorical(self.policy_head(self.trunk(observations / 255.0)))

    def value(self, observations: Tensor) -> Tensor:
        """Not asked for by acting."""
        value: Tensor = self.value_head(self.trunk(observations / 255.0))
        return value.squeeze(1)


def get_actions(model: nn.Module, observations: Tensor, optimal: bool) -> Categorical:
    """As tasks do by default."""
    assert isinstance(model, Model)
    return model.policy(observations)


def compiled(model: Model, observation: ArraySpec, max_rows: int) -> CompiledActing:
    """Acting as ``[trainer.compiler] model = true`` compiles it."""
    acting = CompiledActing(
        model, get_actions, CPU, compiler=CompilerConfig(model=True), observation=observation, max_rows=max_rows
    )
    started = time.perf_counter()
    acting.warm_up(optimal=False)
    print(f"compiled for {len(row_buckets(max_rows))} numbers of rows in {time.perf_counter() - started:.0f} s")
    return acting


def call_us(call: Callable[[], object]) -> float:
    """Microseconds of CPU time per call, over about `ROUND_S`."""
    num_calls, started = 0, time.thread_time()
    while (elapsed := time.thread_time() - started) < ROUND_S:
        call()
        num_calls += 1
    return 1e6 * elapsed / num_calls


def measure(name: str, actings: dict[str, Acting], spec: ArraySpec, sizes: Sequence[int], rounds: int) -> None:
    """Prints a row of the table for each number of rows."""
    rng = np.random.default_rng(0)
    policies = {back_end: Policy(acting, optimal=False) for back_end, acting in actings.items()}
    for num_rows in sizes:
        observations = rng.integers(0, 256, (num_rows, *spec.shape)).astype(spec.dtype)
        rows = observations, rng.random(num_rows)
        times: dict[str, list[float]] = {back_end: [] for back_end in policies}
        for _ in range(rounds + 1):
            for back_end, policy in policies.items():
                times[back_end].append(call_us(lambda policy=policy, rows=rows: policy.act(rows)))  # type: ignore[misc]
        cells = [_cell(times[back_end][1:]) if back_end in times else "" for back_end in ("numpy", "torch", "compiled")]
        print(f"| {name} | {num_rows} | {' | '.join(cells)} |")


def _cell(values: list[float]) -> str:
    first, _, third = quantiles(values, n=4)
    return f"{median(values):,.0f} ({first:,.0f} to {third:,.0f})"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compiled", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    mlp, cnn = MLP(VECTOR, MLPConfig()), Convolutional()
    vectors: dict[str, Acting] = {
        "numpy": NumpyActing(mlp.policy_layers(), mlp.activation),
        "torch": TorchActing(mlp, get_actions, CPU),
    }
    images: dict[str, Acting] = {"torch": TorchActing(cnn, get_actions, CPU)}
    if not options.no_compiled:
        vectors["compiled"] = compiled(mlp, VECTOR.observation, 1024)
        images["compiled"] = compiled(cnn, IMAGE, 64)
    print("| model | rows | NumPy, µs | torch, µs | compiled, µs |")
    print("|---|---|---|---|---|")
    measure("MLP, 2 hidden layers of 64, tanh", vectors, VECTOR.observation, (8, 64, 1024), options.rounds)
    measure("NatureCNN, bytes", images, IMAGE, (8, 64), options.rounds)


if __name__ == "__main__":
    main()
