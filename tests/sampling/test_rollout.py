"""Rollouts of real environments through a real batcher. The learner is played by the tests."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from aiorl.environments.local import LocalGroup
from aiorl.environments.spaces import EnvironmentSpec
from aiorl.errors import ChannelClosed, EnvironmentRaised, EpisodesTooShort, GroupLost
from aiorl.models.config import MLPConfig
from aiorl.models.mlp import MLP
from aiorl.sampling.batcher import MicroBatcher
from aiorl.sampling.channel import Channel
from aiorl.sampling.config import SamplingConfig
from aiorl.sampling.policy import NumpyActing, Policy
from aiorl.sampling.rollout import Rollout

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from numpy.typing import NDArray

    from aiorl.environments.make import Group, Tick
    from aiorl.environments.spaces import EnvironmentInfo
    from aiorl.sampling.trajectory import SealedEpoch, TrajectoryBatch

pytestmark = pytest.mark.anyio

CARTPOLE = EnvironmentSpec("CartPole-v1")
K = 4
PATIENCE_S = 30.0  # how long a test waits for what ought to happen at once


def vector_of_cartpoles(num_envs: int, mode: str) -> SyncVectorEnv:
    """CartPoles that are truncated after 25 steps, in an autoreset mode of choice."""
    return SyncVectorEnv(
        [lambda: gymnasium.make("CartPole-v1", max_episode_steps=25, disable_env_checker=True)] * num_envs,
        autoreset_mode=AutoresetMode[mode],
    )


class Raising(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A CartPole whose fifth step raises."""

    num_steps = 0

    def step(self, action: Any) -> Any:
        self.num_steps += 1
        if self.num_steps == 5:
            raise ZeroDivisionError("the pole broke")
        return super().step(action)


def groups_of(num_groups: int = 2, *, spec: EnvironmentSpec = CARTPOLE, size: int = K) -> list[LocalGroup]:
    return [LocalGroup(spec, size, size * index, 1, 0) for index in range(num_groups)]


class Gated:
    """A group whose resets and steps wait at gates, open unless a test closes them, and which may be lost.

    Attributes:
        reset_gate: What resets wait for.
        gate: What steps wait for.
        began: A reset or step waits at a gate, or has passed it.
        num_steps: Steps that began.
        lost: Whether what passes its gate finds that the worker is gone.
    """

    def __init__(self, group: LocalGroup) -> None:
        self.num_envs, self.first_env, self.name = group.num_envs, group.first_env, group.name
        self.info = group.info
        self.reset_gate, self.gate = asyncio.Event(), asyncio.Event()
        self.reset_gate.set()
        self.gate.set()
        self.began = asyncio.Event()
        self.num_steps = 0
        self.lost = False
        self._group = group

    async def _pass(self, gate: asyncio.Event) -> None:
        self.began.set()
        await gate.wait()
        if self.lost:
            raise GroupLost("worker 1 is gone", worker=1)

    async def reset(self) -> NDArray[Any]:
        await self._pass(self.reset_gate)
        return await self._group.reset()

    async def step(self, actions: NDArray[Any]) -> Tick:
        self.num_steps += 1
        await self._pass(self.gate)
        return await self._group.step(actions)

    async def held(self) -> None:
        """Closes the gate and returns when a step waits at it."""
        self.gate.clear()
        await self.stepped(self.num_steps + 1)

    async def stepped(self, num_steps: int) -> None:
        """Returns when the step of that number, from 1, has begun."""
        async with asyncio.timeout(PATIENCE_S):
            while self.num_steps < num_steps:
                self.began.clear()
                await self.began.wait()


