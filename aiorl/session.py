"""What a trainer is given to run in, and how a run ends."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiorl.environments.supervisor import Workers
    from aiorl.learning.snapshot import Contents
    from aiorl.learning.training import Training
    from aiorl.monitoring.folder import RunFolder
    from aiorl.monitoring.metrics import EpochRecord
    from aiorl.tasks.base import Callback, State


@dataclass(slots=True)
class Session:
    """What a run is given besides the objects that it trains.

    Attributes:
        folder: The run's folder, locked by the caller.
        restored: What it goes on from; None: a new run.
        callbacks: Told about the run after the task.
        started_at: ``time.perf_counter()`` before environments, model and optimizer were built.
        report: Called with each epoch's record, on the loop.
        ready: Called once, on the loop, when everything is built and before the first step.
    """

    folder: RunFolder
    restored: Contents | None = None
    callbacks: Iterable[Callback] = ()
    started_at: float = field(default_factory=time.perf_counter)
    report: Callable[[EpochRecord], None] = lambda _: None
    ready: Callable[[Training, Workers], None] = lambda *_: None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        state: Its counters.
        reason: Why it ended, in words.
        episode_return_mean: Over the last 100 episodes; None before the first.
        wall_s: Seconds from `Session.started_at` to the last optimizer step.
        given_up: Kept transitions that were not learned, because the run was stopped.
        num_new_samples: Environment transitions since it was started, or resumed.
    """

    state: State
    reason: str
    episode_return_mean: float | None
    wall_s: float
    given_up: int
    num_new_samples: int


def summary_of(outcome: Outcome, failure: BaseException | None, *, stopped: bool) -> dict[str, Any]:
    """The content of ``summary.json``."""
    state = outcome.state
    cancelled = isinstance(failure, asyncio.CancelledError)
    failed = failure is not None and not cancelled
    status = "failed" if failed else "stopped" if stopped or cancelled else "finished"
    return {
        "status": status,
        "reason": "cancelled" if cancelled else outcome.reason,
        "num_samples": state.num_samples,
        "num_episodes": state.num_episodes,
        "num_epochs": state.num_epochs,
        "num_steps": state.num_steps,
        "episode_return_mean": outcome.episode_return_mean,
        "wall_s": outcome.wall_s,
        "samples_per_s": outcome.num_new_samples / outcome.wall_s if outcome.wall_s > 0 else None,
        "given_up_samples": outcome.given_up,
        "error": None if not failed else f"{type(failure).__name__}: {failure}",
    }
