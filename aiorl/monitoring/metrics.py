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

from aiorl.monitoring.catalogue import GROUPS, METRICS, Metric

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


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