class Sampling:
    """A rollout and all that it needs, while `sampling` is open."""

    running: asyncio.Task[None]

    def __init__(
        self,
        groups: Sequence[Group],
        info: EnvironmentInfo,
        config: SamplingConfig,
        batcher: MicroBatcher,
        model: MLP,
        policy: Policy,
        **options: Any,
    ) -> None:
        self.channel: Channel[SealedEpoch] = Channel(config.max_policy_lag + 1)
        self.batcher, self.model, self.policy = batcher, model, policy
        self.rollout = Rollout(
            groups, info=info, config=config, batcher=batcher, policy=policy, channel=self.channel, seed=5, **options
        )

    async def sealed(self) -> SealedEpoch:
        async with asyncio.timeout(PATIENCE_S):
            return await self.channel.get()

    async def batch(self) -> TrajectoryBatch:
        """The next epoch's, which still has to be learned."""
        sealed = await self.sealed()
        batch = sealed.gather()
        sealed.release(self.rollout.pool)
        return batch

    def learn(self, epoch: int) -> None:
        """New weights are published."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.999)
        self.policy.publish(epoch, self.policy.snapshot())
        self.rollout.learned(epoch)


@asynccontextmanager
async def sampling(
    groups: Sequence[LocalGroup | Gated],
    *,
    infer: Callable[[Any], Any] | None = None,
    options: dict[str, Any] | None = None,
    **config: Any,
) -> AsyncIterator[Sampling]:
    """Runs a rollout; what it raises is raised here, as an exception group."""
    settings = SamplingConfig.model_validate({"max_wait_time": 0.0, **config})
    torch.manual_seed(0)
    info = groups[0].info
    model = MLP(info, MLPConfig(name="mlp", hidden_sizes=(8,)))
    policy = Policy(NumpyActing(model.policy_layers(), model.activation), optimal=settings.optimal)
    batcher = MicroBatcher(
        infer or policy.act,
        max_batch_size=settings.max_batch_size or sum(group.num_envs for group in groups),
        max_wait_time=None if settings.force_sync else settings.max_wait_time,
    )
    async with batcher:
        found = Sampling(groups, info, settings, batcher, model, policy, **(options or {}))
        async with asyncio.TaskGroup() as tasks:
            found.running = tasks.create_task(found.rollout.run())
            try:
                yield found
            finally:
                found.running.cancel()


def cause_of(error: BaseException) -> BaseException:
    """The one exception in nested groups."""
    while isinstance(error, BaseExceptionGroup):
        [error] = error.exceptions
    return error


def check_physics(batch: TrajectoryBatch) -> None:
    """Whether each row of a CartPole is followed by what its velocities lead to."""

    def follows(before: NDArray[Any], after: NDArray[Any]) -> None:
        np.testing.assert_allclose(before[:, [0, 2]] + 0.02 * before[:, [1, 3]], after[:, [0, 2]], atol=1e-5)

    inside = np.flatnonzero(~batch.ends)
    follows(batch.observations[inside], batch.observations[inside + 1])
    follows(batch.observations[batch.bootstrap_rows], batch.bootstrap_observations)
    follows(batch.observations[batch.final_rows], batch.final_observations)
    ended = batch.terminated | batch.truncated
    assert sorted(batch.final_rows.tolist()) == np.flatnonzero(ended).tolist()
    assert not (batch.terminated & batch.truncated).any()
    assert not batch.terminated[batch.bootstrap_rows].any()
    assert (batch.rewards == 1).all()  # also the last of each episode
    fallen = np.abs(batch.final_observations[:, 0]) > 2.4
    fallen |= np.abs(batch.final_observations[:, 2]) > 12 * 2 * np.pi / 360
    assert fallen.tolist() == batch.terminated[batch.final_rows].tolist()
    assert batch.lengths.sum() == len(batch)


# ---------------------------------------------------------------------- epochs
@pytest.mark.parametrize("lag", [0, 1, 2])
async def test_epochs_hold_what_happened(lag: int) -> None:
    groups = groups_of(3)
    async with sampling(groups, num_epoch_samples=200, max_policy_lag=lag) as found:
        num_transitions, returns = 0, []
        for epoch in range(1, 13):
            sealed = await found.sealed()
            assert sealed.epoch == epoch
            batch = sealed.gather()
            sealed.release(found.rollout.pool)
            assert 200 <= len(batch) < 200 + K
            assert len(batch) == sealed.num_transitions
            assert batch.lengths.max() <= 200 // 12
            check_physics(batch)
            num_transitions += sealed.num_transitions
            returns += sealed.returns
            assert sealed.returns == sealed.lengths
            on_time = batch.versions == max(0, epoch - 1 - lag) if lag == 0 else batch.versions >= epoch - 1 - lag
            assert sealed.num_late or on_time.all()
            if lag == 0:  # nothing is in flight beyond an epoch
                assert found.rollout.ledger.num_outstanding == 0
            found.learn(epoch)
        assert len(returns) > 20
        assert found.rollout.num_groups == 3
        assert found.rollout.num_envs == 12


async def test_at_lag_0_no_step_is_taken_before_the_epoch_is_learned() -> None:
    groups = [Gated(group) for group in groups_of()]
    async with sampling(groups, num_epoch_samples=64) as found:
        await found.batch()
        steps = [group.num_steps for group in groups]
        for _ in range(20):
            await asyncio.sleep(0)
        assert [group.num_steps for group in groups] == steps
        assert found.rollout.ledger.num_outstanding == 0
        assert found.batcher.idle
        found.learn(1)
        await found.batch()
        assert sum(group.num_steps for group in groups) == 2 * 64 / K


async def test_the_noise_counts_real_steps() -> None:
    async with sampling(groups_of(), num_epoch_samples=64) as found:
        total = 0
        for epoch in range(1, 4):
            sealed = await found.sealed()
            sealed.release(found.rollout.pool)
            total += sealed.num_transitions
            assert found.rollout.noise_counts().sum() == total
            found.learn(epoch)


async def test_after_an_earlier_run_epochs_versions_and_noise_go_on() -> None:
    counts = np.arange(2 * K)
    options = {"num_epochs": 7, "noise_counts": counts}
    async with sampling(groups_of(), num_epoch_samples=64, options=options) as found:
        sealed = await found.sealed()
        assert sealed.epoch == 8
        assert (found.rollout.noise_counts() - counts).sum() == sealed.num_transitions
        sealed.release(found.rollout.pool)


async def test_all_groups_are_answered_by_one_batch_where_nothing_else_can_arrive() -> None:
    groups = groups_of(3)
    async with sampling(groups, num_epoch_samples=5 * 3 * K, max_wait_time=None, max_batch_size=100) as found:
        await found.batch()
        before = found.batcher.statistics()
        for epoch in range(1, 5):
            found.learn(epoch)
            await found.batch()
        after = found.batcher.statistics()
        assert after.flushes["producers"] == after.num_batches
        # also the first of each epoch: a group that is granted a step is waited for
        assert after.num_batches - before.num_batches == 4 * 5
        assert after.num_rows - before.num_rows == 4 * 5 * 3 * K


async def test_a_task_may_end_an_epoch_early() -> None:
    asked: list[int] = []

    def is_over(num_rows: int) -> bool:
        asked.append(num_rows)
        return num_rows >= 20

    async with sampling(groups_of(), num_epoch_samples=1000, options={"epoch_is_over": is_over}) as found:
        batch = await found.batch()
        assert 20 <= len(batch) <= 20 + 2 * K
        check_physics(batch)
        assert asked[:4] == [4, 8, 12, 16]
        found.learn(1)
        assert len(await found.batch()) >= 20


async def test_force_sync_twice_is_identical() -> None:
    async def run() -> list[TrajectoryBatch]:
        batches = []
        async with sampling(groups_of(3), num_epoch_samples=150, force_sync=True, min_trajectory_length=3) as found:
            for epoch in range(1, 6):
                batches.append(await found.batch())
                found.learn(epoch)
        return batches

    one, other = await run(), await run()
    assert [len(batch) for batch in one] == [len(batch) for batch in other]
    for batch, twin in zip(one, other, strict=True):
        for name in batch.__slots__:
            if name != "extras":
                assert getattr(batch, name).tobytes() == getattr(twin, name).tobytes(), name
        check_physics(batch)


# ---------------------------------------------------------------------- autoreset
def vectors_of(mode: str) -> list[LocalGroup]:
    return groups_of(
        spec=EnvironmentSpec(
            f"{__name__}:vector_of_cartpoles", kwargs={"mode": mode}, vectorization_mode="vector_entry_point"
        )
    )


async def test_a_back_end_that_resets_in_the_next_step() -> None:
    groups = vectors_of("NEXT_STEP")
    assert groups[0].info.autoreset == "next_step"
    async with sampling(groups, num_epoch_samples=100) as found:
        for epoch in range(1, 11):
            sealed = await found.sealed()
            batch = sealed.gather()
            sealed.release(found.rollout.pool)
            assert 100 <= len(batch) == sealed.num_transitions < 100 + K
            check_physics_of_short(batch)
            found.learn(epoch)


def check_physics_of_short(batch: TrajectoryBatch) -> None:
    """As `check_physics`, and where episodes are truncated after 25 steps."""
    check_physics(batch)
    assert max((length for length in batch.lengths.tolist()), default=0) <= 25


def by_observation(rows: tuple[NDArray[np.float32], NDArray[np.float64]]) -> tuple[NDArray[Any], ...]:
    """Actions that are a function of the observation's bits, and of nothing else."""
    observations, _ = rows
    actions = observations.view(np.uint32).sum(axis=1) % 7 % 2
    return actions.astype(np.int64), np.zeros(len(actions), np.float32), np.zeros(len(actions), np.int64)


