from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LambdaLR, LRScheduler, SequentialLR

from aiorl.errors import ConfigError
from aiorl.learning.config import LRSchedulerConfig, OptimizerConfig
from aiorl.learning.optim import SampleSchedule, build_lr_scheduler, build_optimizer, set_learning_rate

if TYPE_CHECKING:
    from collections.abc import Callable


def sgd(lr: float = 2.0) -> SGD:
    return SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def rate(optimizer: Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def rate_at(scheduler: LRScheduler, num_samples: int) -> float:
    assert isinstance(scheduler, SampleSchedule)
    scheduler.num_samples = num_samples
    scheduler.step()
    return rate(scheduler.optimizer)


def schedule(total_samples: int | None, optimizer: Optimizer | None = None, **table: Any) -> SampleSchedule:
    scheduler = build_lr_scheduler(LRSchedulerConfig(**table), total_samples)(optimizer or sgd())
    assert isinstance(scheduler, SampleSchedule)
    return scheduler


def test_adam_takes_the_table() -> None:
    config = OptimizerConfig(lr=0.25, eps=0.5, betas=(0.5, 0.75))
    optimizer = build_optimizer(config)(nn.Linear(3, 2).parameters())
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert (group["lr"], group["eps"], group["betas"], group["weight_decay"]) == (0.25, 0.5, (0.5, 0.75), 0.0)


def test_the_first_step_of_adam_by_hand() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = build_optimizer(OptimizerConfig(lr=0.1, eps=1.0, betas=(0.9, 0.999)))([parameter])
    parameter.grad = torch.tensor([3.0, -1.0])
    optimizer.step()
    # after its bias corrections the first step is lr * g / (|g| + eps)
    assert parameter.tolist() == pytest.approx([1.0 - 0.1 * 3 / 4, 1.0 + 0.1 * 1 / 2])


def test_biases_and_norms_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.01))(model.parameters())
    decay_of = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert {name: decay_of[parameter] for name, parameter in model.named_parameters()} == {
        "0.weight": 0.01, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.weight": 0.01, "2.bias": 0.0,
    }  # fmt: skip


def test_the_first_optimizer_step_takes_the_rate_at_no_samples() -> None:
    assert rate(schedule(100, name="linear").optimizer) == 2.0
    assert rate(schedule(100, name="linear", warmup_samples=10).optimizer) == pytest.approx(0.2)
    assert rate(schedule(None).optimizer) == 2.0


def test_linear_by_hand() -> None:
    scheduler = schedule(100, name="linear", min_scale=0.5)
    rates = [rate_at(scheduler, num_samples) for num_samples in (0, 25, 50, 100, 101, 1_000_000)]
    assert rates == pytest.approx([2.0, 1.75, 1.5, 1.0, 1.0, 1.0])


def test_linear_to_nothing() -> None:
    scheduler = schedule(100, name="linear")
    assert [rate_at(scheduler, num_samples) for num_samples in (75, 100, 200)] == pytest.approx([0.5, 0.0, 0.0])


def test_cosine_by_hand() -> None:
    scheduler = schedule(100, name="cosine", min_scale=0.2)
    expected = [2 * (0.2 + 0.8 * 0.5 * (1 + cosine)) for cosine in (1, math.sqrt(0.5), 0, -1, -1)]
    assert [rate_at(scheduler, num_samples) for num_samples in (0, 25, 50, 100, 150)] == pytest.approx(expected)


def test_the_warm_up_rises_to_the_base_rate_and_the_fall_starts_there() -> None:
    scheduler = schedule(110, name="linear", warmup_samples=10)
    rates = [rate_at(scheduler, num_samples) for num_samples in (0, 1, 5, 10, 60, 110)]
    assert rates == pytest.approx([0.2, 0.2, 1.0, 2.0, 1.0, 0.0])


def test_constant_with_a_warm_up_needs_no_end() -> None:
    scheduler = schedule(None, name="constant", warmup_samples=4, min_scale=0.1)
    assert [rate_at(scheduler, num_samples) for num_samples in (2, 4, 10**9)] == pytest.approx([1.0, 2.0, 2.0])


