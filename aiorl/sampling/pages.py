"""Where transitions lie between the step that made them and the update that learns from them.

A *page* is C consecutive ticks of one group, written in place, row by row, as they happen. It goes back to its pool when each of its
rows is learned or dropped.

Dimensions: C ticks of a page, K environments of a group.

| bound                      | what happens when it is reached                                                                          |
|----------------------------|----------------------------------------------------------------------------------------------------------|
| pages of the pool          | never: a step is granted only with its place at hand, and `PagePool.capacity_for` counts what can be held |
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aiorl.environments.spaces import ArraySpec

# The bits of a row's flags. REAL: a transition, not an autoreset's empty step.
TERMINATED, TRUNCATED, CUT, REAL = 1, 2, 4, 8

YOUNG, DROPPED = -1, -2  # what `keep` says of rows that no tick has made worth keeping

PAGE_TICKS = 32


class Page:
    """C ticks of one group.

    Attributes:
        observations: ``[C, K, *shape]``, what each action was chosen from.
        actions: ``int64 [C, K]``.
        log_probs: ``float32 [C, K]``, of the action under the weights that chose it.
        rewards: ``float32 [C, K]``.
        flags: ``uint8 [C, K]``, the bits above.
        versions: ``int64 [C, K]``, the policy version that chose the action.
        keep: ``int64 [C, K]``, the group's tick that made the row worth keeping; only where episodes have a minimum length.
        finals: Per tick at which episodes ended: (row of the page, environments ``int64 [E]``, final observations ``[E, *shape]``).
        num_wanted: Rows that are neither handed out nor dropped; counted only where there is `keep`.
        holds: How many owners still need it: its track, and segments that are not gathered yet.
    """

    __slots__ = (
        "actions",
        "finals",
        "flags",
        "holds",
        "keep",
        "log_probs",
        "num_wanted",
        "observations",
        "rewards",
        "versions",
    )

    def __init__(self, num_ticks: int, num_envs: int, observation: ArraySpec, *, with_keep: bool) -> None:
        shape = (num_ticks, num_envs)
        self.observations = np.empty((*shape, *observation.shape), observation.dtype)
        self.actions = np.empty(shape, np.int64)
        self.log_probs = np.empty(shape, np.float32)
        self.rewards = np.empty(shape, np.float32)
        self.flags = np.zeros(shape, np.uint8)
        self.versions = np.empty(shape, np.int64)
        self.keep = np.full(shape, YOUNG, np.int64) if with_keep else None
        self.finals: list[tuple[int, NDArray[np.int64], NDArray[Any]]] = []
        self.num_wanted = num_ticks * num_envs
        self.holds = 0


class PagePool:
    """Pages of one kind of observation, made when first needed and used again after.

    Args:
        capacity: Pages that may be in use at once; see `capacity_for`.
        observation: Shape and dtype of one observation.
        with_keep: Whether rows may turn out not to be worth keeping.
        page_ticks: C.
    """

    def __init__(self, capacity: int, observation: ArraySpec, *, with_keep: bool, page_ticks: int = PAGE_TICKS) -> None:
        self.capacity = capacity
        self.page_ticks = page_ticks
        self.num_used = 0
        self._observation = observation
        self._with_keep = with_keep
        self._free: dict[int, list[Page]] = {}

    @staticmethod
    def capacity_for(
        *,
        group_sizes: list[int],
        num_epoch_samples: int,
        min_trajectory_length: int,
        max_policy_lag: int,
        next_step: bool = False,
        page_ticks: int = PAGE_TICKS,
    ) -> int:
        """Pages that can be in use at once, in the worst case; they are made only when they are needed.

        Without a minimum length, the rows of every epoch that may be sampled and not yet learned lie in unbroken sequences of ticks,
        one for each group, of which autoreset's empty steps are half at most; its first and last page are counted apart. With one,
        any share of the rows around those that are kept may be dropped. What is kept are runs, of an episode in an epoch: of L rows
        in at most ``2 + (L - 1) / C`` pages. A run is as long as the minimum unless a seal cut it, which each environment suffers
        twice in an epoch at most. And each group has the pages of its young episodes and the one that it writes.

        Args:
            group_sizes: K of each group.
            num_epoch_samples: Rows of an epoch.
            min_trajectory_length: Of the episodes that are kept.
            max_policy_lag: Epochs that may be sampled ahead of the one that is learned.
            next_step: Whether the step after an episode's end is an empty one.
            page_ticks: C.
        """
        num_groups, num_envs, minimum = len(group_sizes), sum(group_sizes), min_trajectory_length
        num_epochs = max_policy_lag + 1
        rows = num_epochs * (num_epoch_samples + max(group_sizes) * minimum)
        if minimum == 1:
            ticks = rows * (2 if next_step else 1) / min(group_sizes)
            return math.ceil(ticks / page_ticks) + num_groups * (2 + math.ceil(3 / page_ticks))
        rows += (num_epochs + 1) * num_envs * minimum  # young rows that were carried over, and late ones
        runs = rows * (2 + (minimum - 1) / page_ticks) / minimum + 4 * num_envs * (num_epochs + 1)
        return math.ceil(min(rows, runs)) + num_groups * (2 + math.ceil((minimum + 1) / page_ticks))

    def acquire(self, num_envs: int) -> Page:
        """A clean page for a group of `num_envs`, held once."""
        if self.num_used >= self.capacity:
            raise AssertionError(f"all {self.capacity} pages are in use: the ledger granted a step that had no place")
        self.num_used += 1
        free = self._free.setdefault(num_envs, [])
        page = free.pop() if free else Page(self.page_ticks, num_envs, self._observation, with_keep=self._with_keep)
        page.holds = 1
        return page

    def release(self, page: Page) -> None:
        """Gives up one hold on `page`; the last one returns it."""
        page.holds -= 1
        if page.holds:
            return
        self.num_used -= 1
        page.flags.fill(0)
        page.finals.clear()
        if page.keep is not None:
            page.keep.fill(YOUNG)
            page.num_wanted = page.keep.size
        self._free[page.flags.shape[1]].append(page)