async def test_trajectories_are_the_same_in_all_autoreset_modes() -> None:
    async def episodes(mode: str) -> dict[int, list[tuple[Any, ...]]]:
        """The transitions of each environment, in order."""
        rows: dict[int, list[tuple[Any, ...]]] = {env: [] for env in range(2 * K)}
        groups = (
            vectors_of(mode)
            if mode != "plain"
            else groups_of(spec=EnvironmentSpec("CartPole-v1", {"max_episode_steps": 25}))
        )
        async with sampling(groups, num_epoch_samples=300, infer=by_observation) as found:
            for epoch in range(1, 6):
                batch = await found.batch()
                finals = dict(zip(batch.final_rows.tolist(), batch.final_observations.tolist(), strict=True))
                for env, start, length in zip(batch.environments, batch.starts, batch.lengths, strict=True):
                    rows[int(env)] += [
                        (
                            batch.observations[row].tolist(),
                            int(batch.actions[row]),
                            float(batch.rewards[row]),
                            bool(batch.terminated[row]),
                            bool(batch.truncated[row]),
                            finals.get(row),
                        )
                        for row in range(start, start + length)
                    ]
                found.learn(epoch)
        return rows

    found = {mode: await episodes(mode) for mode in ("plain", "SAME_STEP", "NEXT_STEP", "DISABLED")}
    expected = found.pop("plain")
    rows = [row for own in expected.values() for row in own]
    assert sum(row[3] for row in rows) > 10
    assert sum(row[4] for row in rows) > 10
    for mode, other in found.items():
        for env, rows in expected.items():
            common = min(len(rows), len(other[env]))
            assert common > 100
            assert rows[:common] == other[env][:common], mode


