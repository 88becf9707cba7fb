"""Optimizers and learning-rate schedules: factories, since a wrapped or sharded model must exist before its optimizer.

How the learner drives a schedule: after each optimizer step that was taken, and after none that was skipped, it calls
``scheduler.step()``. A `SampleSchedule`, which all built-in schedules are, is a function of the environment
transitions taken instead of a count of steps: the learner sets its ``num_samples`` and steps it once an epoch, before
the epoch's first optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from aiorl.errors import ConfigError, Fault

if TYPE_CHECKING:
    from aiorl.learning.config import LRSchedulerConfig, OptimizerConfig

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
LRSchedulerFactory: TypeAlias = Callable[[Optimizer], LRScheduler]
ScheduleName: TypeAlias = Literal["constant", "linear", "cosine"]

_SETTINGS = frozenset({"optimizer", "name", "total_samples", "warmup_samples", "min_scale"})


def build_optimizer(config: OptimizerConfig) -> OptimizerFactory:
    """The factory of the optimizer that ``[optimizer]`` names.

    Weight decay is Adam's L2 penalty (added to the gradient), and takes only parameters of two dimensions or more: not
    biases, and not the scales and shifts of normalisation layers.

    Args:
        config: The ``[optimizer]`` table.

    Returns:
        ``(params) -> Optimizer``. The first optimizer that a process builds imports ``torch._dynamo``, which takes a
        second or two.
    """

    def factory(params: Iterable[nn.Parameter]) -> Optimizer:
        parameters = list(params)
        groups: list[dict[str, Any]] = [{"params": parameters}]
        if config.weight_decay > 0.0:
            decayed = [parameter for parameter in parameters if parameter.ndim >= 2]
            others = [parameter for parameter in parameters if parameter.ndim < 2]
            groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        # One kernel over all parameters: for two 64-64 networks on a CPU a step takes 0.07 ms instead of 0.29.
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
        return Adam(
            groups,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=fused or None,
        )

    return factory


def build_lr_scheduler(config: LRSchedulerConfig, total_samples: int | None) -> LRSchedulerFactory:
    """The factory of the schedule that ``[lr_scheduler]`` names.

    Args:
        config: The ``[lr_scheduler]`` table.
        total_samples: Environment transitions by which the run ends; None where it is not known beforehand.

    Returns:
        ``(optimizer) -> LRScheduler``, a `SampleSchedule`.

    Raises:
        ConfigError: The schedule falls towards an end that is not known, or the warm-up lasts beyond it.
    """
    if config.name != "constant":
        if total_samples is None:
            message = f'is needed by the learning-rate schedule "{config.name}", which falls until the end of the run'
            raise ConfigError([Fault("trainer.max_samples", message, '"none"', 'set it, or use "constant"')])
        if config.warmup_samples >= total_samples:
            message = f"leaves nothing of the run's {total_samples} samples for the learning rate to fall in"
            raise ConfigError([Fault("lr_scheduler.warmup_samples", message, str(config.warmup_samples), "lower it")])

    def factory(optimizer: Optimizer) -> LRScheduler:
        return SampleSchedule(
            optimizer,
            config.name,
            total_samples=total_samples,
            warmup_samples=config.warmup_samples,
            min_scale=config.min_scale,
        )

    return factory


class SampleSchedule(LRScheduler):
    """Learning rates as a function of the environment transitions taken: ``base rate * scale(num_samples)``.

    The scale rises during the warm-up, linearly from ``1 / warmup_samples`` to 1, then falls from 1 to ``min_scale`` at
    ``total_samples``, in a straight line ("linear") or as half a cosine ("cosine"), and stays there; or it stays 1
    ("constant"). Constructing the schedule sets the rates to those at 0 samples, which the first optimizer step takes.

    Its state holds what changes during a run, not the settings, so that a run resumed with, say, another end follows
    the new schedule. A base rate changed by `set_learning_rate` outlives a resumption, unless the configured rate
    itself is another one then.

    Attributes:
        num_samples: Environment transitions taken; set by the learner before `step`.
        total_samples: Where the fall ends.
        warmup_samples: How long the rise lasts.
        min_scale: The scale from ``total_samples`` on.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        name: ScheduleName = "constant",
        *,
        total_samples: int | None = None,
        warmup_samples: int = 0,
        min_scale: float = 0.0,
    ) -> None:
        """Sets the optimizer's rates to those at 0 samples.

        Args:
            optimizer: The optimizer, its groups' ``lr`` being the base rates.
            name: The shape of the fall.
            total_samples: Where the fall ends, above ``warmup_samples``; None only for "constant".
            warmup_samples: How long the rise lasts; 0 is none.
            min_scale: The scale at the end of the fall.

        Raises:
            ValueError: The schedule falls and has no room to.
        """
        if name != "constant" and (total_samples is None or total_samples <= warmup_samples):
            raise ValueError(f"the schedule {name!r} needs total_samples above warmup_samples, not {total_samples}")
        self.name = name
        self.total_samples = total_samples
        self.warmup_samples = warmup_samples
        self.min_scale = min_scale
        self.num_samples = 0
        super().__init__(optimizer)
        self.configured_lrs = [float(rate) for rate in self.base_lrs]

    def scale(self, num_samples: int) -> float:
        """The factor on the base rates once so many environment transitions were taken."""
        if num_samples < self.warmup_samples:
            return max(num_samples, 1) / self.warmup_samples  # a rate of 0 would waste the first update
        if self.total_samples is None or self.name == "constant":
            return 1.0
        fallen = min(1.0, (num_samples - self.warmup_samples) / (self.total_samples - self.warmup_samples))
        left = 1.0 - fallen if self.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * fallen))
        return self.min_scale + (1.0 - self.min_scale) * left

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each parameter group at ``num_samples``."""
        return [rate * self.scale(self.num_samples) for rate in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Sets the optimizer's rates to those at ``num_samples``.

        Unlike its parent it may be called before any optimizer step without a warning: it counts no steps.

        Args:
            epoch: Not used; the signature is torch's.
        """
        self.last_epoch += 1
        self.apply()

    def apply(self) -> None:
        """Sets the optimizer's rates to those at ``num_samples``, without counting a step."""
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            _set_rate(group, "lr", rate)

    def state_dict(self) -> dict[str, Any]:
        """What changes during a run: plain numbers and lists of them."""
        return {key: value for key, value in super().state_dict().items() if key not in _SETTINGS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the state, then sets the optimizer's rates by it.

        Args:
            state_dict: What `state_dict` returned. Load the optimizer's own state first: it holds rates too.
        """
        configured, base = self.configured_lrs, self.base_lrs
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in _SETTINGS})
        if self.configured_lrs != configured:
            self.configured_lrs, self.base_lrs = configured, base
        for group, rate in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            _set_rate(group, "initial_lr", rate)
        self.apply()


def set_learning_rate(optimizer: Optimizer, scheduler: LRScheduler, lr: float) -> None:
    """Changes the base learning rate of a run that is going on; the schedule goes on from where it is.

    A `SampleSchedule` recomputes its rates; the rates of any other scheduler are scaled by the change of the base rate,
    which is right both for those that compute a rate from the base rate and for those that multiply the last rate. What
    a scheduler has copied elsewhere (``OneCycleLR``'s maximum) it keeps.

    Args:
        optimizer: The optimizer.
        scheduler: Its scheduler; those inside a ``SequentialLR`` or ``ChainedScheduler`` follow.
        lr: The new base rate of every parameter group, above 0.

    Raises:
        ValueError: ``lr`` is not a finite number above 0.
    """
    if not (math.isfinite(lr) and lr > 0.0):
        raise ValueError(f"the learning rate must be a finite number above 0, not {lr}")
    for group in optimizer.param_groups:
        base = float(group.get("initial_lr", group["lr"]))
        _set_rate(group, "lr", lr * float(group["lr"]) / base if base > 0.0 else lr)
        _set_rate(group, "initial_lr", lr)
    pending = [scheduler]
    while pending:
        current = pending.pop()
        if hasattr(current, "base_lrs"):
            current.base_lrs = [lr] * len(optimizer.param_groups)
        if isinstance(current, SampleSchedule):
            current.apply()
        pending.extend(getattr(current, "_schedulers", ()))


def _set_rate(group: dict[str, Any], key: str, rate: float | Tensor) -> None:
    """Sets a rate in place where it is a tensor, which a captured graph may be reading."""
    if isinstance(group.get(key), Tensor):
        group[key].fill_(rate)
    else:
        group[key] = rate
