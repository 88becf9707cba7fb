"""Memory, descriptors and threads of a run that goes on and on: how large its processes are, and whether they grow.

    python benchmarks/soak.py [--config configs/cartpole.toml] [--seconds 600] [--warm-up-s 60]

Starts ``python -m aiorl run`` without a limit and reads each of its processes every half second. Compared are the medians of the first
and the last quarter after the warm-up. Memory is what each process holds resident (RSS); the sum counts shared pages once for each
process, and so is an upper bound.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

INTERVAL_S = 0.5
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Reading:
    """One look at a process."""

    rss_bytes: int
    num_fds: int
    num_threads: int


@dataclass(frozen=True)
class Course:
    """What became of one process between the first and the last quarter of the time."""

    name: str
    rss_bytes: float  # in the last quarter
    growth: float  # relative
    fds: tuple[int, int]  # the most in the first quarter, the fewest in the last
    threads: tuple[int, int]


@contextmanager
def running(config: str, exp_dir: Path, *overrides: str) -> Iterator[psutil.Popen]:
    """A run without a limit; killed at the end."""
    sets = [f"trainer.exp_dir={exp_dir}", "trainer.max_samples=1000000000", "trainer.target_return=none", *overrides]
    command = [sys.executable, "-m", "aiorl", "run", config, *(part for each in sets for part in ("--set", each))]
    with (exp_dir.parent / "output").open("wb") as output:
        process = psutil.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def read(process: psutil.Process) -> Reading:
    """Looks at one process."""
    return Reading(process.memory_info().rss, process.num_fds(), process.num_threads())


def watch(trainer: psutil.Popen, exp_dir: Path, *, warm_up_s: float, seconds: float) -> list[Course]:
    """Reads the trainer and its workers, from `warm_up_s` after the first learned epoch on."""
    metrics = exp_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        if trainer.poll() is not None:
            raise RuntimeError(f"the run ended: {(exp_dir.parent / 'output').read_text()}")
        time.sleep(0.1)
    time.sleep(warm_up_s)
    processes = {"trainer": trainer} | {
        f"worker {number}": child for number, child in enumerate(trainer.children(recursive=True))
    }
    readings: dict[str, list[Reading]] = {name: [] for name in processes}
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        for name, process in processes.items():
            readings[name].append(read(process))
        time.sleep(INTERVAL_S)
    return [course_of(name, found) for name, found in readings.items()]


def course_of(name: str, readings: Sequence[Reading]) -> Course:
    """Compares the first and the last quarter."""
    first, last = readings[: len(readings) // 4], readings[-(len(readings) // 4) :]
    before = statistics.median(reading.rss_bytes for reading in first)
    after = statistics.median(reading.rss_bytes for reading in last)
    return Course(
        name,
        after,
        after / before - 1,
        (max(reading.num_fds for reading in first), min(reading.num_fds for reading in last)),
        (max(reading.num_threads for reading in first), min(reading.num_threads for reading in last)),
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/cartpole.toml")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--warm-up-s", type=float, default=60.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        exp_dir = Path(folder) / "run"
        with running(args.config, exp_dir) as trainer:
            courses = watch(trainer, exp_dir, warm_up_s=args.warm_up_s, seconds=args.seconds)
    for course in courses:
        print(
            f"{course.name:9} {course.rss_bytes / 1e6:6.1f} MB, growth {course.growth:+.2%}, "
            f"descriptors {course.fds[0]} -> {course.fds[1]}, threads {course.threads[0]} -> {course.threads[1]}"
        )
    print(f"together  {sum(course.rss_bytes for course in courses) / 1e6:6.1f} MB")


if __name__ == "__main__":
    main()