# ---------------------------------------------------------------------- episodes with a minimum length
async def test_short_episodes_are_dropped() -> None:
    async with sampling(groups_of(), num_epoch_samples=100, min_trajectory_length=15) as found:
        num_dropped = 0
        for epoch in range(1, 8):
            sealed = await found.sealed()
            batch = sealed.gather()
            sealed.release(found.rollout.pool)
            check_physics(batch)
            assert 100 <= len(batch) - sealed.num_carried < 100 + 15 * K
            num_dropped += sealed.num_dropped
            found.learn(epoch)
        assert num_dropped > 0


async def test_episodes_that_are_always_too_short_end_the_run() -> None:
    # CartPole-v1 is truncated after 500 steps.
    with pytest.raises(ExceptionGroup) as caught:
        async with sampling(groups_of(), num_epoch_samples=501, min_trajectory_length=501) as found:
            await found.sealed()
    error = cause_of(caught.value)
    assert isinstance(error, EpisodesTooShort)
    assert "min_trajectory_length" in str(error)


# ---------------------------------------------------------------------- slow groups
async def test_a_slow_group_does_not_hold_the_others() -> None:
    fast, slow = groups_of(1)[0], Gated(LocalGroup(CARTPOLE, K, K, 1, 0))
    async with sampling([fast, slow], num_epoch_samples=64) as found:
        await found.batch()
        slow.gate.clear()
        found.learn(1)
        await slow.held()
        slowest: list[int] = []
        for epoch in range(2, 6):
            sealed = await found.sealed()
            batch = sealed.gather()
            sealed.release(found.rollout.pool)
            check_physics(batch)
            assert 64 <= len(batch) < 64 + K
            slowest.append(int(np.isin(batch.environments, range(K, 2 * K)).sum()))
            found.learn(epoch)
        assert slowest[1:] == [0, 0, 0]
        slow.gate.set()
        num_late = 0
        epoch = 5
        while not num_late:
            epoch += 1
            sealed = await found.sealed()
            batch = sealed.gather()
            sealed.release(found.rollout.pool)
            check_physics(batch)
            num_late = sealed.num_late
            if num_late:  # a step of epoch 2, with the weights of then
                assert num_late == K
                assert (batch.versions == 1).sum() == K
                late = [
                    int(env)
                    for env, start in zip(batch.environments, batch.starts, strict=True)
                    if batch.versions[start] == 1
                ]
                assert late == list(range(K, 2 * K))  # the first of their trajectories
            found.learn(epoch)
        assert epoch <= 7


