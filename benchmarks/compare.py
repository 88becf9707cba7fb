r"""Runs commands in turn, seed after seed, and compares each with the first.

    python benchmarks/compare.py --seeds 5 \
        "bench/bin/python benchmarks/sb3_ppo.py {seed}" \
        "python benchmarks/ppo.py configs/w2.toml trainer.seed={seed}"

Each command prints one line of JSON with ``samples_per_s`` or ``return_mean``, or both, and may print ``SOLVED`` before: then the
seconds from the start of the process until that line are compared. Printed are medians with their range, the median of the
ratios within a seed, and the mean return with its standard error.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from typing import Any


def measure(command: str, seed: int) -> dict[str, Any]:
    """What one run printed, with ``solved_s`` where it solved its task."""
    started = time.perf_counter()
    figures: dict[str, Any] = {}
    with subprocess.Popen(shlex.split(command.format(seed=seed)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("SOLVED"):
                figures["solved_s"] = time.perf_counter() - started
            elif line.startswith("{"):
                figures |= json.loads(line)
    if process.returncode:
        sys.exit(f"{command.format(seed=seed)} ended with {process.returncode}")
    return figures


def report(name: str, runs: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> None:
    """Prints one command's figures."""
    print(f"\n{name}")
    for figure in ("samples_per_s", "solved_s"):
        values = [run[figure] for run in runs if figure in run]
        if values:
            ratios = [
                run[figure] / other[figure]
                for run, other in zip(runs, baseline, strict=True)
                if figure in run and figure in other
            ]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "none"
            print(
                f"  {figure}: median {statistics.median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f}), "
                f"{len(values)} of {len(runs)}; ratio to the first command {ratio}"
            )
    returns = [run["return_mean"] for run in runs if "return_mean" in run]
    if len(returns) > 1:
        error = statistics.stdev(returns) / len(returns) ** 0.5
        print(f"  return_mean: {statistics.mean(returns):.1f} ± {error:.1f} (standard error); each {returns}")


def main() -> None:
    """Alternates the commands and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", help="with {seed} where the seed belongs; the first is the baseline")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 1")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {command: [] for command in arguments.commands}
    for seed in range(1, arguments.seeds + 1):
        for command, figures in runs.items():
            figures.append(measure(command, seed))
            print(f"seed {seed}: {command.format(seed=seed)}: {figures[-1]}", file=sys.stderr, flush=True)
    for command, figures in runs.items():
        report(command, figures, runs[arguments.commands[0]])


if __name__ == "__main__":
    main()
