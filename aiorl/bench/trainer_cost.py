"""What a tick of a group, and each row of it, costs the trainer: processor time, by a fit over group sizes.

Sampling alone, with costless environments placed as the configuration places its own, at several group sizes. The
processor time of this process, all threads together, is fitted as ``per_tick + per_row * K``. In process, the costless
environment's own step is part of it.

Machines differ, so a fixed piece of Python is timed beside it: in units of that, the figures of two machines, or of a
machine that is busy and one that is not, can be compared.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiorl.bench.costless import costless
from aiorl.environments.supervisor import open_workers
from aiorl.throughput import sampling_alone

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiorl.environments.config import EnvironmentConfig, LinkConfig
    from aiorl.environments.spaces import EnvironmentInfo
    from aiorl.learning.config import ReinforcementLearningTrainerConfig
    from aiorl.models.base import Model
    from aiorl.tasks.base import ReinforcementLearningTask
    from aiorl.throughput import SamplingAlone, Slice

GROUP_SIZES: Final = (1, 4, 16, 64)
_EPOCH_TICKS: Final = 128  # of each group: so each tick has the same share of an epoch's cost, whatever its rows
_WARM_UP_S: Final = 0.02
_REFERENCE_ITEMS: Final = 20_000


@dataclass(frozen=True, slots=True)
class TrainerCost:
    """The fit.

    Attributes:
        per_tick_us: Processor microseconds of the trainer for each tick of a group.
        per_row_us: For each environment in it.
        reference_us: Of the fixed piece of Python, the median.
        points: By group size, the median microseconds of a whole tick.
    """

    per_tick_us: float
    per_row_us: float
    reference_us: float
    points: dict[int, float]


class TrainerCosts:
    """Sampling alone at each group size; made by `trainer_costs`."""

    def __init__(self, by_size: dict[int, SamplingAlone]) -> None:
        self._by_size = by_size
        self._ticks_us: dict[int, list[float]] = {size: [] for size in by_size}
        self._reference_us: list[float] = []

    async def measure(self, duration_s: float) -> None:
        """A stretch of about `duration_s` seconds of each group size, and of the reference."""
        for size, alone in self._by_size.items():
            self._reference_us.append(reference_us())
            measured: Slice = await alone.measure(duration_s)
            if measured.num_ticks:
                self._ticks_us[size].append(1e6 * measured.cpu_s / measured.num_ticks)

    def fit(self) -> TrainerCost | None:
        """The least-squares fit over all that was measured; None where a group size never got going."""
        if not all(self._ticks_us.values()):
            return None
        rows = [(size, tick_us) for size, ticks_us in self._ticks_us.items() for tick_us in ticks_us]
        per_tick, per_row = fit_line(np.array([size for size, _ in rows]), np.array([tick_us for _, tick_us in rows]))
        points = {size: median(ticks_us) for size, ticks_us in self._ticks_us.items()}
        return TrainerCost(per_tick, per_row, median(self._reference_us), points)


def fit_line(x: Any, y: Any) -> tuple[float, float]:
    """``(a, b)``, neither below 0, of the line a + b·x with the least sum of squared errors relative to `y`.

    Relative, since large ticks scatter more; not below 0, since nothing costs less than that.
    """
    scale = 1.0 / y
    design = np.stack([scale, x * scale], axis=1)
    (a, b), *_ = np.linalg.lstsq(design, np.ones_like(scale), rcond=None)
    if a < 0 or b < 0:  # then the best is on the edge, with one of them 0
        column = scale if b < 0 else x * scale
        alone = float(column.sum() / (column @ column))
        return (alone, 0.0) if b < 0 else (0.0, alone)
    return float(a), float(b)


def reference_us() -> float:
    """Processor microseconds of a fixed piece of Python: calls, dictionary look-ups, additions."""
    table = dict.fromkeys(range(16), 1)
    get = table.get
    total = 0
    started = time.thread_time()
    for item in range(_REFERENCE_ITEMS):
        total += get(item & 15, 0)
    return 1e6 * (time.thread_time() - started)


@contextlib.asynccontextmanager
async def trainer_costs(
    info: EnvironmentInfo,
    model: Model,
    task: ReinforcementLearningTask,
    config: ReinforcementLearningTrainerConfig,
    environment: EnvironmentConfig,
    link: LinkConfig,
    *,
    device: Any,
) -> AsyncIterator[TrainerCosts]:
    """Opens sampling alone at each group size, one worker each, or none where the configuration has none."""
    num_workers = 0 if config.sampling.force_sync else min(1, environment.numbers()[0])
    num_groups = 2 if num_workers else 1
    async with contextlib.AsyncExitStack() as stack:
        by_size = {}
        for size in GROUP_SIZES:
            num_envs = size * num_groups
            placed = environment.model_copy(
                update={
                    "num_env_workers": num_workers,
                    "envs_per_worker": num_envs,
                    "groups_per_worker": num_groups,
                }
            )
            workers = await stack.enter_async_context(
                open_workers(costless(info), placed, link, env_seed=0, incarnation=0, force_sync=False)
            )
            sampling = config.sampling.model_copy(
                update={
                    "num_epoch_samples": _EPOCH_TICKS * num_envs,
                    "max_trajectory_length": None,
                    "min_trajectory_length": 1,
                    "min_batch_size": 1,
                    "max_batch_size": None,
                }
            )
            alone = await stack.enter_async_context(
                sampling_alone(workers, model, task, config.model_copy(update={"sampling": sampling}), device=device)
            )
            await alone.warm_up(_WARM_UP_S, num_ticks=_EPOCH_TICKS + 1)  # all pages exist by then
            by_size[size] = alone
        yield TrainerCosts(by_size)