async def test_a_group_whose_reset_is_slow_does_not_hold_the_others() -> None:
    fast, slow = groups_of(1)[0], Gated(LocalGroup(CARTPOLE, K, K, 1, 0))
    slow.reset_gate.clear()
    async with sampling([fast, slow], num_epoch_samples=64) as found:
        batch = await found.batch()
        assert set(batch.environments.tolist()) == set(range(K))
        slow.reset_gate.set()
        found.learn(1)
        batch = await found.batch()
        assert set(batch.environments.tolist()) == set(range(2 * K))


# ---------------------------------------------------------------------- pausing, finishing
async def test_a_pause_returns_when_nothing_is_outstanding() -> None:
    groups = [Gated(group) for group in groups_of()]
    async with sampling(groups, num_epoch_samples=10_000) as found:
        await groups[0].held()
        async with asyncio.TaskGroup() as tasks:
            pauses = [tasks.create_task(found.rollout.pause()) for _ in range(2)]
            for _ in range(20):
                await asyncio.sleep(0)
            assert not any(pause.done() for pause in pauses)
            groups[0].gate.set()
        assert found.rollout.ledger.num_outstanding == 0
        assert found.batcher.idle
        steps = [group.num_steps for group in groups]
        for _ in range(20):
            await asyncio.sleep(0)
        assert [group.num_steps for group in groups] == steps
        await found.rollout.pause()  # nothing to wait for
        groups[1].began.clear()
        found.rollout.resume()
        async with asyncio.timeout(PATIENCE_S):
            await groups[1].began.wait()


async def test_resuming_releases_who_waits_for_a_pause() -> None:
    group = Gated(groups_of(1)[0])
    async with sampling([group], num_epoch_samples=10_000) as found:
        await group.held()
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
            tasks.create_task(found.rollout.pause())
            await asyncio.sleep(0)
            found.rollout.resume()
        assert found.rollout.ledger.num_outstanding == 1


async def test_a_cancelled_pause_leaves_it_paused() -> None:
    group = Gated(groups_of(1)[0])
    async with sampling([group], num_epoch_samples=10_000) as found:
        await group.held()
        async with asyncio.TaskGroup() as tasks:
            pause = tasks.create_task(found.rollout.pause())
            await asyncio.sleep(0)
            pause.cancel()
        assert found.rollout.ledger.paused
        group.gate.set()
        await found.rollout.pause()
        assert found.rollout.ledger.num_outstanding == 0
        found.rollout.resume()


@pytest.mark.parametrize("lag", [0, 2])
async def test_finishing_closes_the_channel_after_the_open_epochs(lag: int) -> None:
    groups = [Gated(group) for group in groups_of()]
    async with sampling(groups, num_epoch_samples=64, max_policy_lag=lag) as found:
        await groups[1].held()
        found.rollout.finish()
        groups[1].gate.set()
        num_epochs = found.rollout.ledger.num_opened
        assert 1 <= num_epochs <= lag + 1
        for _ in range(num_epochs):
            check_physics(await found.batch())
        with pytest.raises(ChannelClosed):
            await found.sealed()
        assert found.rollout.ledger.num_opened == num_epochs
        assert found.rollout.unlearned_rows() == 0


