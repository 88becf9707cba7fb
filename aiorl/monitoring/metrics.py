"""What a run measures: the one table of metric names, the record of an epoch, and the accumulators that fill it.

A metric's name is ``group/name``. The groups are the stations of a run (`GROUPS`); the names are in the field's
words. Durations end in ``_s``, rates in ``_per_s``. ``episode/`` and ``learner/`` hold nothing that depends on a
clock, so that they can be compared between runs to the bit. A task may add metrics of its own under any name.

``docs/metrics.md`` is this table: ``python -m aiorl.monitoring.metrics > docs/metrics.md``.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import deque
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, SupportsFloat

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


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

_ALWAYS: Final = tuple(metric.name for metric in METRICS if not metric.per_device)
_BY_NAME: Final = {metric.name: metric for metric in METRICS}


def find_metric(name: str) -> Metric | None:
    """The table's entry for a metric, or None for a metric of the user's own."""
    return _BY_NAME.get(name) or _BY_NAME.get(re.sub(r"^(system/gpu)\d+_", r"\1<i>_", name))


def depends_on_clock(name: str) -> bool:
    """Whether a metric may differ between two runs that are equal to the bit: durations, rates, system figures."""
    return name.endswith("_s") or name.startswith("system/")


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """What is known of one complete epoch; one line of ``metrics.jsonl``.

    Attributes:
        epoch: Number of the epoch, from 1.
        num_samples: Environment transitions since the start of the run.
        time_s: Seconds of training since the start of the run, downtime left out.
        metrics: Every metric of the table that is not per device, then further ones; None for what is missing or not
            finite.
    """

    epoch: int
    num_samples: int
    time_s: float
    metrics: Mapping[str, float | None]

    @classmethod
    def make(cls, *, epoch: int, num_samples: int, time_s: float, metrics: Mapping[str, SupportsFloat | None]) -> Self:
        """Build a record of plain numbers: metrics in the table's order, then the others by name.

        Args:
            epoch: Number of the epoch.
            num_samples: Environment transitions since the start of the run.
            time_s: Seconds of training since the start of the run.
            metrics: What was measured, as anything that `float` takes; names may be missing, and others may be there.
        """
        names = [*_ALWAYS, *sorted(metrics.keys() - set(_ALWAYS))]
        plain = {name: _plain(metrics.get(name)) for name in names}
        return cls(epoch=epoch, num_samples=num_samples, time_s=time_s, metrics=plain)

    def to_json(self) -> str:
        """The record as one line of JSON, without the newline; floats read back to the same bits."""
        return json.dumps(
            {"epoch": self.epoch, "num_samples": self.num_samples, "time_s": self.time_s, "metrics": self.metrics},
            allow_nan=False,
            separators=(", ", ": "),
        )

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """Read a line back.

        Raises:
            ValueError: It is not a complete line of ``metrics.jsonl``.
        """
        fields = json.loads(line)
        try:
            return cls(
                epoch=int(fields["epoch"]),
                num_samples=int(fields["num_samples"]),
                time_s=float(fields["time_s"]),
                metrics=dict(fields["metrics"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a line of metrics.jsonl: {error}") from error


def _plain(value: SupportsFloat | None) -> float | None:
    if value is None:
        return None
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


class Summable(Protocol):
    """A number, or a scalar tensor that should stay on its device until the mean is asked for."""

    def __mul__(self, other: Any, /) -> Any:
        """The value times a weight."""
        ...

    def __float__(self) -> float:
        """The value on the host; a tensor waits for its device here."""
        ...


class WeightedMeans:
    """Means of named values, each with a weight; the learner's are the row counts of minibatches.

    Sums are kept in the type that was given: scalar tensors stay where they are, and only `compute` waits for them. A
    value that is not finite makes its mean not finite. Tensors must come detached.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, value: Summable, weight: float = 1.0) -> None:
        """Add one value; a weight of 0 adds nothing."""
        if weight == 0:
            return
        product = value * weight
        self._sums[name] = self._sums[name] + product if name in self._sums else product
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def compute(self) -> dict[str, float]:
        """The mean of every name that was added, in the order of their first values."""
        return {name: float(total) / self._weights[name] for name, total in self._sums.items()}

    def clear(self) -> None:
        """Forget everything."""
        self._sums.clear()
        self._weights.clear()


