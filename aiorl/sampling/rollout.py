"""Observation → action → page: a coroutine per group, driven by the ledger's grants.

    group ──observations──► batcher ──actions──► page ──actions──► group ──tick──► page ──► ledger
                                                                                             │ Sealed
                                                                                             ▼
                                                                                          channel

| loop                | consumes                | waits for                                   | ends when                       |
|---------------------|-------------------------|---------------------------------------------|---------------------------------|
| a group's driver    | the group's ticks       | its reset, a grant, its actions, its tick   | cancelled; its worker is lost   |
| the lateness timer  | the ledger's deadline   | the clock                                   | closed                          |

When the channel is full no epoch can be sealed: the ledger opens none that the channel has no room for.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NewType

import numpy as np

from aiorl.errors import GroupLost
from aiorl.sampling.epoch import EpochLedger, Granted, Opened, Sealed
from aiorl.sampling.noise import ActionNoise
from aiorl.sampling.pages import GroupTrack, PagePool
from aiorl.sampling.trajectory import SealedEpoch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from aiorl.environments.make import Group
    from aiorl.environments.spaces import EnvironmentInfo
    from aiorl.sampling.batcher import MicroBatcher
    from aiorl.sampling.channel import Channel
    from aiorl.sampling.config import SamplingConfig
    from aiorl.sampling.policy import Policy

logger = logging.getLogger(__name__)

GroupKey = NewType("GroupKey", int)


@dataclass(slots=True)
class _Member:
    """A group and what belongs to it."""

    key: GroupKey
    group: Group
    track: GroupTrack
    noise: ActionNoise
    gate: asyncio.Future[None] | None = None
    lost: bool = False


@dataclass(slots=True)
class _Window:
    """What happened since the last seal."""

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


class Rollout:
    """Drives groups through the batcher and hands sealed epochs to the learner.

    Args:
        groups: The environments.
        info: What they observe and take.
        config: ``[trainer.sampling]``.
        batcher: Chooses actions; its inference is `Policy.act`.
        policy: The versions of the weights.
        channel: Where sealed epochs go; room for ``max_policy_lag + 1``.
        seed: Of the action noise.
        num_epochs: Epochs that an earlier run learned.
        noise_counts: Real steps of each environment in that run, by global index; None: none.
        epoch_is_over: Asked after each landing with the rows that landed in unsealed epochs: whether to seal now. None: never.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        info: EnvironmentInfo,
        config: SamplingConfig,
        batcher: MicroBatcher,
        policy: Policy,
        channel: Channel[SealedEpoch],
        seed: int,
        num_epochs: int = 0,
        noise_counts: NDArray[np.int64] | None = None,
        epoch_is_over: Callable[[int], bool] | None = None,
    ) -> None:
        sizes = [group.num_envs for group in groups]
        young = config.min_trajectory_length > 1
        capacity = PagePool.capacity_for(
            group_sizes=sizes,
            num_epoch_samples=config.num_epoch_samples,
            min_trajectory_length=config.min_trajectory_length,
            max_policy_lag=config.max_policy_lag,
        )
        self.pool = PagePool(capacity, info.observation, with_keep=young)
        self.ledger = EpochLedger(
            config.num_epoch_samples,
            max_policy_lag=config.max_policy_lag,
            late_ticks=None if config.force_sync else 4.0,
        )
        self.ledger.resume_at(num_epochs)
        self._batcher = batcher
        self._policy = policy
        self._channel = channel
        self._epoch_is_over = epoch_is_over
        self._finishing = False
        self._window = _Window()
        self._opened_at: dict[int, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._idle: asyncio.Future[None] | None = None
        self._failure: asyncio.Future[None] | None = None
        self._members: dict[GroupKey, _Member] = {}
        limit = config.trajectory_limit(sum(sizes))
        for key, group in enumerate(groups):
            rows = slice(group.first_env, group.first_env + group.num_envs)
            self._members[GroupKey(key)] = _Member(
                GroupKey(key),
                group,
                GroupTrack(
                    self.pool,
                    num_envs=group.num_envs,
                    first_env=group.first_env,
                    min_trajectory_length=config.min_trajectory_length,
                    max_trajectory_length=limit,
                    next_step=info.autoreset == "next_step",
                ),
                ActionNoise(
                    seed, group.first_env, group.num_envs, None if noise_counts is None else noise_counts[rows]
                ),
            )

    # ------------------------------------------------------------------ running
    async def run(self) -> None:
        """Drives every group until cancelled.

        Raises:
            EpisodesTooShort: No episode reaches the minimum length.
        """
        loop = asyncio.get_running_loop()
        self._failure = loop.create_future()
        for key in self._members:
            self.ledger.join(key)
        try:
            async with asyncio.TaskGroup() as tasks:
                drivers = [
                    tasks.create_task(self._drive(member), name=f"rollout {member.group.name}")
                    for member in self._members.values()
                ]
                try:
                    await self._failure  # a failure of the timer's; drivers fail by themselves
                finally:
                    for driver in drivers:
                        driver.cancel()
        finally:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    async def _drive(self, member: _Member) -> None:
        """Steps one group for as long as grants come.

        Consumes its ticks. Waits for its reset, grants, actions and ticks. Ends when cancelled or when its worker is lost.
        """
        loop = asyncio.get_running_loop()
        ledger, group, track, key = self.ledger, member.group, member.track, member.key
        try:
            with self._batcher.producer() as producer:
                producer.expect()
                observations = await group.reset()
                track.begin(observations)
                while True:
                    track.reserve()
                    if ledger.request(key, track.adds()) is None:
                        member.gate = loop.create_future()
                        self._carry_out()
                        if not member.gate.done():
                            producer.park()
                            await member.gate
                    elif ledger.decisions:
                        self._carry_out()
                    noise = member.noise.draw(track.masked)
                    answer: Any = await producer.submit((observations, noise))
                    actions, log_probs, versions = answer
                    track.write(actions, log_probs, versions)
                    ledger.dispatch(key, loop.time())
                    tick = await group.step(actions)
                    landing = track.land(tick)
                    if landing.returns:
                        self._window.returns += landing.returns
                        self._window.lengths += landing.lengths
                    ledger.land(key, landing.adds, landing.dropped, loop.time())
                    if self._epoch_is_over is not None and self._epoch_is_over(ledger.unsealed_rows):
                        ledger.complete()
                    self._carry_out()
                    observations = tick.observations
        except GroupLost:
            self._lose(member)

    def _lose(self, member: _Member) -> None:
        """A worker is gone: what its group delivered stays and is cut; nothing more is waited for."""
        member.lost = True
        self.ledger.leave(member.key)
        self._carry_out()

    # ------------------------------------------------------------------ decisions
    def _carry_out(self) -> None:
        """Carries out what the ledger decided, in order, and arms the lateness timer."""
        ledger = self.ledger
        while ledger.decisions:
            decisions, ledger.decisions = ledger.decisions, []
            for decision in decisions:
                match decision:
                    case Opened(epoch):
                        self._policy.activate()
                        self._opened_at[epoch] = asyncio.get_running_loop().time()
                    case Granted(group, _):
                        gate = self._members[GroupKey(group)].gate
                        if gate is not None and not gate.done():
                            gate.set_result(None)
                    case Sealed():
                        self._hand_over(decision)
        if self._finishing and not ledger.sampling:
            self._channel.close()
        if self._idle is not None and not ledger.num_outstanding and not self._idle.done():
            self._idle.set_result(None)
        if self._timer is None and (deadline := ledger.deadline()) is not None:
            self._timer = asyncio.get_running_loop().call_at(deadline, self._expire)

    def _expire(self) -> None:
        """The lateness timer: marks what is late and arms itself anew."""
        self._timer = None
        try:
            self.ledger.expire(asyncio.get_running_loop().time())
            self._carry_out()
        except Exception as error:  # noqa: BLE001 - handed to whoever awaits `run`
            if self._failure is not None and not self._failure.done():
                self._failure.set_exception(error)

    def _hand_over(self, sealed: Sealed) -> None:
        """Cuts every group's trajectories at the seal and gives the epoch to the learner."""
        loop = asyncio.get_running_loop()
        window, self._window = self._window, _Window()
        segments = [
            self._members[GroupKey(key)].track.seal(boundary) for key, boundary in sealed.boundaries.items() if boundary
        ]
        self._channel.put_nowait(
            SealedEpoch(
                sealed.epoch,
                segments,
                window.returns,
                window.lengths,
                sealed.num_dropped,
                sealed.num_late,
                sum(segment.num_ticks for segment in segments),
                loop.time() - self._opened_at.pop(sealed.epoch),
            )
        )

    # ------------------------------------------------------------------ for the trainer
    def learned(self, epoch: int) -> None:
        """The weights after `epoch` are published."""
        self.ledger.learned(epoch)
        self._carry_out()

    async def pause(self) -> None:
        """Holds grants back and returns when nothing is outstanding. Cancelling leaves it paused."""
        self.ledger.pause()
        if self.ledger.num_outstanding:
            self._idle = asyncio.get_running_loop().create_future()
            try:
                await self._idle
            finally:
                self._idle = None

    def resume(self) -> None:
        """Grants again."""
        self.ledger.resume()
        self._carry_out()

    def finish(self) -> None:
        """Opens no further epoch; the channel is closed when the open ones are sealed."""
        self._finishing = True
        self.ledger.finish()
        self._carry_out()

    @property
    def num_groups(self) -> int:
        """Groups that sample."""
        return sum(not member.lost for member in self._members.values())

    @property
    def num_envs(self) -> int:
        """Environments that sample."""
        return sum(member.group.num_envs for member in self._members.values() if not member.lost)

    def noise_counts(self) -> NDArray[np.int64]:
        """Real steps of every environment, ``int64`` by global index: what the action noise goes on from."""
        ordered = sorted(self._members.values(), key=lambda member: member.group.first_env)
        return np.concatenate([member.noise.counts for member in ordered])

    def unsealed_rows(self) -> int:
        """Rows that landed in epochs which are not sealed."""
        return self.ledger.unsealed_rows