async def test_finishing_between_epochs_closes_the_channel_at_once() -> None:
    async with sampling(groups_of(), num_epoch_samples=64) as found:
        await found.batch()
        found.rollout.finish()
        found.learn(1)
        with pytest.raises(ChannelClosed):
            await found.sealed()


async def test_an_epoch_that_nobody_waits_for_any_more_is_given_up() -> None:
    group = Gated(groups_of(1)[0])
    async with sampling([group], num_epoch_samples=64) as found:
        await group.held()
        found.channel.close()  # the time for draining is over
        group.gate.set()
        await group.stepped(64 // K)
        await found.rollout.pause()
        assert found.rollout.ledger.num_opened == 1
        assert not found.rollout.ledger.sampling
        assert found.rollout.pool.num_used <= 1  # the page that the group writes


# ---------------------------------------------------------------------- failures
@pytest.mark.parametrize("force_sync", [False, True], ids=["late", "never late"])
async def test_a_lost_group_leaves_what_it_delivered(force_sync: bool) -> None:
    lasting, lost = groups_of(1)[0], Gated(LocalGroup(CARTPOLE, K, K, 1, 0))
    async with sampling([lasting, lost], num_epoch_samples=1024, force_sync=force_sync) as found:
        await lost.stepped(4)
        lost.lost = True
        batch = await found.batch()
        check_physics(batch)
        assert len(batch) >= 1024
        own = np.isin(batch.environments, range(K, 2 * K))
        assert own.any()
        assert batch.lengths[own].sum() == (lost.num_steps - 1) * K
        assert found.rollout.num_groups == 1
        assert found.rollout.num_envs == K
        found.learn(1)
        assert set((await found.batch()).environments.tolist()) == set(range(K))


async def test_a_group_lost_in_its_reset_is_done_without() -> None:
    lasting, lost = groups_of(1)[0], Gated(LocalGroup(CARTPOLE, K, K, 1, 0))
    lost.lost = True
    async with sampling([lasting, lost], num_epoch_samples=64) as found:
        assert set((await found.batch()).environments.tolist()) == set(range(K))
        assert found.rollout.num_groups == 1


async def test_an_environment_that_raises_ends_the_rollout() -> None:
    spec = EnvironmentSpec("CartPole-v1", wrappers=(f"{__name__}:Raising",))
    with pytest.raises(ExceptionGroup) as caught:
        async with sampling([*groups_of(), LocalGroup(spec, K, 2 * K, 1, 0)], num_epoch_samples=10_000) as found:
            await found.sealed()
    error = cause_of(caught.value)
    assert isinstance(error, EnvironmentRaised)
    assert "the pole broke" in str(error)


async def test_inference_that_fails_ends_the_rollout() -> None:
    def fail(rows: Any) -> Any:
        raise FloatingPointError("not a number")

    with pytest.raises(ExceptionGroup) as caught:
        async with sampling(groups_of(1), infer=fail, num_epoch_samples=10) as found:
            await found.sealed()
    assert isinstance(cause_of(caught.value), FloatingPointError)


@pytest.mark.parametrize("where", ["reset", "step", "inference", "gate"])
async def test_cancelling_leaves_nothing(where: str) -> None:
    groups = [Gated(group) for group in groups_of()]
    inferring, over = asyncio.Event(), asyncio.Event()

    async def infer(rows: Any) -> Any:
        inferring.set()
        await over.wait()
        return rows

    if where == "reset":
        groups[0].reset_gate.clear()
    async with sampling(groups, infer=infer if where == "inference" else None, num_epoch_samples=64) as found:
        found.running.add_done_callback(lambda _: over.set())
        async with asyncio.timeout(PATIENCE_S):
            match where:
                case "reset":
                    await groups[0].began.wait()
                case "step":
                    await groups[0].held()
                case "inference":
                    await inferring.wait()
                case _:
                    await found.batch()
    assert found.running.cancelled()
    assert found.batcher.statistics().num_pending == 0
