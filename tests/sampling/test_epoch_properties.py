"""The ledger and the tracks of groups, driven together by a simulated world in virtual time.

Every transition is named by its observation, (environment, episode, step), and the world's episodes are a function of that name. So a
learned batch shows by itself whether anything was lost, repeated, torn apart or put next to what does not follow it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorl.environments.make import Tick
from aiorl.environments.spaces import ArraySpec
from aiorl.errors import EpisodesTooShort
from aiorl.sampling.decisions import Granted, Opened, Sealed
from aiorl.sampling.epoch import EpochLedger
from aiorl.sampling.pages import PagePool
from aiorl.sampling.track import GroupTrack
from aiorl.sampling.trajectory import SealedEpoch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from aiorl.sampling.trajectory import TrajectoryBatch

    Name = tuple[int, int, int]  # environment, episode, step

LATE_TICKS = 4.0
NUM_EVENTS = 6_000


@dataclass(frozen=True)
class Scenario:
    """What a world is like."""

    seed: int
    group_sizes: list[int]
    num_epoch_samples: int
    max_policy_lag: int
    min_trajectory_length: int
    max_trajectory_length: int
    mean_episode: int
    next_step: bool
    page_ticks: int
    stalls: float  # share of steps that take 20 times as long
    num_deaths: int
    num_pauses: int
    num_completes: int
    learn_s: float
    num_epochs: int


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    num_epoch_samples = draw(st.integers(1, 40))
    minimum = draw(st.integers(1, min(7, num_epoch_samples)))
    return Scenario(
        seed=draw(st.integers(0, 2**32 - 1)),
        group_sizes=draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)),
        num_epoch_samples=num_epoch_samples,
        max_policy_lag=draw(st.integers(0, 3)),
        min_trajectory_length=draw(st.sampled_from([1, minimum])),
        max_trajectory_length=minimum + draw(st.integers(0, 12)),
        mean_episode=draw(st.integers(1, 15)),
        next_step=draw(st.booleans()),
        page_ticks=draw(st.integers(1, 6)),
        stalls=draw(st.sampled_from([0.0, 0.02, 0.3])),
        num_deaths=draw(st.integers(0, 3)),
        num_pauses=draw(st.integers(0, 3)),
        num_completes=draw(st.integers(0, 3)),
        learn_s=draw(st.sampled_from([0.0, 1.0, 30.0])),
        num_epochs=draw(st.integers(1, 12)),
    )


class Episodes:
    """The episodes of every environment: a function of their names."""

    def __init__(self, seed: int, mean: int) -> None:
        self._seed, self._mean = seed, mean
        self._known: dict[tuple[int, int], tuple[int, bool]] = {}

    def of(self, env: int, episode: int) -> tuple[int, bool]:
        """Its length, and whether it is truncated instead of terminated."""
        if (env, episode) not in self._known:
            rng = np.random.default_rng([self._seed, env, episode])
            self._known[env, episode] = int(rng.geometric(1 / self._mean)), bool(rng.random() < 0.3)
        return self._known[env, episode]

    def ends_at(self, name: Name) -> str | None:
        """How the transition from this observation ends its episode."""
        length, truncated = self.of(*name[:2])
        return None if name[2] + 1 < length else "truncated" if truncated else "terminated"


def reward_of(name: Name) -> float:
    return float((name[0] * 7919 + name[1] * 104729 + name[2] * 31) % 9973)


@dataclass
class Step:
    """A granted step, as the world saw it."""

    epoch: int
    promised: int
    version: int
    dispatched_at: float | None = None
    may_be_late: bool = False
    adds: int = 0


@dataclass
class Party:
    """A group of the world."""

    key: int
    first_env: int
    track: GroupTrack
    names: list[Name]  # the latest observation of each environment
    resets: list[bool]  # whether its next step is an autoreset's empty one
    alive: bool = True
    steps: list[Step] = field(default_factory=list)
    outstanding: Step | None = None
    num_sealed: int = 0
    promised: int = 0
    steps_by_name: dict[Name, Step] = field(default_factory=dict)


class World:
    """Groups, a learner, deaths, pauses and the lateness timer around a ledger, in virtual time."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.rng = np.random.default_rng(scenario.seed)
        self.episodes = Episodes(scenario.seed, scenario.mean_episode)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.ledger = EpochLedger(
            scenario.num_epoch_samples, max_policy_lag=scenario.max_policy_lag, late_ticks=LATE_TICKS
        )
        self.pool = PagePool(
            PagePool.capacity_for(
                group_sizes=scenario.group_sizes,
                num_epoch_samples=scenario.num_epoch_samples,
                min_trajectory_length=scenario.min_trajectory_length,
                max_policy_lag=scenario.max_policy_lag,
                next_step=scenario.next_step,
                page_ticks=scenario.page_ticks,
            ),
            ArraySpec((3,), "int64"),
            with_keep=scenario.min_trajectory_length > 1,
            page_ticks=scenario.page_ticks,
        )
        self.parties = self._parties()
        self.versions: dict[int, int] = {}  # acting, by the epoch that was opened with it
        self.acting = self.published = 0
        self.sealed: deque[SealedEpoch] = deque()
        self.num_rows: dict[int, int] = {}
        self.num_sealed = self.num_learned = 0
        self.learning = False
        self.paused = False
        self.completed: set[int] = set()  # epochs that were told to make do with what they have
        self.withdrawn = False  # a step was late, left, or brought less than it had promised
        self.timer_set = False
        self.durations: list[float] = []
        self.learned: dict[int, list[Name]] = {env: [] for env in range(sum(scenario.group_sizes))}
        self.happened: set[Name] = set()
        self.num_dropped = self.num_dropped_sealed = 0
        self.num_transitions = 0
        self.num_late = 0

    def _parties(self) -> list[Party]:
        scenario, parties, first = self.scenario, [], 0
        for key, size in enumerate(scenario.group_sizes):
            track = GroupTrack(
                self.pool,
                num_envs=size,
                first_env=first,
                min_trajectory_length=scenario.min_trajectory_length,
                max_trajectory_length=scenario.max_trajectory_length,
                next_step=scenario.next_step,
            )
            names = [(first + row, 0, 0) for row in range(size)]
            parties.append(Party(key, first, track, names, [False] * size))
            first += size
        return parties

    # ------------------------------------------------------------------ time
    def later(self, delay: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + delay, next(self.order), event))

    def advance(self) -> bool:
        """The next event; False where there is none."""
        if not self.events:
            return False
        self.now, _, event = heapq.heappop(self.events)
        event()
        self.carry_out()
        return True

    def carry_out(self) -> None:
        """What a rollout does with the ledger's decisions."""
        while self.ledger.decisions:
            decisions, self.ledger.decisions = self.ledger.decisions, []
            for decision in decisions:
                match decision:
                    case Opened(epoch):
                        self.acting = self.versions[epoch] = self.published
                        assert self.acting >= epoch - 1 - self.scenario.max_policy_lag
                        assert epoch == len(self.versions)
                    case Granted(key, epoch):
                        self.granted(self.parties[key], epoch)
                    case Sealed():
                        self.hand_over(decision)
        if not self.timer_set and (deadline := self.ledger.deadline()) is not None:
            self.timer_set = True
            self.later(max(0.0, deadline - self.now), self.expire)

    def expire(self) -> None:
        self.timer_set = False
        limit = LATE_TICKS * median(self.durations[-64:])
        for party in self.parties:
            step = party.outstanding
            if step is not None and step.dispatched_at is not None and self.now >= step.dispatched_at + limit:
                step.may_be_late = self.withdrawn = True
        self.ledger.expire(self.now)

    # ------------------------------------------------------------------ groups
    def start(self) -> None:
        for party in self.parties:
            self.ledger.join(party.key)
            party.track.begin(np.array(party.names, np.int64))
            self.later(float(self.rng.exponential()), lambda party=party: self.want(party))  # type: ignore[misc]
        horizon = 5.0 * self.scenario.num_epochs
        for _ in range(min(self.scenario.num_deaths, len(self.parties) - 1)):
            self.later(float(self.rng.uniform(0, horizon)), self.kill)
        for _ in range(self.scenario.num_completes):
            self.later(float(self.rng.uniform(0, horizon)), self.complete)
        for _ in range(self.scenario.num_pauses):
            self.later(float(self.rng.uniform(0, horizon)), self.pause)

    def want(self, party: Party) -> None:
        if not party.alive:
            return
        party.track.reserve()
        party.promised = party.track.adds()
        epoch = self.ledger.request(party.key, party.promised)
        if epoch is not None:
            self.carry_out()
            self.granted(party, epoch)

    def granted(self, party: Party, epoch: int) -> None:
        assert party.alive
        assert party.outstanding is None
        assert not self.paused
        assert epoch > self.num_sealed
        assert self.acting >= self.versions[epoch]
        party.outstanding = Step(epoch, party.promised, self.acting)
        self.later(float(self.rng.choice([0.0, 0.1])), lambda: self.dispatch(party))

    def dispatch(self, party: Party) -> None:
        step = party.outstanding
        if step is None or not party.alive:
            return
        assert self.acting == step.version, "weights changed under a granted step"
        step.dispatched_at = self.now
        size = len(party.names)
        party.track.write(
            np.array([hash(name) % 5 for name in party.names]),
            np.array([-reward_of(name) for name in party.names], np.float32),
            np.full(size, self.acting),
        )
        self.ledger.dispatch(party.key, self.now)
        stalled = self.rng.random() < self.scenario.stalls
        self.later(float(self.rng.gamma(4.0) / 4.0 * (20.0 if stalled else 1.0)), lambda: self.land(party, step))

    def land(self, party: Party, step: Step) -> None:
        if not party.alive:
            return
        assert step.dispatched_at is not None
        tick, ended = self.step_environments(party, step)
        landing = party.track.land(tick)
        assert sorted(zip(landing.lengths, landing.returns, strict=True)) == sorted(ended)
        self.durations.append(self.now - step.dispatched_at)
        step.adds = landing.adds
        self.withdrawn |= landing.adds < step.promised
        self.num_dropped += landing.dropped
        party.steps.append(step)
        party.outstanding = None
        self.ledger.land(party.key, landing.adds, landing.dropped, self.now)
        if self.rng.random() < 0.8:
            self.carry_out()
            self.want(party)
        else:
            self.later(float(self.rng.exponential()), lambda: self.want(party))

    def step_environments(self, party: Party, step: Step) -> tuple[Tick, list[tuple[int, float]]]:
        """One step of every environment; also the lengths and returns of the episodes that it ends."""
        size = len(party.names)
        rewards, finals, ended = np.zeros(size, np.float32), [], []
        terminated, truncated = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
        for row, name in enumerate(party.names):
            env, episode, at = name
            if party.resets[row]:
                party.resets[row] = False
                party.names[row] = (env, episode + 1, 0)
                continue
            self.happened.add(name)
            party.steps_by_name[name] = step
            rewards[row] = reward_of(name)
            party.names[row] = (env, episode, at + 1)
            how = self.episodes.ends_at(name)
            if how is not None:
                (truncated if how == "truncated" else terminated)[row] = True
                finals.append((env, episode, at + 1))
                ended.append((at + 1, sum(reward_of((env, episode, before)) for before in range(at + 1))))
                if self.scenario.next_step:
                    party.resets[row] = True
                else:
                    party.names[row] = (env, episode + 1, 0)
        observations = np.array(party.names, np.int64)
        return Tick(observations, rewards, terminated, truncated, np.array(finals, np.int64).reshape(-1, 3)), ended

    def kill(self) -> None:
        living = [party for party in self.parties if party.alive]
        if len(living) > 1:
            party = living[int(self.rng.integers(len(living)))]
            party.alive = False
            party.outstanding = None
            self.withdrawn = True
            self.ledger.leave(party.key)

    def pause(self) -> None:
        self.paused = True
        self.ledger.pause()
        self.later(float(self.rng.exponential() * 10), self.resume)

    def complete(self) -> None:
        if self.ledger.sampling:
            self.completed.add(self.num_sealed + 1)
        self.ledger.complete()

    def resume(self) -> None:
        self.paused = False
        self.ledger.resume()

    # ------------------------------------------------------------------ epochs
    def hand_over(self, sealed: Sealed) -> None:
        scenario = self.scenario
        self.num_sealed += 1
        assert sealed.epoch == self.num_sealed, "epochs are sealed in order"
        for party in self.parties:
            if party.outstanding is not None and party.outstanding.epoch <= sealed.epoch:
                assert party.outstanding.may_be_late, "a step of the epoch is in flight"
        steps: list[Step] = []
        segments = []
        for party in self.parties:
            boundary = sealed.boundaries[party.key]
            assert party.num_sealed <= boundary <= len(party.steps)
            steps += party.steps[party.num_sealed : boundary]
            if boundary:
                segments.append(party.track.seal(boundary))
                assert segments[-1].num_ticks == boundary - party.num_sealed
            party.num_sealed = boundary
        for step in steps:
            assert step.epoch == sealed.epoch or (step.may_be_late if step.epoch < sealed.epoch else self.withdrawn)
        assert sealed.num_rows == sum(step.adds for step in steps)
        unforeseen = sum(max(0, step.adds - step.promised) for step in steps)  # young rows that a seal made old
        most = max(scenario.group_sizes) * scenario.min_trajectory_length
        least = 1 if sealed.epoch in self.completed else scenario.num_epoch_samples
        assert least <= sealed.num_rows < scenario.num_epoch_samples + most + unforeseen
        assert sealed.num_late <= sum(step.adds for step in steps if step.may_be_late)
        self.num_late += sealed.num_late
        self.num_dropped_sealed += sealed.num_dropped
        self.num_rows[sealed.epoch] = sealed.num_rows
        self.sealed.append(
            SealedEpoch(
                sealed.epoch,
                segments,
                [],
                [],
                sealed.num_rows,
                sealed.num_dropped,
                sealed.num_late,
                len(steps),
                self.now,
            )
        )
        assert len(self.sealed) + self.learning <= scenario.max_policy_lag + 1, "room in the channel"
        self.learn()

    def learn(self) -> None:
        if self.learning or not self.sealed:
            return
        self.learning = True
        sealed = self.sealed.popleft()
        batch = sealed.gather()
        sealed.release(self.pool)
        self.check(batch, sealed)
        self.later(float(self.rng.random() * self.scenario.learn_s), lambda: self.learned_one(sealed.epoch))

    def learned_one(self, epoch: int) -> None:
        self.learning = False
        self.num_learned = self.published = epoch
        self.ledger.learned(epoch)
        self.learn()

    def check(self, batch: TrajectoryBatch, sealed: SealedEpoch) -> None:
        """Whether a batch is what happened."""
        assert len(batch) == self.num_rows[sealed.epoch] + sealed.num_carried
        if self.scenario.min_trajectory_length == 1:
            assert sealed.num_carried == sealed.num_dropped == 0
        self.num_transitions += sealed.num_transitions
        names = named(batch.observations)
        bootstraps = dict(zip(batch.bootstrap_rows.tolist(), named(batch.bootstrap_observations), strict=True))
        finals = dict(zip(batch.final_rows.tolist(), named(batch.final_observations), strict=True))
        ends = set((batch.starts + batch.lengths - 1).tolist())
        assert batch.starts.tolist() == [0, *(row + 1 for row in sorted(ends)[:-1])]
        assert set(np.flatnonzero(batch.ends).tolist()) == ends
        assert batch.lengths.max() <= self.scenario.max_trajectory_length
        for env, start in zip(batch.environments.tolist(), batch.starts.tolist(), strict=True):
            assert names[start][0] == env
        for row, name in enumerate(names):
            assert name in self.happened
            how = self.episodes.ends_at(name)
            after = (*name[:2], name[2] + 1)
            assert (batch.terminated[row], batch.truncated[row]) == (how == "terminated", how == "truncated")
            assert batch.rewards[row] == reward_of(name)
            assert batch.log_probs[row] == -reward_of(name)
            assert batch.actions[row] == hash(name) % 5
            assert finals.pop(row, None) == (after if how else None)
            if row in ends:
                assert bootstraps.pop(row, None) == (None if how == "terminated" else after)
            else:
                assert how is None
                assert names[row + 1] == after
            self.learned[name[0]].append(name)
            party = next(
                party for party in self.parties if party.first_env <= name[0] < party.first_env + len(party.names)
            )
            step = party.steps_by_name[name]
            assert batch.versions[row] == step.version
            if not step.may_be_late and self.scenario.min_trajectory_length == 1:
                assert step.version >= sealed.epoch - 1 - self.scenario.max_policy_lag
                assert step.version == self.versions[sealed.epoch] or self.withdrawn
        assert not bootstraps
        assert not finals

    # ------------------------------------------------------------------ the whole
    def run(self) -> None:
        """Until its epochs are learned and finished; asserts that it gets there."""
        self.start()
        events = 0
        while self.num_learned < self.scenario.num_epochs:
            assert self.advance(), f"deadlock: {self.ledger.describe()}"
            events += 1
            assert events < NUM_EVENTS * self.scenario.num_epochs, f"livelock: {self.ledger.describe()}"
        self.ledger.finish()
        num_opened = self.ledger.num_opened
        while self.advance():
            pass
        assert self.ledger.num_opened == num_opened, "an epoch was opened after finish"
        assert self.num_learned == num_opened, f"deadlock: {self.ledger.describe()}"
        assert not self.ledger.sampling
        assert self.ledger.num_outstanding == 0
        self.account()

    def account(self) -> None:
        """Every transition was learned once and in order, or dropped, or is still open; every page came back."""
        for env, names in self.learned.items():
            assert all(one < other for one, other in itertools.pairwise(names)), f"environment {env} is out of order"
        learned = {name for names in self.learned.values() for name in names}
        used = {name[:2] for name in learned}  # episodes: one that is used though short is used whole
        dropped = unsealed = 0
        for name in self.happened - learned:
            length, _ = self.episodes.of(*name[:2])
            over = (*name[:2], length - 1) in self.happened
            if over and length < self.scenario.min_trajectory_length and name[:2] not in used:
                dropped += 1
            else:
                unsealed += 1
        assert dropped == self.num_dropped
        limit = self.scenario.min_trajectory_length * sum(self.scenario.group_sizes)  # late steps, and young rows
        assert unsealed <= limit
        for party in self.parties:
            party.track.close()
        assert self.pool.num_used == 0


def named(observations: NDArray[Any]) -> list[Name]:
    return [(int(env), int(episode), int(step)) for env, episode, step in observations]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(scenarios())
def test_every_transition_is_learned_once_in_order_and_epochs_go_on(scenario: Scenario) -> None:
    world = World(scenario)
    try:
        world.run()
    except EpisodesTooShort:
        assert scenario.min_trajectory_length > 1
        assert world.num_dropped >= 10 * scenario.num_epoch_samples
