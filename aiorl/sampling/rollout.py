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
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NewType

import numpy as np

from aiorl.errors import ChannelClosed, GroupLost
from aiorl.sampling.decisions import Granted, Opened, Sealed
from aiorl.sampling.epoch import EpochLedger
from aiorl.sampling.noise import ActionNoise
from aiorl.sampling.pages import PagePool
from aiorl.sampling.track import GroupTrack
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
    from aiorl.sampling.producer import Producer

logger = logging.getLogger(__name__)

GroupKey = NewType("GroupKey", int)

_TIMER_GRAIN_S = (
    0.001  # uvloop's timers and its loop's clock count whole milliseconds; ticks are measured by another clock
)
_TURNS_TO_READ = 3  # of the loop, after it stood still: to read what has arrived, and to land it


@dataclass(slots=True)
class _Member:
    """A group and what belongs to it."""

    key: GroupKey
    group: Group
    track: GroupTrack
    noise: ActionNoise
    producer: Producer | None = None
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
            next_step=info.autoreset == "next_step",
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
        self._ended = False
        self._window = _Window()
        self._opened_at: dict[int, float] = {}
        self._timer: asyncio.Handle | None = None
        self._quiet = asyncio.Event()  # set where nothing is outstanding, or no pause waits for that any more
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
            ExceptionGroup: Of what groups, inference or the ledger raised: `EpisodesTooShort` where no episode reaches the minimum
                length, `EnvironmentRaised`, ...
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
            self._ended = True
            self._quiet.set()

    async def _drive(self, member: _Member) -> None:
        """Steps one group for as long as grants come.

        Consumes its ticks. Waits for its reset, grants, actions and ticks. Ends when cancelled or when its worker is lost.
        """
        loop = asyncio.get_running_loop()
        ledger, group, track, key = self.ledger, member.group, member.track, member.key
        try:
            with self._batcher.producer() as producer:
                member.producer = producer
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
                    ledger.dispatch(key, time.perf_counter())
                    tick = await group.step(actions)
                    landing = track.land(tick)
                    if landing.returns:
                        self._window.returns += landing.returns
                        self._window.lengths += landing.lengths
                    ledger.land(key, landing.adds, landing.dropped, time.perf_counter())
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
                        self._opened_at[epoch] = time.perf_counter()
                    case Granted(group, _):
                        self._pass_gate(self._members[GroupKey(group)])
                    case Sealed():
                        self._hand_over(decision)
        if self._finishing and not ledger.sampling:
            self._channel.close()
        if not ledger.num_outstanding:
            self._quiet.set()
        if self._timer is None and (deadline := ledger.deadline()) is not None:
            delay_s = max(deadline - time.perf_counter(), _TIMER_GRAIN_S)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._expire, _TURNS_TO_READ)

    def _pass_gate(self, member: _Member) -> None:
        """Lets a driver go on that waited for its grant; from now on batches wait for its rows."""
        assert member.gate is not None
        assert member.producer is not None
        if not member.gate.done():
            member.gate.set_result(None)
            member.producer.expect()

    def _expire(self, turns: int) -> None:
        """The lateness timer: marks what is late and arms itself anew.

        It lets the loop turn first: where that stood still, no step is late whose answer has arrived meanwhile.
        """
        if turns:
            self._timer = asyncio.get_running_loop().call_soon(self._expire, turns - 1)
            return
        self._timer = None
        try:
            self.ledger.expire(time.perf_counter())
            self._carry_out()
        except Exception as error:  # noqa: BLE001 - handed to whoever awaits `run`
            if self._failure is not None and not self._failure.done():
                self._failure.set_exception(error)

    def _hand_over(self, sealed: Sealed) -> None:
        """Cuts every group's trajectories at the seal and gives the epoch to the learner, or up where nobody learns any more."""
        window, self._window = self._window, _Window()
        segments = [
            self._members[GroupKey(key)].track.seal(boundary) for key, boundary in sealed.boundaries.items() if boundary
        ]
        epoch = SealedEpoch(
            sealed.epoch,
            segments,
            window.returns,
            window.lengths,
            sealed.num_rows,
            sealed.num_dropped,
            sealed.num_late,
            sum(segment.num_ticks for segment in segments),
            time.perf_counter() - self._opened_at.pop(sealed.epoch),
        )
        try:
            self._channel.put_nowait(epoch)
        except ChannelClosed:
            epoch.release(self.pool)

    # ------------------------------------------------------------------ for the trainer
    def learned(self, epoch: int) -> None:
        """The weights after `epoch` are published."""
        self.ledger.learned(epoch)
        self._carry_out()

    async def pause(self) -> None:
        """Holds grants back and returns when nothing but late steps is outstanding, or when resumed before. Cancelling leaves it paused."""
        self.ledger.pause()
        while self.ledger.paused and self.ledger.num_outstanding and not self._ended:
            self._quiet.clear()
            await self._quiet.wait()

    def resume(self) -> None:
        """Grants again."""
        self.ledger.resume()
        self._quiet.set()
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

    def unlearned_rows(self) -> int:
        """Kept rows that nobody has taken to learn from: of epochs that are not sealed, and of those in the channel."""
        return self.ledger.unsealed_rows + sum(epoch.num_rows for epoch in self._channel.items())