def test_steps_between_two_counts_of_samples_keep_the_rate() -> None:
    scheduler = schedule(100, name="linear")
    assert [rate_at(scheduler, 50) for _ in range(3)] == pytest.approx([1.0] * 3)
    assert scheduler.get_last_lr() == pytest.approx([1.0])


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_fall_without_an_end_is_a_fault(name: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        build_lr_scheduler(LRSchedulerConfig(name=name), None)
    (fault,) = caught.value.faults
    assert fault.path == "trainer.max_samples"
    assert name in fault.message
    with pytest.raises(ValueError, match="needs total_samples"):
        SampleSchedule(sgd(), name)


def test_a_warm_up_without_an_end_to_fall_to_is_a_fault() -> None:
    with pytest.raises(ConfigError) as caught:
        build_lr_scheduler(LRSchedulerConfig(name="linear", warmup_samples=100), 100)
    assert [fault.path for fault in caught.value.faults] == ["lr_scheduler.warmup_samples"]


def resumed(
    optimizer: Optimizer, scheduler: SampleSchedule, lr: float = 2.0, total_samples: int = 100
) -> SampleSchedule:
    """Both as another process would find them in a checkpoint that cannot run code."""
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = sgd(lr)
    fresh_scheduler = schedule(total_samples, fresh, name="linear")
    fresh.load_state_dict(saved["optimizer"])
    fresh_scheduler.load_state_dict(saved["scheduler"])
    return fresh_scheduler


def test_a_resumed_schedule_goes_on() -> None:
    optimizer = sgd()
    scheduler = schedule(100, optimizer, name="linear")
    rate_at(scheduler, 25)
    again = resumed(optimizer, scheduler)
    assert again.num_samples == 25
    assert rate(again.optimizer) == pytest.approx(1.5)
    assert rate_at(again, 50) == pytest.approx(1.0)


def test_a_resumed_schedule_follows_a_new_end() -> None:
    optimizer = sgd()
    scheduler = schedule(100, optimizer, name="linear")
    rate_at(scheduler, 50)
    assert rate(resumed(optimizer, scheduler, total_samples=200).optimizer) == pytest.approx(1.5)


def test_a_rate_set_by_hand_outlives_a_resumption_but_not_a_newly_configured_one() -> None:
    optimizer = sgd()
    scheduler = schedule(100, optimizer, name="linear")
    set_learning_rate(optimizer, scheduler, 8.0)
    rate_at(scheduler, 50)
    assert rate(resumed(optimizer, scheduler).optimizer) == pytest.approx(4.0)
    assert rate(resumed(optimizer, scheduler, lr=6.0).optimizer) == pytest.approx(3.0)


def test_set_learning_rate_moves_the_whole_schedule() -> None:
    optimizer = SGD([{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))]}], lr=2.0)
    scheduler = schedule(100, optimizer, name="linear")
    rate_at(scheduler, 50)
    set_learning_rate(optimizer, scheduler, 4.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2.0, 2.0])
    assert rate_at(scheduler, 75) == pytest.approx(1.0)


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")
@pytest.mark.parametrize(
    "build",
    [
        lambda optimizer: ExponentialLR(optimizer, gamma=0.5),
        lambda optimizer: LambdaLR(optimizer, lambda step: 0.5**step),
        lambda optimizer: SequentialLR(
            optimizer, [ConstantLR(optimizer, 0.5, 9), ExponentialLR(optimizer, gamma=0.5)], [9]
        ),
    ],
    ids=["of the last rate", "of the base rate", "of several"],
)
def test_set_learning_rate_with_a_scheduler_of_torchs(build: Callable[[Optimizer], LRScheduler]) -> None:
    optimizer, untouched = sgd(lr=2.0), sgd(lr=6.0)
    scheduler, reference = build(optimizer), build(untouched)
    for step in range(15):
        if step == 3:
            set_learning_rate(optimizer, scheduler, 6.0)
        if step >= 3:
            assert rate(optimizer) == pytest.approx(rate(untouched))
        scheduler.step()
        reference.step()


@pytest.mark.parametrize("lr", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_that_is_none_is_refused(lr: float) -> None:
    optimizer = sgd()
    scheduler = schedule(None, optimizer)
    with pytest.raises(ValueError, match="finite number above 0"):
        set_learning_rate(optimizer, scheduler, lr)
    assert rate(optimizer) == 2.0


def test_a_rate_held_in_a_tensor_is_changed_in_place() -> None:
    held = torch.tensor(2.0)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=held, foreach=False, capturable=True)
    scheduler = schedule(100, optimizer, name="linear")
    held = optimizer.param_groups[0]["lr"]
    scheduler.num_samples = 50
    scheduler.step()
    set_learning_rate(optimizer, scheduler, 6.0)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == pytest.approx(3.0)
