"""What each part could do if nothing else were in its way: environments, link, inference and learner.

Every ceiling is a context with a `measure`: environment steps per second in a stretch of about so many seconds. Between
two stretches it does nothing, so that all of them can be open at once and take turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from aiorl.bench.stepping import random_actions
from aiorl.compute.threads import in_thread
from aiorl.environments.process import child_environment
from aiorl.environments.supervisor import group_sizes
from aiorl.errors import EnvironmentRaised, WorkerDied
from aiorl.learning.learner import Learner
from aiorl.tasks.base import Hooks, State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from numpy.typing import NDArray

    from aiorl.compute.device import Placement, TorchSettings
    from aiorl.environments.config import EnvironmentConfig
    from aiorl.environments.make import Group
    from aiorl.environments.spaces import EnvironmentSpec
    from aiorl.environments.supervisor import Workers
    from aiorl.learning.config import ReinforcementLearningTrainerConfig
    from aiorl.preparation import Prepared
    from aiorl.sampling.pages import PagePool
    from aiorl.sampling.policy import Policy
    from aiorl.sampling.trajectory import SealedEpoch

_YIELD_S: Final = 0.005
_END_S: Final = 2.0
_MAX_ANSWER_BYTES: Final = 2**20


class Ceiling(Protocol):
    """Something whose speed is measured."""

    async def measure(self, duration_s: float) -> float:
        """Environment steps per second, over about `duration_s` seconds and one unit of its work at least."""


# ---------------------------------------------------------------------- environments and link
class SteppedWorkers:
    """Groups that are stepped with random actions, and no trainer.

    In process these are the environments themselves; with workers of costless environments, what is left is the link.

    Args:
        workers: The groups.
    """

    def __init__(self, workers: Workers) -> None:
        generator = np.random.default_rng(0)
        actions = workers.info.num_actions
        self._groups = [(group, random_actions(generator, actions, group.num_envs)) for group in workers.groups]

    async def reset(self) -> None:
        """Starts an episode everywhere."""
        async with asyncio.TaskGroup() as tasks:
            for group, _ in self._groups:
                tasks.create_task(group.reset(), name=f"reset {group.name}")

    async def measure(self, duration_s: float) -> float:
        """See `Ceiling.measure`."""
        started = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            stepping = [
                tasks.create_task(_step_for(group, actions, started + duration_s), name=f"step {group.name}")
                for group, actions in self._groups
            ]
        return sum(task.result() for task in stepping) / (time.perf_counter() - started)


async def _step_for(group: Group, actions: NDArray[np.int64], deadline: float) -> int:
    """Steps a group until `deadline`; where that never waits, it lets the loop turn now and then. Returns the steps."""
    num_ticks = 0
    yielded = now = time.perf_counter()
    while now < deadline:
        await group.step(actions[num_ticks % len(actions)])
        num_ticks += 1
        now = time.perf_counter()
        if now - yielded > _YIELD_S:
            yielded = now
            await asyncio.sleep(0)
    return num_ticks * group.num_envs


class SteppedProcesses:
    """The environments of each worker in a process of its own, stepped with random actions; see `aiorl.bench.stepping`."""

    def __init__(self, processes: list[asyncio.subprocess.Process]) -> None:
        self._processes = processes

    async def measure(self, duration_s: float) -> float:
        """See `Ceiling.measure`."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{duration_s}\n".encode())
        answers = [await _answer(number, process) for number, process in enumerate(self._processes)]
        return sum(answer["num_steps"] / answer["seconds"] for answer in answers)


@contextlib.asynccontextmanager
async def stepped_processes(
    spec: EnvironmentSpec, environment: EnvironmentConfig, *, env_seed: int
) -> AsyncIterator[SteppedProcesses]:
    """Starts as many processes as there are workers, with the same groups; ends them at the end.

    Raises:
        EnvironmentRaised: A constructor or a reset raised.
        WorkerDied: A process ended.
    """
    num_workers, envs_per_worker = environment.numbers()
    command = [sys.executable, "-P", "-m", "aiorl.bench.stepping", "--parent", str(os.getpid())]
    pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    processes: list[asyncio.subprocess.Process] = []
    try:
        for worker in range(num_workers):
            process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, stderr=nothing, env=child_environment(), limit=_MAX_ANSWER_BYTES
            )
            processes.append(process)
            order = {
                "path": sys.path,
                "spec": dataclasses.asdict(spec),
                "sizes": group_sizes(environment, force_sync=False),
                "first_env": worker * envs_per_worker,
                "env_seed": env_seed,
            }
            assert process.stdin is not None
            process.stdin.write(json.dumps(order).encode() + b"\n")
        for number, process in enumerate(processes):
            await _answer(number, process)
        yield SteppedProcesses(processes)
    finally:
        await _end(processes)


