"""What the ledger of epochs keeps for each granted step, group and unsealed epoch."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class GrantedStep:
    """One granted step of a group."""

    serial: int
    epoch: int
    adds: int
    dispatched_at: float | None = None
    landed: bool = False
    late: bool = False


@dataclass(slots=True)
class GroupState:
    """What the ledger knows of a group."""

    ticks: deque[GrantedStep] = field(default_factory=deque)  # of unsealed epochs, oldest first
    num_sealed: int = 0
    wants: int | None = None  # rows that the step it waits for will add
    gone: bool = False

    @property
    def outstanding(self) -> GrantedStep | None:
        """Its granted step that has not landed."""
        return self.ticks[-1] if self.ticks and not self.ticks[-1].landed else None


@dataclass(slots=True)
class EpochState:
    """One unsealed epoch."""

    number: int
    goal: int  # kept rows that complete it
    landed: int = 0
    granted: int = 0
    num_outstanding: int = 0
    dropped: int = 0
    late: int = 0
