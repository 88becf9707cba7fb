"""A process that steps environments with random actions, and has no trainer: ``python -m aiorl.bench.stepping``.

consumes       one line of JSON that says what to build, then a line for each stretch of time: its seconds
waits for      the next line
ends when      standard input does, or its parent

Answers with a line of JSON each: ``{}`` when it has built and reset, then the steps and the seconds they took; or the
cause and traceback of what an environment raised. Knows no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

import numpy as np

from aiorl.environments.fields import MAX_TEXT
from aiorl.environments.make import EnvironmentGroup, seed_of
from aiorl.environments.spaces import EnvironmentSpec
from aiorl.environments.worker import end_with_parent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_BLOCK = 64  # ticks whose actions are drawn at once


def build(spec: EnvironmentSpec, sizes: Sequence[int], first_env: int, env_seed: int) -> list[EnvironmentGroup]:
    """Groups of these sizes, each environment seeded as in a run."""
    groups = []
    for size in sizes:
        group = EnvironmentGroup(spec, size, first_env)
        group.reset([seed_of(env_seed, env, 0) for env in range(first_env, first_env + size)])
        groups.append(group)
        first_env += size
    return groups


def random_actions(generator: np.random.Generator, num_actions: int, size: int) -> NDArray[np.int64]:
    """``int64 [ticks, size]``: so many at once that drawing them costs next to nothing."""
    return generator.integers(num_actions, size=(_BLOCK, size))


def step_for(groups: Sequence[EnvironmentGroup], generator: np.random.Generator, duration_s: float) -> dict[str, float]:
    """Steps all groups in turn for about `duration_s` seconds. Returns the environment steps and the seconds."""
    actions = [random_actions(generator, group.info.num_actions, group.num_envs) for group in groups]
    num_envs = sum(group.num_envs for group in groups)
    num_ticks = 0
    started = now = time.perf_counter()
    while now - started < duration_s:
        for group, of_group in zip(groups, actions, strict=True):
            group.step(of_group[num_ticks % _BLOCK])
        num_ticks += 1
        now = time.perf_counter()
    return {"num_steps": num_ticks * num_envs, "seconds": now - started}


def main() -> int:
    """The process."""
    parser = argparse.ArgumentParser(prog="python -m aiorl.bench.stepping", allow_abbrev=False)
    parser.add_argument("--parent", type=int, required=True, help="the process that started this one")
    end_with_parent(parser.parse_args().parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to all; the parent decides
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what environments print is no answer

        def answer(content: dict[str, Any]) -> None:
            answers.write(json.dumps(content) + "\n")
            answers.flush()

        where = "constructor or reset"
        try:
            order = json.loads(sys.stdin.readline())
            sys.path[:] = order["path"]
            spec = EnvironmentSpec(**order["spec"])
            groups = build(spec, order["sizes"], order["first_env"], order["env_seed"])
            generator = np.random.default_rng([order["env_seed"], order["first_env"]])
            answer({})
            where = "step"
            for line in sys.stdin:
                answer(step_for(groups, generator, float(line)))
            for group in groups:
                group.close()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - user code: told to the parent, whatever it is
            cause = traceback.format_exception_only(error)[-1].strip()
            answer({"where": where, "cause": cause[-MAX_TEXT:], "traceback": traceback.format_exc()[-MAX_TEXT:]})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
