"""The ledger of epochs: which group may step, for which epoch, and when an epoch is complete. No I/O and no clock.

Events go in (`join`, `request`, `dispatch`, `land`, `leave`, `learned`, `pause`, `resume`, `finish`, `expire`), decisions come
out (`Opened`, `Granted`, `Sealed`, in `decisions`, for the caller to take and carry out in order).

An epoch's life: **opened** by its first grant, **full** once the rows that landed and the rows that its granted steps will add reach
`num_epoch_samples`, **sealed** once it is full and none of its steps is outstanding, **learned** when the learner says so.

| what waits                  | for                                                  | ended by                                  |
|-----------------------------|------------------------------------------------------|-------------------------------------------|
| a group's request           | an epoch that is not full and may be open            | land, learned, leave, resume, expire      |
| opening epoch e             | epoch e - 1 - max_policy_lag learned; every granted  | learned, dispatch                         |
|                             | step of the epochs before it dispatched              |                                           |
| sealing epoch e             | its outstanding steps, unless late; epoch e - 1      | land, leave, expire                       |

A step is *late* when its epoch is full, its action was dispatched, and it has been outstanding for more than `late_ticks` median ticks.
It no longer counts as granted, so that other groups fill its place, and its rows belong to the first epoch that is not full when
they land: the next one as a rule, which they open; still its own where nobody could fill its place.

Where an epoch loses rows that it counted on (a late step, a lost group) after groups have gone on to the next one, the earliest steps
of that are taken over. So it holds throughout that while an epoch is not full, no step counts for a later one: whoever asks can
always be granted a step of the first epoch that is not full, and each group's steps are in the order of their epochs.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import TYPE_CHECKING

from aiorl.errors import EpisodesTooShort
from aiorl.sampling.decisions import Decision, Granted, Opened, Sealed
from aiorl.sampling.ledger_state import EpochState, GrantedStep, GroupState

if TYPE_CHECKING:
    from collections.abc import Iterator

_MEDIAN_WINDOW = 64
_HOPELESS_EPOCHS = 10


class EpochLedger:
    """Grants steps to groups and seals epochs.

    Args:
        num_epoch_samples: Kept rows that complete an epoch.
        max_policy_lag: Epochs that may be sampled ahead of the one that is learned.
        late_ticks: How many median ticks a step may be outstanding before it is late; None: steps are never late.
    """

    def __init__(self, num_epoch_samples: int, *, max_policy_lag: int = 0, late_ticks: float | None = 4.0) -> None:
        self._num_epoch_samples = num_epoch_samples
        self._max_policy_lag = max_policy_lag
        self._late_ticks = late_ticks
        self._groups: dict[int, GroupState] = {}
        # Unsealed, in order. The last may not be open yet, and begun by late rows alone.
        self._epochs: deque[EpochState] = deque()
        self._waiting: deque[int] = deque()
        self._durations: deque[float] = deque(maxlen=_MEDIAN_WINDOW)
        self._serial = 0
        self._num_undispatched = 0
        self._num_opened = 0
        self._num_learned = 0
        self._paused = False
        self._finishing = False
        self.decisions: list[Decision] = []

    # ------------------------------------------------------------------ what it says of itself
    @property
    def num_opened(self) -> int:
        """Epochs that were opened."""
        return self._num_opened

    @property
    def num_outstanding(self) -> int:
        """Steps granted and not landed, late ones left out."""
        return sum(epoch.num_outstanding for epoch in self._epochs)

    @property
    def unsealed_rows(self) -> int:
        """Kept rows that landed in epochs which are not sealed."""
        return sum(epoch.landed for epoch in self._epochs)

    @property
    def sampling(self) -> bool:
        """Whether some epoch is open and not sealed."""
        return bool(self._epochs) and self._epochs[0].number <= self._num_opened

    @property
    def paused(self) -> bool:
        """Whether grants are held back by `pause`."""
        return self._paused

    def describe(self) -> str:
        """What the ledger waits for, in a sentence: for watchdogs and consoles."""
        held = "paused; " if self._paused else "finishing; " if self._finishing else ""
        epochs = ", ".join(
            f"epoch {epoch.number}: {epoch.landed} of {epoch.goal} rows landed, {epoch.num_outstanding} steps outstanding"
            for epoch in self._epochs
        )
        return f"{held}{epochs or 'no epoch open'}; {len(self._waiting)} groups wait for a grant; epoch {self._num_learned} is learned"

    # ------------------------------------------------------------------ events
    def resume_at(self, num_epochs: int) -> None:
        """Starts after epoch `num_epochs`, which an earlier run learned. Before anything else only."""
        self._num_opened = self._num_learned = num_epochs

    def join(self, group: int) -> None:
        """Makes `group` known; it has no step outstanding."""
        self._groups[group] = GroupState()

    def leave(self, group: int) -> None:
        """`group` will not answer any more: its outstanding step no longer counts, what landed stays."""
        member = self._groups[group]
        member.gone = True
        if member.wants is not None:
            member.wants = None
            self._waiting.remove(group)
        tick = member.outstanding
        if tick is not None:
            member.ticks.pop()
            if tick.dispatched_at is None:
                self._num_undispatched -= 1
            if not tick.late:
                self._withdraw(tick)
        self._settle()

    def forget(self, group: int) -> None:
        """Drops a group that left, once none of its rows is wanted."""
        del self._groups[group]

    def request(self, group: int, adds: int) -> int | None:
        """`group` wants to step.

        Args:
            group: The group.
            adds: Kept rows that the step will add when it lands.

        Returns:
            The epoch that the step is granted for, or None: then a `Granted` decision follows, at once or later.
        """
        if not self._waiting:
            epoch = self._grantable()
            if epoch is not None and not self._full(epoch):
                self._grant(group, epoch, adds)
                return epoch.number
        self._groups[group].wants = adds
        self._waiting.append(group)
        self._settle()
        return None

    def dispatch(self, group: int, now: float) -> None:
        """The action of `group`'s granted step is on its way, at time `now` in seconds."""
        tick = self._groups[group].ticks[-1]
        tick.dispatched_at = now
        self._num_undispatched -= 1
        if self._waiting and not self._num_undispatched:
            self._settle()

    def land(self, group: int, adds: int, dropped: int, now: float) -> None:
        """`group`'s step landed.

        Args:
            group: The group.
            adds: Kept rows that it really added.
            dropped: Rows that it dropped, because an episode ended too short.
            now: Time in seconds.

        Raises:
            EpisodesTooShort: Ten epochs' worth of rows were dropped and none kept.
        """
        tick = self._groups[group].ticks[-1]
        tick.landed = True
        if tick.dispatched_at is not None:
            self._durations.append(now - tick.dispatched_at)
        if tick.late:
            epoch = self._first_not_full()
            epoch.late += adds
            tick.epoch = epoch.number
        else:
            epoch = self._epoch(tick.epoch)
            epoch.num_outstanding -= 1
            epoch.granted -= tick.adds
        epoch.landed += adds
        tick.adds = adds
        self._fill(epoch)
        if dropped:
            epoch.dropped += dropped
            if not epoch.landed and epoch.dropped >= _HOPELESS_EPOCHS * self._num_epoch_samples:
                raise EpisodesTooShort(
                    f"{epoch.dropped} transitions in a row were dropped because their episodes ended before min_trajectory_length: "
                    "no epoch can be completed; lower trainer.sampling.min_trajectory_length"
                )
        if self._waiting or (self._epochs and not self._epochs[0].num_outstanding):
            self._settle()

    def learned(self, epoch: int) -> None:
        """The learner has published the weights after `epoch`."""
        self._num_learned = epoch
        self._settle()

    def pause(self) -> None:
        """Holds every grant back; what is outstanding lands."""
        self._paused = True

    def resume(self) -> None:
        """Grants again."""
        self._paused = False
        self._settle()

    def complete(self) -> None:
        """The oldest open epoch asks for no more rows than it has: it is sealed when its outstanding steps have landed.

        An epoch in which nothing has landed cannot be complete: then nothing happens.
        """
        if self.sampling and self._epochs[0].landed:
            self._epochs[0].goal = self._epochs[0].landed
            self._settle()

    def finish(self) -> None:
        """Opens no further epoch; the open ones are completed."""
        self._finishing = True

    def deadline(self) -> float | None:
        """When `expire` should be called: the first time at which some step is late; None while no full epoch waits for one."""
        times = [tick.dispatched_at for tick in self._waited_for() if tick.dispatched_at is not None]
        limit = self._late_after() if times else None
        return min(times) + limit if limit is not None else None

    def expire(self, now: float) -> None:
        """Marks as late what is outstanding for too long at time `now` in seconds."""
        limit = self._late_after()
        if limit is None:
            return
        for tick in list(self._waited_for()):
            if tick.dispatched_at is not None and now >= tick.dispatched_at + limit:
                tick.late = True
                self._withdraw(tick)
        self._settle()

    # ------------------------------------------------------------------ the rules
    def _late_after(self) -> float | None:
        """Seconds after which a step is late; None where that cannot be said yet."""
        if self._late_ticks is None or not self._durations:
            return None
        return self._late_ticks * median(self._durations)

    def _waited_for(self) -> Iterator[GrantedStep]:
        """The outstanding steps of full epochs, late ones left out."""
        full = {epoch.number for epoch in self._epochs if epoch.num_outstanding and self._full(epoch)}
        if not full:
            return
        for member in self._groups.values():
            tick = member.outstanding
            if tick is not None and not tick.late and tick.epoch in full:
                yield tick

    def _full(self, epoch: EpochState) -> bool:
        return epoch.landed + epoch.granted >= epoch.goal

    def _epoch(self, number: int) -> EpochState:
        return self._epochs[number - self._epochs[0].number]

    def _first_not_full(self) -> EpochState:
        """The epoch that a late step's rows belong to when they land, open or not."""
        for epoch in self._epochs:
            if not self._full(epoch):
                return epoch
        return self._append()

    def _append(self) -> EpochState:
        """The epoch after all that are not sealed."""
        number = self._epochs[-1].number + 1 if self._epochs else self._num_opened + 1
        epoch = EpochState(number, self._num_epoch_samples)
        self._epochs.append(epoch)
        return epoch

    def _grantable(self) -> EpochState | None:
        """The epoch that steps are granted for now: the first open one that is not full, else the next, if it may be opened.

        That one may be full by late rows already.
        """
        if self._paused:
            return None
        for epoch in self._epochs:
            if epoch.number > self._num_opened:
                break
            if not self._full(epoch):
                return epoch
        number = self._num_opened + 1
        if self._finishing or self._num_undispatched or self._num_learned < number - 1 - self._max_policy_lag:
            return None
        begun = self._epochs and self._epochs[-1].number >= number
        epoch = self._epoch(number) if begun else self._append()
        self._num_opened = number
        self.decisions.append(Opened(number))
        return epoch

    def _grant(self, group: int, epoch: EpochState, adds: int) -> None:
        self._serial += 1
        self._num_undispatched += 1
        epoch.granted += adds
        epoch.num_outstanding += 1
        self._groups[group].ticks.append(GrantedStep(self._serial, epoch.number, adds))

    def _withdraw(self, tick: GrantedStep) -> None:
        """An outstanding step no longer counts as granted; its place is filled from the next epoch where that has begun."""
        epoch = self._epoch(tick.epoch)
        epoch.num_outstanding -= 1
        epoch.granted -= tick.adds
        self._fill(epoch)

    def _fill(self, epoch: EpochState) -> None:
        """Takes the earliest steps of the next epoch over into `epoch` until it is full or none is left."""
        index = epoch.number - self._epochs[0].number + 1
        if self._full(epoch) or index >= len(self._epochs):
            return
        following = self._epochs[index]
        while not self._full(epoch):
            firsts = [
                tick
                for member in self._groups.values()
                if (tick := next((tick for tick in member.ticks if tick.epoch == following.number), None))
                and (tick.landed or not tick.late)
            ]
            if not firsts:
                break
            tick = min(firsts, key=lambda tick: tick.serial)
            tick.epoch = epoch.number
            if tick.landed:
                following.landed -= tick.adds
                epoch.landed += tick.adds
                if tick.late:
                    following.late -= tick.adds
                    epoch.late += tick.adds
            else:
                following.granted -= tick.adds
                following.num_outstanding -= 1
                epoch.granted += tick.adds
                epoch.num_outstanding += 1
        self._fill(following)

    def _settle(self) -> None:
        """Seals what is complete and grants what may be granted."""
        while True:
            while self.sampling and not self._epochs[0].num_outstanding and self._full(self._epochs[0]):
                self._seal(self._epochs.popleft())
            if not self._grant_waiting():
                return

    def _grant_waiting(self) -> bool:
        """Grants waiting requests in their order. Returns whether an epoch may have become complete by opening."""
        while self._waiting:
            epoch = self._grantable()
            if epoch is None:
                return False
            if self._full(epoch):  # by late rows alone
                return True
            group = self._waiting.popleft()
            member = self._groups[group]
            adds, member.wants = member.wants or 0, None
            self._grant(group, epoch, adds)
            self.decisions.append(Granted(group, epoch.number))
        return False

    def _seal(self, epoch: EpochState) -> None:
        boundaries = {}
        for key, member in self._groups.items():
            while member.ticks and member.ticks[0].epoch <= epoch.number and member.ticks[0].landed:
                member.ticks.popleft()
                member.num_sealed += 1
            boundaries[key] = member.num_sealed
        self.decisions.append(Sealed(epoch.number, boundaries, epoch.landed, epoch.dropped, epoch.late))
