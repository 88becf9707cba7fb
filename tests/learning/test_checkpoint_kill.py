"""A kill at any point of a save leaves a loadable newest checkpoint.

Run as a script, this file is the system under test: it imports torch once and forks a process for each kill.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aiorl.learning.checkpoint import CheckpointStore
from aiorl.learning.snapshot import Buffers, Contents

NUM_ELEMENTS = 200_000


def filled(num_steps: int) -> Contents:
    """Every number is ``num_steps``, so that a mixture of two saves would show."""
    tensor = torch.full((NUM_ELEMENTS,), float(num_steps))
    return Contents({"a": tensor}, {"exp_avg": tensor}, {}, {"num_steps": num_steps})


async def save_for_ever(folder: Path, saved: int) -> None:
    """Save one checkpoint after the other, and write a byte when one is said to be saved."""
    store = CheckpointStore(folder, only_most_recent=True)
    newest = store.newest()
    num_steps = int(newest.name.rpartition("_")[2]) if newest is not None else 0
    buffers = Buffers()
    while True:
        num_steps += 1
        await store.save(buffers.copy(filled(num_steps)))
        os.write(saved, b".")


def fork_and_kill(folder: Path, after_s: float) -> int:
    """Kill a saving process ``after_s`` seconds after its first save; returns how many saves it reported."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        asyncio.run(save_for_ever(folder, writer))
    os.close(writer)
    reported = len(os.read(reader, 1))
    select.select([], [], [], after_s)  # the kill falls at a random point of a later save
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while chunk := os.read(reader, 1024):
        reported += len(chunk)
    os.close(reader)
    return reported


def kill_many(folder: Path, num_kills: int, seed: int) -> None:
    """Kill and verify, again and again; prints a report as JSON."""
    torch.set_num_threads(1)  # nothing but this thread, so that forking is safe
    random_delay = random.Random(seed)
    reported = inside = 0
    for _ in range(num_kills):
        reported += fork_and_kill(folder, random_delay.uniform(0, 0.05))
        inside += any(path.name.startswith(".") for path in folder.iterdir())
        store = CheckpointStore(folder, only_most_recent=True)
        newest = store.newest()
        assert newest is not None
        contents = store.load(newest).contents  # this one, and not the one before it
        num_steps = contents.state["num_steps"]
        assert num_steps >= reported, f"{reported} saves were reported, and the newest is {num_steps}"
        assert bool((contents.model["a"] == num_steps).all())
        assert bool((contents.optimizer["exp_avg"] == num_steps).all())
        reported = int(num_steps)  # one may have been saved and not reported yet
    print(json.dumps({"num_kills": num_kills, "kills_inside_a_save": inside, "num_saves": reported}))  # noqa: T201


@pytest.mark.parametrize("num_kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_at_any_point_of_a_save_leaves_a_loadable_newest(tmp_path: Path, num_kills: int) -> None:
    command = [sys.executable, __file__, str(tmp_path / "checkpoints"), str(num_kills), str(random.randrange(1 << 32))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    report = json.loads(done.stdout)
    assert report["num_kills"] == num_kills
    assert report["kills_inside_a_save"] > 0, "no kill hit a save: the test tests nothing"


if __name__ == "__main__":
    kill_many(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
