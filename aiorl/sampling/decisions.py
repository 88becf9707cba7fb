"""What the ledger of epochs decides, for the rollout to carry out in order."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Opened:
    """Epoch `epoch` has its first step granted: the newest published weights act from here on."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Granted:
    """A request of `group` that had to wait is granted, for epoch `epoch`."""

    group: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Sealed:
    """Epoch `epoch` is complete.

    Attributes:
        epoch: Its number, from 1.
        boundaries: For each group that ever joined and has not been forgotten, how many of its ticks lie in this epoch or before.
        num_rows: Kept rows that landed in it.
        num_dropped: Rows dropped in it, because their episode was too short.
        num_late: Kept rows among them whose step was late.
    """

    epoch: int
    boundaries: dict[int, int]
    num_rows: int
    num_dropped: int
    num_late: int


Decision = Opened | Granted | Sealed
