"""The update: one sealed epoch in, better weights and their figures out.

    sealed epoch ──gather──► trajectories ──values──► task's postprocessing ──► dataset ──minibatches──► optimizer steps

| loop      | consumes         | waits for                                         | ends when                               |
|-----------|------------------|---------------------------------------------------|-----------------------------------------|
| an update | one sealed epoch | computations, hooks, acting to be quiet           | every pass is done, or the task says so |

An update is always M = max(1, round(num_epoch_samples / minibatch_size)) minibatches of nearly equal size per pass,
padded to one static number of rows with weight 0.

Dimensions: B rows of the epoch, R static rows of a minibatch.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aiorl.compute.gradients import clip_by_norm, total_norm
from aiorl.errors import NaNError, NonFiniteError
from aiorl.learning.dataset import prepare
from aiorl.learning.optim import SampleSchedule
from aiorl.monitoring.metrics import WeightedMeans

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from torch import Tensor
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from aiorl.compute.device import Placement
    from aiorl.learning.config import ReinforcementLearningTrainerConfig
    from aiorl.models.base import Model
    from aiorl.sampling.pages import PagePool
    from aiorl.sampling.trajectory import SealedEpoch
    from aiorl.tasks.base import Hooks, ReinforcementLearningTask, State

logger = logging.getLogger(__name__)

_QUIET_TURNS = 8
_MAX_NAMES = 5


@dataclass(slots=True)
class Update:
    """What an update did.

    Attributes:
        num_rows: B.
        num_trajectories: Trajectories among them.
        metrics: ``learner/...``, means over the update.
        lag_mean: Mean policy lag of the rows, in versions.
        lag_max: Largest policy lag of a row.
        prepare_s: Seconds from the sealed epoch to the dataset.
        learn_s: Seconds of minibatches.
        complete: False where it was told to stop before its end.
    """

    num_rows: int
    num_trajectories: int
    metrics: dict[str, float]
    lag_mean: float
    lag_max: int
    prepare_s: float
    learn_s: float
    complete: bool


@dataclass(slots=True)
class _Step:
    """A minibatch on its way through the train step."""

    dataset: dict[str, Tensor]
    rows: NDArray[np.int64]
    batch: dict[str, Tensor] = field(default_factory=dict)
    output: Any = None
    losses: dict[str, Tensor] = field(default_factory=dict)


class _Figures:
    """What the minibatches of a pass logged, reduced all at once at its end."""

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}
        self._rows: dict[str, list[int]] = {}

    def add(self, logged: Mapping[str, Tensor | float], num_rows: int) -> None:
        """Adds a minibatch of `num_rows` rows that count."""
        for name, value in logged.items():
            self._values.setdefault(name, []).append(_scalar(value, num_rows))
            self._rows.setdefault(name, []).append(num_rows)

    def add_to(self, means: WeightedMeans) -> dict[str, float]:
        """Adds the pass's mean of each figure to `means`, and returns them."""
        within = WeightedMeans()
        for name, values in self._values.items():
            rows = np.array(self._rows[name], np.float64)
            total = float(rows.sum())
            tensors = [value for value in values if isinstance(value, torch.Tensor)]
            if tensors:
                device = tensors[0].device
                stacked = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])
                mean: Any = stacked @ torch.as_tensor(rows / total, dtype=torch.float32, device=device)
            else:
                mean = float(np.average(values, weights=rows))
            for sums in (within, means):
                sums.add(name, mean, total)
        return within.compute()


