"""A group's sequence of pages, and what is known of its episodes. No I/O and no clock.

At a seal the track hands out a *segment*: the rows of that epoch, as index ranges over its pages, which the learner gathers into one
batch.

Dimensions: C ticks of a page, K environments of a group, T ticks of a segment.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from aiorl.sampling.pages import CUT, DROPPED, REAL, TERMINATED, TRUNCATED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aiorl.environments.make import Tick
    from aiorl.sampling.pages import Page, PagePool


@dataclass(frozen=True, slots=True)
class Landing:
    """What one tick brought.

    Attributes:
        adds: Rows that it made worth keeping.
        dropped: Rows that it showed to be of a too short episode.
        returns: Returns of the episodes that it ended.
        lengths: Their lengths in transitions.
    """

    adds: int
    dropped: int
    returns: list[float]
    lengths: list[int]


@dataclass(slots=True)
class Piece:
    """Rows ``start:stop`` of a page, of which `take` (``bool [T, K]``, None: all) belong to the segment."""

    page: Page
    start: int
    stop: int
    take: NDArray[np.bool_] | None


@dataclass(slots=True)
class Segment:
    """One group's share of an epoch.

    Attributes:
        first_env: Global index of environment 0 of the group.
        pieces: Its rows, in order of time.
        next_observations: ``[K, *shape]``, what follows the last tick: the bootstrap of what is cut there.
        num_ticks: Its ticks.
        num_transitions: Real transitions that happened in the epoch, kept or not.
        num_carried: Rows used although their episode is still short, because they were carried over one seal already.
    """

    first_env: int
    pieces: list[Piece]
    next_observations: NDArray[Any]
    num_ticks: int
    num_transitions: int
    num_carried: int


class GroupTrack:
    """One group's pages and episodes. No I/O, no clock.

    Args:
        pool: Where its pages come from.
        num_envs: K.
        first_env: Global index of its first environment.
        min_trajectory_length: Episodes shorter than this are dropped.
        max_trajectory_length: Trajectories are cut here.
        next_step: Whether the step after an episode's end is an autoreset's empty one.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        num_envs: int,
        first_env: int,
        min_trajectory_length: int,
        max_trajectory_length: int,
        next_step: bool,
    ) -> None:
        self.num_envs = num_envs
        self.first_env = first_env
        self.masked: NDArray[np.bool_] | None = None  # rows whose next step is an autoreset's empty one
        self._pool = pool
        self._minimum = min_trajectory_length
        self._maximum = max_trajectory_length
        self._next_step = next_step
        self._pages: dict[int, Page] = {}  # by tick // C, in order
        self._num_ticks = 0  # written
        self._boundary = 0  # ticks that are sealed
        self._num_landed = 0
        self._transitions: deque[int] = deque()  # of each landed tick that is not sealed
        self._next_cut = max_trajectory_length  # no trajectory can be full before this many ticks have landed
        self._observations: NDArray[Any] | None = None  # the latest ones
        self._lengths = np.zeros(num_envs, np.int64)  # of the open episodes
        self._returns = np.zeros(num_envs, np.float64)
        self._since_cut = np.zeros(num_envs, np.int64)
        self._pending = np.zeros(num_envs, np.int64)  # young rows of the open episodes
        self._accepted = np.zeros(num_envs, np.bool_)  # the open episode's rows are kept from now on
        self._carried = np.zeros(num_envs, np.bool_)  # its young rows were carried over a seal

    # ------------------------------------------------------------------ stepping
    def begin(self, observations: NDArray[Any]) -> None:
        """The first observations ``[K, *shape]``, after a reset."""
        self._observations = observations

    def reserve(self) -> None:
        """Makes sure that the next tick has its place."""
        index = self._num_ticks // self._pool.page_ticks
        if index not in self._pages:
            self._pages[index] = self._pool.acquire(self.num_envs)

    def adds(self) -> int:
        """Rows that the next step will add when it lands."""
        if self._minimum > 1:
            old = self._accepted | (self._lengths + 1 >= self._minimum)
            gain = np.where(old, self._pending + 1, 0)
            return int(gain[~self.masked].sum() if self.masked is not None else gain.sum())
        return self.num_envs - int(np.count_nonzero(self.masked)) if self.masked is not None else self.num_envs

    def write(self, actions: NDArray[np.int64], log_probs: NDArray[np.float32], versions: NDArray[np.int64]) -> None:
        """Notes what the next step is made of: the latest observations, and the actions chosen from them."""
        page, row = self._place(self._num_ticks)
        page.observations[row] = self._observations
        page.actions[row] = actions
        page.log_probs[row] = log_probs
        page.versions[row] = versions
        self._num_ticks += 1

    def land(self, tick: Tick) -> Landing:
        """Notes what the step brought."""
        at = self._num_landed
        page, row = self._place(at)
        self._num_landed = at + 1
        masked = self.masked
        self._transitions.append(self.num_envs if masked is None else self.num_envs - int(np.count_nonzero(masked)))
        self._observations = tick.observations
        ended = tick.terminated | tick.truncated
        any_ended = np.count_nonzero(ended) > 0  # any() takes ten times as long
        flags = page.flags[row]
        flags[:] = REAL
        page.rewards[row] = tick.rewards
        self._returns += tick.rewards
        self._lengths += 1
        self._since_cut += 1
        if any_ended:
            flags |= tick.terminated * np.uint8(TERMINATED)
            flags |= tick.truncated * np.uint8(TRUNCATED)
        if masked is not None:
            flags[masked] = 0
            self._lengths[masked] = 0
            self._since_cut[masked] = 0
            self._returns[masked] = 0.0
        if self._num_landed >= self._next_cut:
            self._cut_full(flags, ended)
        adds, dropped = self._judge(page, row, at, ended)
        returns: list[float] = []
        lengths: list[int] = []
        if any_ended:
            which = np.flatnonzero(ended)
            page.finals.append((row, which, np.array(tick.final_observations)))
            returns = self._returns[which].tolist()
            lengths = self._lengths[which].tolist()
            for array in (self._lengths, self._returns, self._since_cut, self._pending, self._accepted, self._carried):
                array[which] = 0
        if self._next_step:
            self.masked = ended if any_ended else None
        if dropped:
            self._release()
        return Landing(adds, dropped, returns, lengths)

    def _place(self, tick: int) -> tuple[Page, int]:
        index, row = divmod(tick, self._pool.page_ticks)
        return self._pages[index], row

    def _cut_full(self, flags: NDArray[np.uint8], ended: NDArray[np.bool_]) -> None:
        """Cuts trajectories that have reached their maximum; the environment goes on."""
        full = (self._since_cut >= self._maximum) & ~ended
        flags[full] |= CUT
        self._since_cut[full] = 0
        self._next_cut = self._num_landed + self._maximum - int(np.where(ended, 0, self._since_cut).max())

    def _judge(self, page: Page, row: int, at: int, ended: NDArray[np.bool_]) -> tuple[int, int]:
        """Which rows the landed tick `at` makes worth keeping, and which it shows to be of too short episodes."""
        if page.keep is None:
            return self._transitions[-1], 0
        real = ~self.masked if self.masked is not None else np.ones(self.num_envs, np.bool_)
        self._pending[real] += 1
        old = real & (self._accepted | (self._lengths >= self._minimum))
        too_short = real & ended & ~old
        if not real.all():
            page.keep[row, ~real] = DROPPED
            page.num_wanted -= self.num_envs - self._transitions[-1]
        adds, dropped = int(self._pending[old].sum()), int(self._pending[too_short].sum())
        for env in np.flatnonzero(old):
            self._mark(int(env), at, at)
        for env in np.flatnonzero(too_short):
            self._mark(int(env), at, DROPPED)
        self._accepted |= old
        self._pending[old | too_short] = 0
        return adds, dropped

    def _mark(self, env: int, at: int, keep: int) -> None:
        """Settles the young rows of `env` up to tick `at`."""
        remaining = int(self._pending[env])
        while remaining:
            page, row = self._place(at)
            assert page.keep is not None
            count = min(remaining, row + 1)
            page.keep[row + 1 - count : row + 1, env] = keep
            if keep == DROPPED:
                page.num_wanted -= count
            at -= count
            remaining -= count

    # ------------------------------------------------------------------ sealing
    def seal(self, boundary: int) -> Segment:
        """Hands out the rows of the epoch that ends before tick `boundary`, cutting what is open there."""
        num_carried = self._use_carried(boundary) if self._minimum > 1 else 0
        pieces: list[Piece] = []
        cut: NDArray[np.bool_] | None = None  # environments whose row before the boundary is handed out; None: all
        size = self._pool.page_ticks
        for index, page in self._pages.items():
            begin = index * size
            if begin >= boundary:
                break
            stop = min(size, boundary - begin)
            fresh = max(0, self._boundary - begin)
            if page.keep is not None:
                take = (page.keep[:stop] >= 0) & (page.keep[:stop] < boundary)
                if take.any():
                    page.keep[:stop][take] = DROPPED
                    page.num_wanted -= int(np.count_nonzero(take))
                    pieces.append(Piece(page, 0, stop, take))
                    page.holds += 1
                if begin + stop == boundary:
                    cut = take[-1]
            elif fresh < stop:
                real = page.flags[fresh:stop] & REAL
                pieces.append(Piece(page, fresh, stop, None if real.all() else real.astype(np.bool_)))
                page.holds += 1
        following = self._following(boundary)
        num_ticks = boundary - self._boundary
        num_transitions = sum(self._transitions.popleft() for _ in range(num_ticks))
        if self._minimum == 1 or cut is not None:
            after = np.minimum(self._since_cut, self._num_landed - boundary)
            self._since_cut = after if cut is None else np.where(cut, after, self._since_cut)
        self._next_cut = self._num_landed + self._maximum - int(self._since_cut.max())
        self._boundary = boundary
        self._release()
        return Segment(self.first_env, pieces, following, num_ticks, num_transitions, num_carried)

    def _following(self, boundary: int) -> NDArray[Any]:
        """What was observed after tick `boundary` - 1, wherever a row that is handed out is followed by it."""
        if boundary < self._num_ticks and boundary // self._pool.page_ticks in self._pages:
            page, row = self._place(boundary)
            return np.array(page.observations[row])
        assert self._observations is not None, "a group that never began has no rows to seal"
        return np.array(self._observations)

    def _use_carried(self, boundary: int) -> int:
        """Young rows that were carried over one seal are used now; the others are carried. Returns the rows used.

        Of an episode that is used now, rows that landed after the boundary wait for its next step, as those of old enough episodes.
        """
        used = 0
        num_later = self._num_landed - boundary
        for env in np.flatnonzero(self._pending > num_later):
            if not self._carried[env]:
                self._carried[env] = True
                continue
            self._pending[env] -= num_later
            used += int(self._pending[env])
            self._mark(int(env), boundary - 1, boundary - 1)
            self._pending[env] = num_later
            self._accepted[env] = True
        return used

    def _release(self) -> None:
        """Gives up the pages that are full, and of which every row is handed out or dropped."""
        size = self._pool.page_ticks
        for index, page in list(self._pages.items()):
            end = (index + 1) * size
            if end > self._num_landed:
                return
            if not page.num_wanted if page.keep is not None else end <= self._boundary:
                self._pool.release(self._pages.pop(index))

    def close(self) -> None:
        """Gives every page up."""
        while self._pages:
            self._pool.release(self._pages.popitem()[1])