class EpisodeWindow:
    """Returns and lengths of the last 100 episodes, and the count of all."""

    SIZE: Final = 100

    def __init__(self) -> None:
        self._returns: deque[float] = deque(maxlen=self.SIZE)
        self._lengths: deque[int] = deque(maxlen=self.SIZE)
        self._num_episodes = 0

    @property
    def num_episodes(self) -> int:
        """Episodes that were added since the start of the run."""
        return self._num_episodes

    @property
    def is_full(self) -> bool:
        """Whether there were 100 episodes, as a target return wants before it counts as met."""
        return len(self._returns) == self.SIZE

    @property
    def return_mean(self) -> float:
        """Mean return of the window; nan before the first episode."""
        return math.fsum(self._returns) / len(self._returns) if self._returns else math.nan

    def add(self, episode_return: float, length: int) -> None:
        """Add an episode that ended, by its undiscounted return and its number of steps."""
        self._returns.append(float(episode_return))
        self._lengths.append(int(length))
        self._num_episodes += 1

    def metrics(self) -> dict[str, float | None]:
        """The ``episode/`` group."""
        figures: dict[str, float | None] = {metric.name: None for metric in METRICS if metric.group == "episode"}
        figures["episode/num_episodes"] = self._num_episodes
        if self._returns:
            mean, count = self.return_mean, len(self._returns)
            figures["episode/return_mean"] = mean
            figures["episode/return_std"] = math.sqrt(math.fsum((value - mean) ** 2 for value in self._returns) / count)
            figures["episode/return_min"] = min(self._returns)
            figures["episode/return_max"] = max(self._returns)
            figures["episode/length_mean"] = sum(self._lengths) / count
        return figures

    def state_dict(self) -> dict[str, Any]:
        """The window as plain lists and numbers, for a checkpoint."""
        return {"returns": list(self._returns), "lengths": list(self._lengths), "num_episodes": self._num_episodes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: There are not as many lengths as returns, or fewer episodes than the window holds.
        """
        returns: Sequence[float] = state["returns"]
        lengths: Sequence[int] = state["lengths"]
        num_episodes = int(state["num_episodes"])
        if len(returns) != len(lengths) or num_episodes < len(returns):
            raise ValueError(
                f"{len(returns)} returns, {len(lengths)} lengths and {num_episodes} episodes do not fit together"
            )
        self._returns = deque(map(float, returns), maxlen=self.SIZE)
        self._lengths = deque(map(int, lengths), maxlen=self.SIZE)
        self._num_episodes = num_episodes


def metrics_page() -> str:
    """The table as a page of Markdown: the whole of ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "`metrics.jsonl` holds one object for each complete epoch: `epoch` (from 1), `num_samples` (environment",
        "transitions since the start of the run), `time_s` (seconds of training, downtime left out) and `metrics`,",
        "a flat object of the names below. TensorBoard shows the same names over `num_samples`. What is missing or",
        "not finite is `null`. Durations end in `_s`, rates in `_per_s`; `episode/` and `learner/` hold nothing that",
        "depends on a clock. A task may add metrics of its own under any name. `<i>` is the number of a device, as",
        "CUDA counts the visible ones.",
        "",
        "| name | unit | meaning |",
        "|---|---|---|",
    ]
    for group, meaning in GROUPS.items():
        lines.append(f"| **`{group}/`** | | {meaning} |")
        lines.extend(f"| `{m.name}` | {m.unit} | {_cell(m.meaning)} |" for m in METRICS if m.group == group)
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<i>", "`<i>`")


if __name__ == "__main__":
    sys.stdout.write(metrics_page())
