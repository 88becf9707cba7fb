"""The one table of metric names: what each is, and in which unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Metric:
    """One entry of the table.

    Attributes:
        name: ``group/name``; ``<i>`` stands for the number of a device.
        unit: Unit, or what is counted.
        meaning: What it is, in one sentence.
    """

    name: str
    unit: str
    meaning: str

    @property
    def group(self) -> str:
        """What stands before the slash."""
        return self.name.partition("/")[0]

    @property
    def per_device(self) -> bool:
        """Whether there is one of it for each device, so that the name holds ``<i>``."""
        return "<i>" in self.name


GROUPS: Final[Mapping[str, str]] = {
    "episode": "Episodes that ended; over the last 100 of them where nothing else is said.",
    "sampling": "How the epoch's transitions were collected.",
    "learner": "The epoch's update; means over its minibatches, weighted by their rows, where nothing else is said.",
    "time": "Where the epoch's time went. The stations overlap, so that these need not add up to the whole.",
    "system": "The machine, as last read (see `cpu_stats_ping_interval` and `gpu_stats_ping_interval`).",
}

METRICS: Final[tuple[Metric, ...]] = (
    Metric("episode/return_mean", "reward", "Mean undiscounted return."),
    Metric("episode/return_std", "reward", "Population standard deviation of the return."),
    Metric("episode/return_min", "reward", "Smallest return."),
    Metric("episode/return_max", "reward", "Largest return."),
    Metric("episode/length_mean", "steps", "Mean length."),
    Metric("episode/num_episodes", "episodes", "Episodes ended since the run's start, too short ones included."),
    Metric("sampling/samples_per_s", "samples/s", "Transitions per second of the epoch, its learning included."),
    Metric("sampling/kept_rows", "rows", "Transitions that the epoch was learned from."),
    Metric("sampling/dropped_rows", "rows", "Transitions of episodes under `min_trajectory_length`, never learned."),
    Metric("sampling/carried_rows", "rows", "Transitions of young episodes, carried over from the epoch before."),
    Metric("sampling/late_rows", "rows", "Transitions granted for an earlier epoch that landed too late for it."),
    Metric("sampling/trajectories", "trajectories", "Trajectories that the kept rows form."),
    Metric("sampling/lag_mean", "versions", "Mean policy lag: newest version less the one that acted."),
    Metric("sampling/lag_max", "versions", "Largest policy lag of a kept row."),
    Metric("sampling/groups", "groups", "Environment groups that take part."),
    Metric(
        "sampling/group_balance",
        "1",
        "Ticks of the group that landed the fewest, relative to an equal share: 1 where all landed as many, 0 where one landed none.",
    ),
    Metric("sampling/ticks", "ticks", "Steps of whole groups that landed."),
    Metric("sampling/batches", "batches", "Batches that were acted on."),
    Metric("sampling/batch_size_mean", "rows", "Mean size of these batches."),
    Metric("sampling/batch_size_max", "rows", "Largest batch since the trainer was started."),
    Metric(
        "sampling/batch_wait_p50_s", "s", "Median time that a request waited for its batch, since the trainer's start."
    ),
    Metric("sampling/batch_wait_p99_s", "s", "99th percentile of that time."),
    Metric("sampling/flushes_full", "batches", "Batches begun because `max_batch_size` rows were queued."),
    Metric("sampling/flushes_time", "batches", "Batches begun because the oldest row had waited `max_wait_time`."),
    Metric("sampling/flushes_early", "batches", "Batches begun because no live group had an answer outstanding."),
    Metric("sampling/flushes_asked", "batches", "Batches begun because a flush or a close asked for it."),
    Metric("learner/loss", "loss", "The loss that was minimised."),
    Metric("learner/policy_loss", "loss", "The policy's share of it, before coefficients."),
    Metric("learner/value_loss", "loss", "The value function's share of it, before `vf_coef`."),
    Metric("learner/entropy", "nats", "Entropy of the policy."),
    Metric("learner/approx_kl", "nats", "Divergence from the policy at the start of the update, E[r - 1 - log r]."),
    Metric("learner/clipfrac", "share", "Share of rows whose probability ratio was clipped."),
    Metric("learner/explained_variance", "1", "1 - Var[returns - values] / Var[returns], before the update."),
    Metric("learner/behaviour_weight", "1", "Mean weight of a row against policy lag; null without a lag."),
    Metric("learner/grad_norm", "norm", "Norm of the gradient before clipping."),
    Metric("learner/lr", "1", "Learning rate at the end of the epoch."),
    Metric("learner/grad_scale", "1", "Loss scale at the end of the epoch; null without a gradient scaler."),
    Metric("learner/num_steps", "steps", "Optimizer steps since the run's start, without skipped ones."),
    Metric("learner/num_update_passes", "passes", "Passes over the epoch's rows; `target_kl` may have cut them."),
    Metric("learner/skipped_steps", "steps", "Optimizer steps skipped: a loss or gradient was not finite."),
    Metric("learner/policy_version", "versions", "Version of the policy that the epoch's update made."),
    Metric("time/epoch_s", "s", "From the end of the epoch before to the end of this one."),
    Metric("time/sample_s", "s", "From the epoch's first grant to its seal."),
    Metric("time/prepare_s", "s", "Postprocessing, the value pass and building the dataset."),
    Metric("time/learn_s", "s", "The update, its yielding to acting included."),
    Metric("time/checkpoint_s", "s", "Copying the state for a checkpoint; null where the epoch had none."),
    Metric("system/cpu_percent", "%", "Processor time of the trainer's process; 100 is one core."),
    Metric("system/memory_percent", "%", "Share of the machine's memory that the process holds resident."),
    Metric("system/rss_bytes", "bytes", "Resident memory of the process."),
    Metric("system/vms_bytes", "bytes", "Virtual memory of the process."),
    Metric("system/num_children", "processes", "Descendants of the process, environment workers among them."),
    Metric("system/children_cpu_percent_sum", "%", "Processor time of the descendants, added up."),
    Metric("system/children_cpu_percent_mean", "%", "The same, per descendant."),
    Metric("system/children_memory_percent_sum", "%", "Their shares of the machine's memory, added up."),
    Metric("system/children_memory_percent_mean", "%", "The same, per descendant."),
    Metric("system/children_rss_bytes_sum", "bytes", "Resident memory of the descendants, added up."),
    Metric("system/children_rss_bytes_mean", "bytes", "The same, per descendant."),
    Metric("system/children_vms_bytes_sum", "bytes", "Virtual memory of the descendants, added up."),
    Metric("system/children_vms_bytes_mean", "bytes", "The same, per descendant."),
    Metric("system/gpu<i>_memory_share", "share", "Share of the device's memory in use by anybody."),
    Metric("system/gpu<i>_utilisation_percent", "%", "Share of the last sample period in which a kernel ran."),
    Metric("system/gpu<i>_temperature_c", "°C", "Temperature of the chip."),
    Metric("system/gpu<i>_power_w", "W", "Power drawn."),
)
