"""What a learned epoch leaves in the metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiorl.monitoring.metrics import EpochRecord

if TYPE_CHECKING:
    from aiorl.learning.learner import Update
    from aiorl.learning.training import Parts
    from aiorl.sampling.batcher import BatcherStatistics
    from aiorl.sampling.trajectory import SealedEpoch


def record_of(
    parts: Parts,
    sealed: SealedEpoch,
    update: Update,
    batching: tuple[BatcherStatistics, BatcherStatistics],
    *,
    epoch_s: float,
    checkpoint_s: float | None,
) -> EpochRecord:
    """The record of an epoch.

    Args:
        parts: What the epoch loop works with.
        sealed: The epoch.
        update: What was learned from it.
        batching: The batcher's statistics at the end of the epoch before and of this one.
        epoch_s: Seconds from the one end to the other.
        checkpoint_s: Seconds that a checkpoint held the learner up; None where there was none.
    """
    state, (before, batches) = parts.state, batching
    num_batches = batches.num_batches - before.num_batches
    flushes = {name: count - before.flushes[name] for name, count in batches.flushes.items()}
    metrics: dict[str, Any] = {
        **parts.window.metrics(),
        **update.metrics,
        **parts.system(),
        "learner/policy_version": state.policy_version,
        "sampling/samples_per_s": sealed.num_transitions / epoch_s if epoch_s > 0 else None,
        "sampling/kept_rows": update.num_rows,
        "sampling/dropped_rows": sealed.num_dropped,
        "sampling/carried_rows": sealed.num_carried,
        "sampling/late_rows": sealed.num_late,
        "sampling/trajectories": update.num_trajectories,
        "sampling/lag_mean": update.lag_mean,
        "sampling/lag_max": update.lag_max,
        "sampling/groups": parts.rollout.num_groups,
        "sampling/group_balance": _group_balance(sealed, parts.rollout.num_groups),
        "sampling/ticks": sealed.num_ticks,
        "sampling/batches": num_batches,
        "sampling/batch_size_mean": (batches.num_rows - before.num_rows) / num_batches if num_batches else None,
        "sampling/batch_size_max": batches.batch_rows.max,
        "sampling/batch_wait_p50_s": batches.wait_s.p50,
        "sampling/batch_wait_p99_s": batches.wait_s.p99,
        "sampling/flushes_full": flushes["size"],
        "sampling/flushes_time": flushes["time"],
        "sampling/flushes_early": flushes["producers"],
        "sampling/flushes_asked": flushes["flush"] + flushes["drain"],
        "time/epoch_s": epoch_s,
        "time/sample_s": sealed.sample_s,
        "time/prepare_s": update.prepare_s,
        "time/learn_s": update.learn_s,
        "time/checkpoint_s": checkpoint_s,
    }
    return EpochRecord.make(
        epoch=sealed.epoch, num_samples=state.num_samples, time_s=state.elapsed_time_s, metrics=metrics
    )


def _group_balance(sealed: SealedEpoch, num_groups: int) -> float:
    """Ticks of the group with the fewest, relative to an equal share; a group that has landed none ever has no segment."""
    ticks = [segment.num_ticks for segment in sealed.segments]
    ticks += [0] * (num_groups - len(ticks))
    return min(ticks) * len(ticks) / sum(ticks)