class Learner:
    """Learns from sealed epochs.

    Args:
        model: What learns; its parameters are on `device`.
        task: Says what the loss is.
        optimizer: Over the model's parameters.
        scheduler: Of its learning rate.
        config: ``[trainer]``.
        state: Counters; the learner keeps those of steps.
        hooks: Called around steps.
        placement: Where computations run.
        device: Where the model is.
        max_overshoot: Rows by which an epoch may exceed ``num_epoch_samples``.
        quiet: Whether nothing waits to be acted on, or nothing would go on meanwhile if it were.
    """

    def __init__(
        self,
        *,
        model: Model,
        task: ReinforcementLearningTask,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        config: ReinforcementLearningTrainerConfig,
        state: State,
        hooks: Hooks,
        placement: Placement,
        device: torch.device,
        max_overshoot: int,
        quiet: Callable[[], bool],
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self._task = task
        self._config = config
        self._state = state
        self._hooks = hooks
        self._placement = placement
        self._device = device
        self._quiet = quiet
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        size = config.sampling.num_epoch_samples
        self._num_minibatches = max(1, round(size / (task.minibatch_size or size)))
        self._static_rows = math.ceil((size + max_overshoot) / self._num_minibatches)
        self._positions = torch.arange(self._static_rows, device=device)
        self._num_skipped_in_a_row = 0
        self._num_skipped = 0
        self._norms: list[Tensor] = []
        self._stopping = False

    def stop(self) -> None:
        """Ends the update that is under way after its current minibatch."""
        self._stopping = True

    def reconfigure(self, config: ReinforcementLearningTrainerConfig) -> None:
        """Goes by `config` from the next minibatch on."""
        self._config = config
        if isinstance(self.scheduler, SampleSchedule):
            self.scheduler.total_samples = config.total_samples or self.scheduler.total_samples

    async def learn(self, sealed: SealedEpoch, pool: PagePool) -> Update:
        """Learns from an epoch and gives its pages back.

        Cancelling waits for the computation that is under way, and leaves the weights between two optimizer steps.

        Raises:
            NonFiniteError: Too many steps in a row were not finite.
            NaNError: A parameter is not finite.
        """
        state, task = self._state, self._task
        started = time.perf_counter()
        try:
            lagging = self._config.sampling.max_policy_lag > 0
            batch, dataset = await self._placement.call(
                prepare, sealed, self.model, task, self._device, lagging=lagging
            )
        finally:
            sealed.release(pool)
        state.num_epoch_samples = len(batch)
        means = WeightedMeans()
        for name, value in task.take_logged().items():
            means.add(name, _scalar(value))
        lags = state.policy_version - batch.versions
        prepared = time.perf_counter()
        num_passes = 0
        self._norms.clear()
        self._num_skipped = 0
        state.num_epoch_steps = 0  # a checkpoint has those of the epoch that it was cut after
        self._step_schedule(per_epoch=True)
        for _ in range(task.num_update_epochs):
            figures = await self._pass(dataset, len(batch), num_passes, means)
            num_passes += 1
            if self._stopping or task.update_is_over(state, figures):
                break
        await self._placement.call(self._check_parameters)
        metrics = {f"learner/{name}": value for name, value in means.compute().items()}
        if self._norms:
            metrics["learner/grad_norm"] = float(torch.stack(self._norms).mean())
        metrics["learner/lr"] = float(self.optimizer.param_groups[0]["lr"])
        metrics["learner/num_steps"] = state.num_steps
        metrics["learner/num_update_passes"] = num_passes
        metrics["learner/skipped_steps"] = self._num_skipped
        return Update(
            len(batch),
            len(batch.starts),
            metrics,
            float(lags.mean()),
            int(lags.max()),
            prepared - started,
            time.perf_counter() - prepared,
            complete=not self._stopping,
        )

    # ------------------------------------------------------------------ minibatches
    async def _pass(
        self, dataset: dict[str, Tensor], num_rows: int, number: int, means: WeightedMeans
    ) -> Mapping[str, float]:
        """One pass over the dataset. Returns the means of what was logged during it."""
        state, hooks = self._state, self._hooks
        figures = _Figures()
        order = np.random.default_rng([self._config.seed, state.num_epochs, number]).permutation(num_rows)
        for rows in np.array_split(order, self._num_minibatches):
            if not len(rows):
                continue
            if self._stopping:
                break
            if hooks.overridden("on_step_start"):
                await hooks.call("on_step_start", state)
            losses, logged = await self._train_step(dataset, rows)
            figures.add({**logged, "loss": losses}, len(rows))
            if hooks.overridden("on_step_end"):
                await hooks.call("on_step_end", state)
            await self._yield_to_acting()
        return figures.add_to(means)

    def _minibatch(self, dataset: dict[str, Tensor], rows: NDArray[np.int64]) -> dict[str, Tensor]:
        """R rows: those asked for with weight 1, then repetitions with weight 0."""
        size = max(self._static_rows, len(rows))
        index = torch.as_tensor(np.resize(rows, size), device=self._device)
        batch = {name: values.index_select(0, index) for name, values in dataset.items()}
        if size > len(self._positions):
            self._positions = torch.arange(size, device=self._device)
        batch["weights"] = (self._positions[:size] < len(rows)).float()
        return batch

    async def _train_step(
        self, dataset: dict[str, Tensor], rows: NDArray[np.int64]
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Forward, loss, backward, step. Returns the loss, and what the task logged."""
        call, hooks, state = self._placement.call, self._hooks, self._state
        step = _Step(dataset, rows)
        if any(
            hooks.overridden(name)
            for name in ("on_before_forward_step", "on_after_forward_step", "on_after_compute_loss")
        ):
            await hooks.call("on_before_forward_step", state)
            await call(self._forward, step)
            await hooks.call("on_after_forward_step", state)
            await call(self._losses, step)
            await hooks.call("on_after_compute_loss", state)
            loss = await call(self._backward, step)
        else:
            loss = await call(self._minibatch_step, step)
        return loss, self._task.take_logged()

    def _minibatch_step(self, step: _Step) -> Tensor:
        self._forward(step)
        self._losses(step)
        return self._backward(step)

    def _forward(self, step: _Step) -> None:
        step.batch = self._minibatch(step.dataset, step.rows)
        step.output = self._task.run_model(self.model, step.batch, self._state)

    def _losses(self, step: _Step) -> None:
        losses = self._task.compute_loss(self.model, step.batch, self._state, step.output)
        named = losses if isinstance(losses, dict) else {"loss": losses}
        weights = step.batch["weights"]
        step.losses = {
            name: loss if loss.ndim == 0 else (loss * weights).sum() / weights.sum() for name, loss in named.items()
        }

    def _backward(self, step: _Step) -> Tensor:
        """Backward, clipping, and the optimizer's step unless something is not finite."""
        loss = functools.reduce(torch.add, step.losses.values())
        self.optimizer.zero_grad(set_to_none=self._config.set_to_none)
        loss.backward()  # type: ignore[no-untyped-call] # torch has no annotation for it
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = total_norm(gradients, self._config.clip_grad_norm_type)
        state = self._state
        if math.isfinite(norm) and math.isfinite(loss.detach()):
            clip_by_norm(gradients, self._config.clip_grad_norm, float(norm))
            self.optimizer.step()
            self._step_schedule(per_epoch=False)
            self._num_skipped_in_a_row = 0
            self._norms.append(norm)
            state.num_steps += 1
            state.num_epoch_steps += 1
        else:
            self._skip(step.losses)
        return loss.detach()

    def _skip(self, losses: dict[str, Tensor]) -> None:
        """Leaves a step out, names what was not finite, and gives up when that goes on."""
        names = [f"the loss {name!r}" for name, loss in losses.items() if not bool(torch.isfinite(loss))]
        names += [
            f"the gradient of {name}"
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
        ]
        what = ", ".join(names[:_MAX_NAMES]) + (
            f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        )
        self._num_skipped += 1
        self._num_skipped_in_a_row += 1
        logger.warning("optimizer step skipped, not finite: %s", what or "the gradient's norm")
        if self._num_skipped_in_a_row > self._config.max_consecutive_skips:
            self._check_parameters()
            raise NonFiniteError(
                f"{self._num_skipped_in_a_row} optimizer steps in a row were not finite (max_consecutive_skips = "
                f"{self._config.max_consecutive_skips}); the last: {what or 'the norm of the gradient'}"
            )

    def _check_parameters(self) -> None:
        """Raises `NaNError` where a parameter is not finite."""
        if bool(torch.isfinite(torch.stack([parameter.detach().sum() for parameter in self._parameters])).all()):
            return
        names = [name for name, value in self.model.named_parameters() if not bool(torch.isfinite(value).all())]
        if names:
            raise NaNError(names[:_MAX_NAMES])

    def _step_schedule(self, *, per_epoch: bool) -> None:
        """Moves the learning rate: schedules over samples once an epoch, before its first step, others after each step."""
        if isinstance(self.scheduler, SampleSchedule):
            if per_epoch:
                self.scheduler.num_samples = self._state.num_samples
                self.scheduler.step()
        elif not per_epoch:
            self.scheduler.step()

    # ------------------------------------------------------------------ giving way
    async def _yield_to_acting(self) -> None:
        """Lets the loop turn until nothing waits to be acted on; at most 8 turns."""
        for _ in range(_QUIET_TURNS):
            await asyncio.sleep(0)
            if self._quiet():
                return


def _scalar(value: Tensor | float, rows: int | None = None) -> Any:
    """A logged figure as a scalar; of one number per row, the mean over the first `rows`, which are those that count."""
    if isinstance(value, float | int) or value.ndim == 0:
        return value
    return value[:rows].float().mean()