async def _answer(number: int, process: asyncio.subprocess.Process) -> dict[str, float]:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        status = await process.wait()
        raise WorkerDied(
            worker=number, returncode=status, how=f"its process ended with status {status}", stderr_tail=""
        )
    answer: dict[str, Any] = json.loads(line)
    if "cause" in answer:
        raise EnvironmentRaised(
            worker=number,
            where=answer["where"],
            cause=answer["cause"],
            traceback_text=answer["traceback"],
            stderr_tail="",
        )
    return answer


async def _end(processes: list[asyncio.subprocess.Process]) -> None:
    """Closes their standard input, which ends them, and kills what is still there after two seconds."""
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()
    try:
        async with asyncio.timeout(_END_S):
            for process in processes:
                await process.wait()
    except TimeoutError:
        pass
    finally:  # also where closing is cancelled
        for process in processes:
            if process.returncode is None:
                process.kill()
    for process in processes:
        await process.wait()


# ---------------------------------------------------------------------- inference and learner
class InferenceAlone:
    """The policy, acting on batches of one size, one after the other.

    Args:
        policy: Acts; a sampling that is paused may use it in turn.
        observations: ``[B, *shape]``, rows that the environments gave.
        settings: Torch's.
    """

    def __init__(self, policy: Policy, observations: NDArray[Any], settings: TorchSettings) -> None:
        self._policy = policy
        self._rows = observations, np.random.default_rng(0).random(len(observations))
        self._settings = settings

    async def measure(self, duration_s: float) -> float:
        """See `Ceiling.measure`."""
        return await in_thread(self._act_for, duration_s)

    def _act_for(self, duration_s: float) -> float:
        num_batches = 0
        started = now = time.perf_counter()
        with self._settings.applied():
            while now - started < duration_s:
                self._policy.act(self._rows)
                num_batches += 1
                now = time.perf_counter()
        return num_batches * len(self._rows[0]) / (now - started)


class LearnerAlone:
    """The learner, over and over on one sampled epoch, each time from the same weights.

    Args:
        prepared: Model (which is copied), task, optimizer and schedule.
        config: ``[trainer]``.
        epoch: A sampled epoch and the pool of its pages.
        max_overshoot: As for `Learner`.
        placement: Where it computes.
        device: Where the model is.
    """

    def __init__(
        self,
        prepared: Prepared,
        config: ReinforcementLearningTrainerConfig,
        epoch: tuple[SealedEpoch, PagePool],
        *,
        max_overshoot: int,
        placement: Placement,
        device: Any,
    ) -> None:
        self._epoch = epoch
        model = copy.deepcopy(prepared.model)
        self._weights = copy.deepcopy(model.state_dict())
        optimizer = prepared.optimizer(model.parameters())
        self._learner = Learner(
            model=model,
            task=prepared.task,
            optimizer=optimizer,
            scheduler=prepared.lr_scheduler(optimizer),
            config=config,
            state=State(),
            hooks=Hooks(prepared.task, ()),
            placement=placement,
            device=device,
            max_overshoot=max_overshoot,
            quiet=lambda: True,
        )

    async def measure(self, duration_s: float) -> float:
        """See `Ceiling.measure`."""
        num_rows, learning_s = 0, 0.0
        while learning_s < duration_s:
            sealed, pool = copy.deepcopy(self._epoch)
            self._learner.model.load_state_dict(self._weights)
            started = time.perf_counter()
            update = await self._learner.learn(sealed, pool)
            learning_s += time.perf_counter() - started
            num_rows += update.num_rows
        return num_rows / learning_s
