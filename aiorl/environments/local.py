"""Environments in the trainer's own process: stepped on its loop, in a fixed order, or awaited where they are awaitable.

They are made in a thread, since imports and constructors take their time; afterwards only the loop touches them.
Constructors of awaitable environments therefore find no running loop: what needs one is made in ``reset``. Dimensions: K
environments of a group.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import traceback
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from aiorl.environments.make import (
    EnvironmentGroup,
    Tick,
    close_anyhow,
    close_environment,
    make_environment,
    resolve,
    seed_of,
)
from aiorl.environments.rows import check_observation, stack_rewards
from aiorl.environments.spaces import describe, first_action
from aiorl.environments.specimen import look_at_one
from aiorl.errors import EnvironmentRaised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from aiorl.environments.make import Group
    from aiorl.environments.spaces import EnvironmentInfo, EnvironmentSpec

logger = logging.getLogger(__name__)

T = TypeVar("T")


def _is_its_own(error: BaseException) -> bool:
    """Whether it is the environment that raised this, rather than somebody who cancels or closes what awaits it.

    Libraries leak ``CancelledError``; a real one is counted by the task. Ctrl-C comes to a loop that has no handler of
    its own as a cancellation first, then as ``KeyboardInterrupt``.
    """
    if isinstance(error, GeneratorExit):
        return False
    if isinstance(error, Exception | SystemExit):
        return True
    try:
        task = asyncio.current_task()
    except RuntimeError:  # a thread in which environments are made
        return True
    return task is None or not task.cancelling()


@contextmanager
def reported(worker: int, where: str) -> Iterator[None]:
    """Turns whatever an environment raises into ``EnvironmentRaised``; what is done to its caller passes."""
    try:
        yield
    except BaseException as error:
        if not _is_its_own(error):
            raise
        raise EnvironmentRaised(
            worker=worker,
            where=where,
            cause=traceback.format_exception_only(error)[-1].strip(),
            traceback_text="".join(traceback.format_exception(error)),
        ) from error


class LocalGroup:
    """K environments stepped on the loop, which stands still meanwhile; satisfies ``Group``.

    Attributes:
        num_envs: K.
        first_env: Global index of the environment in row 0.
        name: For messages.
    """

    def __init__(
        self, spec: EnvironmentSpec, num_envs: int, first_env: int, env_seed: int, incarnation: int, worker: int = 0
    ) -> None:
        self.num_envs = num_envs
        self.first_env = first_env
        self.name = f"local worker {worker}"
        self._worker = worker
        self._seeds: list[int] | None = [seed_of(env_seed, first_env + row, incarnation) for row in range(num_envs)]
        with reported(worker, "constructor"):
            self._group = EnvironmentGroup(spec, num_envs, first_env)
        self.info = self._group.info

    async def reset(self) -> NDArray[Any]:
        """Starts an episode in every environment."""
        with reported(self._worker, "reset"):
            observations = self._group.reset(self._seeds)
        self._seeds = None
        return observations

    async def step(self, actions: NDArray[Any]) -> Tick:
        """Steps every environment once."""
        try:
            return self._group.step(actions)
        except BaseException:  # SystemExit and KeyboardInterrupt are the environment's here; `reported` sorts them
            with reported(self._worker, "step"):
                raise

    def close(self) -> None:
        """Closes the environments; raises what they raise."""
        self._group.close()


class AwaitableGroup:
    """One environment whose ``reset`` and ``step`` are coroutines; satisfies ``Group``.

    A cancelled call is cancelled in the environment too. An ended episode is reset within the step that ended it.

    Attributes:
        num_envs: 1.
        first_env: Its global index.
        name: For messages.
    """

    def __init__(self, environment: Any, first_env: int, env_seed: int, incarnation: int, worker: int = 0) -> None:
        self.num_envs = 1
        self.first_env = first_env
        self.name = f"local environment {first_env}"
        self.environment = environment
        with reported(worker, "constructor"):
            self.info = describe(environment)
        self._worker = worker
        self._seed: int | None = seed_of(env_seed, first_env, incarnation)
        self._first_action = first_action(environment)
        self._has_row = False

    async def reset(self) -> NDArray[Any]:
        """Starts an episode."""
        self._has_row = False
        with reported(self._worker, "reset"):
            observation, _ = await self.environment.reset(seed=self._seed)
            rows = self._row(observation)
        self._seed = None
        self._has_row = True
        return rows

    async def step(self, actions: NDArray[Any]) -> Tick:
        """Steps the environment once."""
        if not self._has_row:
            raise RuntimeError(f"{self.name} has no observation to act on: reset it first")
        self._has_row = False
        with reported(self._worker, "step"):
            action = int(actions[0]) + self._first_action
            observation, reward, terminated, truncated, _ = await self.environment.step(action)
            rows = self._row(observation)
            finals = rows[:0]
            if terminated or truncated:
                finals = rows
                observation, _ = await self.environment.reset()
                rows = self._row(observation)
            rewards = stack_rewards([reward], self.first_env)
        self._has_row = True
        return Tick(
            observations=rows,
            rewards=rewards,
            terminated=np.array([terminated], np.bool_),
            truncated=np.array([truncated and not terminated], np.bool_),
            final_observations=finals,
        )

    def _row(self, observation: Any) -> NDArray[Any]:
        """An observation as a new array ``[1, *shape]``."""
        check_observation(observation, self.info.observation.shape, self.first_env)
        return np.array([observation], self.info.observation.dtype)

    async def close(self) -> None:
        """Closes the environment, whose ``close`` may be a coroutine or not; raises what it raises."""
        if inspect.iscoroutinefunction(self.environment.close):
            await self.environment.close()
        else:
            self.environment.close()


class LocalWorkers:
    """All environments of a run in the trainer's own process.

    An environment that raises raises ``EnvironmentRaised`` where it is reset or stepped, so that ``watch`` has nothing to
    tell.

    Attributes:
        info: What the environments look like.
        groups: Theirs, in the order of their first environments.
        num_envs: Of all groups.
        num_workers: Into how many parts they are divided, as workers would divide them; awaitable ones into one each.
        on_loop: Whether a step is the loop's own work: not where environments are awaitable.
    """

    def __init__(
        self, groups: Sequence[LocalGroup | AwaitableGroup], num_workers: int, env_cleanup_time: float
    ) -> None:
        self._own = tuple(groups)
        self._env_cleanup_time = env_cleanup_time
        self.info: EnvironmentInfo = groups[0].info
        self.groups: list[Group] = list(groups)
        self.num_envs = sum(group.num_envs for group in groups)
        self.num_workers = len(groups) if self.info.is_awaitable else num_workers
        self.on_loop = not self.info.is_awaitable

    async def watch(self) -> None:
        """Waits until it is cancelled."""
        await asyncio.get_running_loop().create_future()

    def statistics(self) -> dict[str, float]:
        """No worker is alive, and no message crosses a link."""
        return {}

    def link_idle(self) -> bool:
        """There is no link on which something could wait."""
        return True

    def hurry(self) -> None:
        """Closing waits for no awaitable environment from now on."""
        self._env_cleanup_time = 0.0

    async def aclose(self) -> None:
        """Closes every environment; those that are awaitable are given ``env_cleanup_time`` seconds together."""
        try:
            async with asyncio.timeout(self._env_cleanup_time):
                for group in self._own:
                    try:
                        if isinstance(group, AwaitableGroup):
                            await group.close()
                        else:
                            group.close()
                    except BaseException as error:
                        if not _is_its_own(error):
                            raise
                        logger.warning("%s raised in close", group.name, exc_info=True)
        except TimeoutError:
            logger.warning(
                "environments were still closing after %g s and are left to themselves", self._env_cleanup_time
            )


async def open_local(
    spec: EnvironmentSpec, sizes: Sequence[Sequence[int]], *, env_seed: int, incarnation: int, env_cleanup_time: float
) -> LocalWorkers:
    """Makes the environments of every worker in this process.

    Args:
        spec: Of every environment.
        sizes: For each worker, K of each of its groups; awaitable environments make a group each instead.
        env_seed: Of the run.
        incarnation: Of the workers.
        env_cleanup_time: Seconds that closing may take.

    Raises:
        EnvironmentRaised: A constructor raised.
    """

    def build() -> list[LocalGroup | AwaitableGroup]:
        groups: list[LocalGroup | AwaitableGroup] = []
        is_awaitable = False
        first_env = 0
        try:
            for worker, group_sizes in enumerate(sizes):
                if first_env == 0:
                    is_awaitable = _is_awaitable(spec, worker, env_cleanup_time)
                for num_envs in [1] * sum(group_sizes) if is_awaitable else group_sizes:
                    if is_awaitable:
                        with reported(worker, "constructor"):
                            environment = make_environment(spec, resolve(spec))
                        groups.append(AwaitableGroup(environment, first_env, env_seed, incarnation, worker))
                    else:
                        groups.append(LocalGroup(spec, num_envs, first_env, env_seed, incarnation, worker))
                    first_env += num_envs
        except BaseException:  # whatever ends the building, what was built is closed; raised again
            _close_in_thread(groups)
            raise
        return groups

    groups = await in_daemon_thread(build, _close_in_thread, env_cleanup_time)
    return LocalWorkers(groups, len(sizes), env_cleanup_time)


def _is_awaitable(spec: EnvironmentSpec, worker: int, env_cleanup_time: float) -> bool:
    """Whether a specification's environments are awaitable, which only one of them can tell."""
    if spec.is_vector:
        return False
    with reported(worker, "constructor"):
        return look_at_one(
            lambda: make_environment(spec, resolve(spec)),
            lambda environment: inspect.iscoroutinefunction(environment.step),
            name=spec.id,
            env_cleanup_time=env_cleanup_time,
        )


def _close_in_thread(groups: Sequence[LocalGroup | AwaitableGroup]) -> None:
    for group in groups:
        close = partial(close_environment, group.environment) if isinstance(group, AwaitableGroup) else group.close
        close_anyhow(close, group.name)


async def in_daemon_thread(function: Callable[[], T], undo: Callable[[T], None], patience_s: float) -> T:
    """Runs a function in a thread of its own.

    A cancelled call waits ``patience_s`` for the thread to end, and whatever the function returns is undone.
    """
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            outcome.set_exception(error)

    def undo_result(outcome: Future[T]) -> None:
        if outcome.exception() is None:
            undo(outcome.result())

    threading.Thread(target=run, name="aiorl environments", daemon=True).start()
    waiting = asyncio.wrap_future(outcome)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        outcome.add_done_callback(undo_result)
        with suppress(Exception):
            async with asyncio.timeout(patience_s):
                await asyncio.shield(waiting)
        raise
