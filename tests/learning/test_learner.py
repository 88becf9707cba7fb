"""An update: how it walks its rows, what it leaves out, what it logs, and what ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LRScheduler

from aiorl.compute.device import Placement, TorchSettings
from aiorl.errors import NaNError, NonFiniteError
from aiorl.learning.config import ReinforcementLearningTrainerConfig
from aiorl.learning.learner import Learner, Update
from aiorl.learning.optim import SampleSchedule
from aiorl.sampling.config import SamplingConfig
from aiorl.tasks.base import Callback, Hooks, ReinforcementLearningTask, State
from aiorl.tasks.config import PPOConfig
from aiorl.tasks.ppo import PPO
from tests.learning.epochs import Line, pool_of, sealed_epoch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from aiorl.sampling.pages import PagePool
    from aiorl.sampling.trajectory import TrajectoryBatch

pytestmark = pytest.mark.anyio

PATIENCE_S = 10.0
NUM_ROWS = 10
PLAIN = partial(SGD, lr=0.01)
CONSTANT = partial(ConstantLR, factor=1.0)


@dataclass
class Minibatch:
    """What a task was given: the tick of each row, and its weight."""

    ticks: list[int]
    weights: list[float]

    @property
    def real(self) -> list[int]:
        return [tick for tick, weight in zip(self.ticks, self.weights, strict=True) if weight]


class Squares(ReinforcementLearningTask):
    """Pulls the value of every row towards its reward, which is a tenth of its tick."""

    def __init__(self, *, minibatch_size: int | None = None, passes: int = 1) -> None:
        super().__init__()
        self.minibatch_size = minibatch_size
        self.num_update_epochs = passes
        self.minibatches: list[Minibatch] = []
        self.passes: list[Mapping[str, float]] = []

    def build_rl_dataset(self, batch: TrajectoryBatch) -> dict[str, NDArray[Any]]:
        self.log("rows_of_the_epoch", len(batch))
        return {**super().build_rl_dataset(batch), "rewards": batch.rewards}

    def compute_loss(
        self, model: Any, batch: dict[str, Tensor], state: State, output: Any
    ) -> Tensor | dict[str, Tensor]:
        ticks = batch["observations"][:, 0]
        self.log("number", float(len(self.minibatches)))
        self.log("whole", torch.tensor(len(self.minibatches)))
        self.log("of_either_kind", torch.tensor(2.0) if len(self.minibatches) % 2 else 2.0)
        self.log("tick", ticks)
        self.minibatches.append(Minibatch([round(tick) for tick in ticks.tolist()], batch["weights"].tolist()))
        values: Tensor = output[1]
        return (values - batch["rewards"]).square()

    def update_is_over(self, state: State, metrics: Mapping[str, float]) -> bool:
        self.passes.append(metrics)
        return False


@dataclass
class Bench:
    """A learner with everything that it needs."""

    learner: Learner
    model: Line
    optimizer: Optimizer
    state: State
    pool: PagePool = field(default_factory=pool_of)

    async def learn(self, num_rows: int = NUM_ROWS, *, version: int = 0) -> Update:
        return await self.learner.learn(sealed_epoch(self.pool, num_rows, version=version), self.pool)

    @property
    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def contents(self) -> list[Tensor]:
        """Copies of weights and of what the optimizer remembers."""
        remembered = [value for state in self.optimizer.state.values() for value in state.values()]
        return [tensor.detach().clone() for tensor in (*self.model.state_dict().values(), *remembered)]


@contextlib.asynccontextmanager
async def opened(
    task: ReinforcementLearningTask,
    *,
    callbacks: Iterable[Callback] = (),
    optimizer: Callable[[Any], Optimizer] = PLAIN,
    scheduler: Callable[[Optimizer], LRScheduler] = CONSTANT,
    max_overshoot: int = 0,
    num_epoch_samples: int = NUM_ROWS,
    max_policy_lag: int = 0,
    quiet: Callable[[], bool] = lambda: True,
    **trainer: Any,
) -> AsyncIterator[Bench]:
    model, state = Line(), State()
    built = optimizer(model.parameters())
    sampling = SamplingConfig(num_epoch_samples=num_epoch_samples, max_policy_lag=max_policy_lag)
    async with Placement("test", TorchSettings(num_threads=1)) as place:
        learner = Learner(
            model=model,
            task=task,
            optimizer=built,
            scheduler=scheduler(built),
            config=ReinforcementLearningTrainerConfig(sampling=sampling, **trainer),
            state=state,
            hooks=Hooks(task, callbacks),
            placement=place,
            device=torch.device("cpu"),
            max_overshoot=max_overshoot,
            quiet=quiet,
        )
        yield Bench(learner, model, built, state)


# ---------------------------------------------------------------------- minibatches
@pytest.mark.parametrize(
    ("minibatch_size", "num_rows", "overshoot", "sizes", "static"),
    [
        (None, 10, 0, [10], 10),
        (100, 10, 0, [10], 10),
        (5, 10, 0, [5, 5], 5),
        (3, 10, 0, [4, 3, 3], 4),
        (3, 12, 3, [4, 4, 4], 5),  # two rows more than were asked for, of three that may be
        (1, 10, 3, [1] * 10, 2),
        (4, 3, 0, [2, 1], 5),  # an epoch that its task ended early; round(10 / 4) is 2
        (1, 4, 0, [1] * 4, 1),  # fewer rows than minibatches
    ],
)
async def test_a_pass_takes_each_row_once(
    minibatch_size: int | None, num_rows: int, overshoot: int, sizes: list[int], static: int
) -> None:
    task = Squares(minibatch_size=minibatch_size, passes=2)
    async with opened(task, max_overshoot=overshoot) as bench:
        update = await bench.learn(num_rows)
    assert [len(batch.real) for batch in task.minibatches] == sizes * 2
    for taken in (task.minibatches[: len(sizes)], task.minibatches[len(sizes) :]):
        assert sorted(tick for batch in taken for tick in batch.real) == list(range(num_rows))
    for batch in task.minibatches:
        assert len(batch.ticks) == static
        assert set(batch.weights) <= {0.0, 1.0}
        assert set(batch.ticks) == set(batch.real)  # what pads repeats real rows
    assert bench.state.num_steps == bench.state.num_epoch_steps == 2 * len(sizes)
    assert bench.state.num_epoch_samples == update.num_rows == num_rows
    assert update.complete


async def orders(seed: int) -> list[list[int]]:
    """The order of rows in each of two passes over each of two epochs."""
    task = Squares(minibatch_size=3, passes=2)
    async with opened(task, seed=seed) as bench:
        await bench.learn()
        bench.state.num_epochs = 1
        await bench.learn()
    return [[tick for batch in task.minibatches[at : at + 3] for tick in batch.real] for at in range(0, 12, 3)]


async def test_the_order_is_another_one_in_each_pass_and_epoch_and_a_function_of_the_seed() -> None:
    first = await orders(1)
    assert len({tuple(order) for order in first}) == 4
    assert first == await orders(1)
    assert first != await orders(2)


async def test_steps_are_counted_for_each_epoch() -> None:
    async with opened(Squares(minibatch_size=5)) as bench:
        bench.state.num_epoch_steps = 7  # of a checkpoint
        for epoch in range(2):
            await bench.learn()
            assert (bench.state.num_epoch_steps, bench.state.num_steps) == (2, 2 * (epoch + 1))


# ---------------------------------------------------------------------- gradients
def descend(batches: list[list[int]], lr: float, limit: float | None, order: float) -> tuple[float, float, list[float]]:
    """Plain gradient descent of (w x + b - r)², clipped; returns w, b and the norms before clipping."""
    weight, bias, norms = 0.1, 0.2, []
    for ticks in batches:
        errors = [(tick, weight * tick + bias - tick / 10) for tick in ticks]
        slope = sum(2 * error * tick for tick, error in errors) / len(ticks)
        shift = sum(2 * error for _, error in errors) / len(ticks)
        parts = [abs(slope), abs(shift)]
        norm = max(parts) if order == math.inf else sum(part**order for part in parts) ** (1 / order)
        norms.append(norm)
        scale = min(1.0, limit / (norm + 1e-6)) if limit is not None else 1.0
        weight, bias = weight - lr * scale * slope, bias - lr * scale * shift
    return weight, bias, norms


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("limit", [0.5, 1.5, 1e6, None])
async def test_gradients_are_those_of_the_real_rows_clipped_by_their_norm(limit: float | None, order: float) -> None:
    task = Squares(minibatch_size=3, passes=2)
    async with opened(task, max_overshoot=3, clip_grad_norm=limit, clip_grad_norm_type=order) as bench:
        update = await bench.learn()
    weight, bias, norms = descend([batch.real for batch in task.minibatches], 0.01, limit, order)
    assert bench.model.critic.weight.item() == pytest.approx(weight, rel=1e-4)
    assert bench.model.critic.bias.item() == pytest.approx(bias, rel=1e-4)
    assert update.metrics["learner/grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-4)


class Named(Squares):
    """Half of the loss by one name, half by another, one of them a scalar."""

    def compute_loss(self, model: Any, batch: dict[str, Tensor], state: State, output: Any) -> dict[str, Tensor]:
        rows = super().compute_loss(model, batch, state, output)
        assert not isinstance(rows, dict)
        return {"rows": 0.5 * rows, "scalar": 0.5 * (rows * batch["weights"]).sum() / batch["weights"].sum()}


async def test_named_losses_are_summed_and_rows_of_losses_weighted() -> None:
    weights = []
    for task in (Squares(minibatch_size=3), Named(minibatch_size=3)):
        async with opened(task, max_overshoot=3) as bench:
            await bench.learn()
        weights.append(bench.model.critic.weight.item())
    assert weights[0] == pytest.approx(weights[1], rel=1e-6)


# ---------------------------------------------------------------------- what is not finite
class Spoilt(Squares):
    """Has a loss or a gradient that is not finite in the minibatches `bad`; everywhere where that is None."""

    def __init__(self, how: str, bad: set[int] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.how = how
        self.bad = bad

    def compute_loss(
        self, model: Any, batch: dict[str, Tensor], state: State, output: Any
    ) -> Tensor | dict[str, Tensor]:
        loss = super().compute_loss(model, batch, state, output)
        assert not isinstance(loss, dict)
        if self.bad is not None and len(self.minibatches) - 1 not in self.bad:
            return loss
        if self.how == "gradient":
            root: Tensor = (0.0 * model.critic.bias).sqrt()  # 0, where its slope is infinite
            return loss + root
        if self.how == "one of two":
            return {"good": loss, "bad": loss * math.nan}
        return loss + {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[self.how]


@pytest.mark.parametrize(
    ("how", "named", "unnamed"),
    [
        ("nan", "the loss 'loss'", "actor"),
        ("inf", "the loss 'loss'", "gradient"),
        ("-inf", "the loss 'loss'", "gradient"),
        ("one of two", "the loss 'bad'", "'good'"),
        ("gradient", "not finite: the gradient of critic.bias", "critic.weight"),
    ],
)
async def test_a_step_that_is_not_finite_is_left_out(
    caplog: pytest.LogCaptureFixture, how: str, named: str, unnamed: str
) -> None:
    """Weights, the optimizer's memory, counts and the schedule stay as they are, to the bit."""
    task = Spoilt(how, {1})
    halving = partial(ExponentialLR, gamma=0.5)
    async with opened(task, optimizer=partial(Adam, lr=0.1), scheduler=halving) as bench:
        await bench.learn()
        before, rate = bench.contents(), bench.rate
        assert (bench.state.num_steps, rate) == (1, 0.05)
        with caplog.at_level(logging.WARNING, "aiorl.learning.learner"):
            update = await bench.learn()
        after = bench.contents()
        assert len(before) == len(after) > len(bench.model.state_dict())
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        assert (bench.state.num_steps, bench.state.num_epoch_steps, bench.rate) == (1, 0, rate)
        assert update.metrics["learner/skipped_steps"] == 1
        assert "learner/grad_norm" not in update.metrics
        assert named in caplog.text
        assert unnamed not in caplog.text
        update = await bench.learn()
        assert (bench.state.num_steps, bench.rate) == (2, 0.025)
        assert update.metrics["learner/skipped_steps"] == 0


async def test_too_many_in_a_row_end_the_run() -> None:
    task = Spoilt("nan", passes=9)
    async with opened(task, max_consecutive_skips=2) as bench:
        with pytest.raises(NonFiniteError, match=r"3 optimizer steps in a row .*= 2\); the last: the loss 'loss'"):
            await bench.learn()
        assert len(task.minibatches) == 3
        assert bench.state.num_steps == 0


async def test_none_may_be_skipped_where_that_is_asked_for() -> None:
    async with opened(Spoilt("inf"), max_consecutive_skips=0) as bench:
        with pytest.raises(NonFiniteError):
            await bench.learn()


async def test_a_good_step_between_bad_ones_begins_the_count_anew() -> None:
    task = Spoilt("nan", {0, 1, 3, 4, 6}, passes=8)
    async with opened(task, max_consecutive_skips=2) as bench:
        update = await bench.learn()
    assert update.metrics["learner/skipped_steps"] == 5
    assert bench.state.num_steps == 3


async def test_bad_steps_in_a_row_are_counted_beyond_the_end_of_an_update() -> None:
    async with opened(Spoilt("nan", passes=2), max_consecutive_skips=2) as bench:
        await bench.learn()
        with pytest.raises(NonFiniteError):
            await bench.learn()


@pytest.mark.parametrize("value", [math.nan, math.inf])
async def test_a_parameter_that_is_not_finite_ends_the_run(value: float) -> None:
    """Also one that the loss does not depend on."""
    async with opened(Squares()) as bench:
        with torch.no_grad():
            bench.model.actor.weight[1] = value
        with pytest.raises(NaNError, match=r"actor\.weight") as caught:
            await bench.learn()
    assert caught.value.names == ("actor.weight",)


async def test_a_parameter_that_is_not_finite_is_named_before_the_steps_that_it_spoils() -> None:
    async with opened(Squares(passes=9), max_consecutive_skips=2) as bench:
        with torch.no_grad():
            bench.model.critic.weight.fill_(math.nan)
        with pytest.raises(NaNError) as caught:
            await bench.learn()
    assert caught.value.names == ("critic.weight",)


async def test_parameters_whose_sum_overflows_are_finite() -> None:
    async with opened(Squares()) as bench:
        with torch.no_grad():
            bench.model.actor.bias.fill_(3e38)
        assert (await bench.learn()).complete


# ---------------------------------------------------------------------- the learning rate
class Rates(Squares):
    """Notes the learning rate of every minibatch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rates: list[float] = []
        self.bench: Bench | None = None

    def compute_loss(
        self, model: Any, batch: dict[str, Tensor], state: State, output: Any
    ) -> Tensor | dict[str, Tensor]:
        assert self.bench is not None
        self.rates.append(self.bench.rate)
        return super().compute_loss(model, batch, state, output)


async def test_a_schedule_over_samples_stands_still_during_an_epoch() -> None:
    task = Rates(minibatch_size=5)
    linear = partial(SampleSchedule, name="linear", total_samples=40)
    async with opened(task, scheduler=linear, optimizer=partial(SGD, lr=0.04)) as task.bench:
        for epoch in range(3):
            update = await task.bench.learn()
            assert update.metrics["learner/lr"] == pytest.approx(0.04 - 0.01 * epoch)
            task.bench.state.num_samples += NUM_ROWS
    assert task.rates == pytest.approx([0.04, 0.04, 0.03, 0.03, 0.02, 0.02])


async def test_a_scheduler_of_ones_own_is_stepped_after_each_step(recwarn: pytest.WarningsRecorder) -> None:
    task = Rates(minibatch_size=5)
    async with opened(task, scheduler=partial(ExponentialLR, gamma=0.5), optimizer=partial(SGD, lr=0.08)) as task.bench:
        await task.bench.learn()
        await task.bench.learn()
        assert task.bench.rate == pytest.approx(0.005)
    assert task.rates == pytest.approx([0.08, 0.04, 0.02, 0.01])
    assert not recwarn.list


async def test_a_raised_limit_moves_the_end_of_the_schedule() -> None:
    task = Squares()
    linear = partial(SampleSchedule, name="linear", total_samples=40)
    async with opened(task, scheduler=linear, optimizer=partial(SGD, lr=0.04), max_samples=40) as bench:
        bench.state.num_samples = 20
        assert (await bench.learn()).metrics["learner/lr"] == pytest.approx(0.02)
        sampling = SamplingConfig(num_epoch_samples=NUM_ROWS)
        bench.learner.reconfigure(ReinforcementLearningTrainerConfig(sampling=sampling, max_samples=80))
        assert (await bench.learn()).metrics["learner/lr"] == pytest.approx(0.03)


# ---------------------------------------------------------------------- figures, and the end of an update
async def test_figures_are_means_over_rows() -> None:
    """A figure of a minibatch counts once for each of its rows; those that pad count for nothing."""
    task = Squares(minibatch_size=3, passes=2)
    async with opened(task, max_overshoot=3) as bench:
        bench.state.policy_version = 5
        update = await bench.learn(version=3)
    assert task.passes[0]["tick"] == pytest.approx(4.5)
    assert task.passes[0]["number"] == pytest.approx((4 * 0 + 3 * 1 + 3 * 2) / 10)
    assert task.passes[1]["number"] == pytest.approx((4 * 3 + 3 * 4 + 3 * 5) / 10)
    figures = update.metrics
    assert figures["learner/tick"] == pytest.approx(4.5)
    assert figures["learner/number"] == pytest.approx((4 * 0 + 3 * 1 + 3 * 2 + 4 * 3 + 3 * 4 + 3 * 5) / 20)
    assert figures["learner/whole"] == pytest.approx(figures["learner/number"])
    assert figures["learner/of_either_kind"] == pytest.approx(2.0)
    assert figures["learner/rows_of_the_epoch"] == 10
    assert figures["learner/num_steps"] == 6
    assert figures["learner/num_update_passes"] == 2
    assert (update.lag_mean, update.lag_max) == (2.0, 2)
    assert (update.num_rows, update.num_trajectories) == (10, 1)


async def test_the_loss_is_the_mean_over_the_rows() -> None:
    """With a rate of next to nothing, it is that of the first weights: w = 0.1 and r = t / 10 leave b = 0.2."""
    async with opened(Squares(minibatch_size=3), max_overshoot=3, optimizer=partial(SGD, lr=1e-12)) as bench:
        update = await bench.learn()
    assert update.metrics["learner/loss"] == pytest.approx(0.04, rel=1e-4)


class Impatient(Squares):
    def update_is_over(self, state: State, metrics: Mapping[str, float]) -> bool:
        super().update_is_over(state, metrics)
        return len(self.passes) == 2


async def test_the_task_may_end_an_update_after_a_pass() -> None:
    task = Impatient(minibatch_size=5, passes=5)
    async with opened(task) as bench:
        update = await bench.learn()
    assert update.complete
    assert update.metrics["learner/num_update_passes"] == 2
    assert len(task.minibatches) == 4


@pytest.mark.parametrize(("target_kl", "passes"), [(1e-9, 1), (1e9, 4), (None, 4)])
async def test_ppo_ends_an_update_that_has_moved_the_policy_far(target_kl: float | None, passes: int) -> None:
    task = PPO(PPOConfig(target_kl=target_kl, minibatch_size=5, num_update_epochs=4))
    async with opened(task, optimizer=partial(Adam, lr=0.01), max_policy_lag=1) as bench:
        update = await bench.learn()
    assert update.metrics["learner/num_update_passes"] == passes
    assert bench.state.num_steps == 2 * passes
    assert update.metrics["learner/approx_kl"] > 0


class Calls(Callback):
    """Does something at the end of a step, by its number."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step = step
        self.action = action
        self.num_steps = 0

    def on_step_end(self, state: State) -> None:
        self.num_steps += 1
        if self.num_steps == self.step:
            self.action()


async def test_a_stopped_update_ends_after_its_minibatch() -> None:
    task = Squares(minibatch_size=3, passes=3)
    calls = Calls(2, lambda: bench.learner.stop())
    async with opened(task, callbacks=[calls]) as bench:
        update = await bench.learn()
    assert not update.complete
    assert len(task.minibatches) == bench.state.num_steps == 2
    assert update.metrics["learner/num_update_passes"] == 1


async def test_an_update_that_begins_after_a_stop_takes_no_step() -> None:
    task = Squares()
    async with opened(task) as bench:
        bench.learner.stop()
        update = await bench.learn()
        assert bench.pool.num_used == 0
    assert not update.complete
    assert not task.minibatches
    assert update.num_rows == NUM_ROWS


class Noting(Squares):
    """Notes when it was called, beside the hooks of others."""

    def __init__(self, calls: list[str], **options: Any) -> None:
        super().__init__(**options)
        self.calls = calls

    def run_model(self, model: Any, batch: dict[str, Tensor], state: State) -> Any:
        self.calls.append("run_model")
        return super().run_model(model, batch, state)

    def compute_loss(
        self, model: Any, batch: dict[str, Tensor], state: State, output: Any
    ) -> Tensor | dict[str, Tensor]:
        self.calls.append("compute_loss")
        return super().compute_loss(model, batch, state, output)

    def on_step_start(self, state: State) -> None:
        self.calls.append(f"the task's start {state.num_steps}")


class Hooked(Callback):
    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    async def on_step_start(self, state: State) -> None:
        await asyncio.sleep(0)
        self.calls.append("start")

    def on_before_forward_step(self, state: State) -> None:
        self.calls.append("before forward")

    async def on_after_forward_step(self, state: State) -> None:
        await asyncio.sleep(0)
        self.calls.append("after forward")

    def on_after_compute_loss(self, state: State) -> None:
        self.calls.append(f"after loss {state.num_steps}")

    def on_step_end(self, state: State) -> None:
        self.calls.append(f"end {state.num_steps}")


async def test_hooks_of_a_step_in_their_order() -> None:
    calls: list[str] = []
    async with opened(Noting(calls, minibatch_size=5), callbacks=[Hooked(calls)]) as bench:
        await bench.learn()
    assert calls == [
        step
        for number in (0, 1)
        for step in (
            f"the task's start {number}",
            "start",
            "before forward",
            "run_model",
            "after forward",
            "compute_loss",
            f"after loss {number}",
            f"end {number + 1}",
        )
    ]


async def test_hooks_between_the_parts_of_a_step_change_nothing() -> None:
    weights = []
    for callbacks in ([], [Hooked([])]):
        async with opened(Squares(minibatch_size=3), callbacks=callbacks) as bench:
            await bench.learn()
        weights.append(bench.model.critic.weight.item())
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("busy", "fewest", "most"), [(True, 8, 9), (False, 1, 2)])
async def test_acting_is_given_the_loop_between_minibatches(busy: bool, fewest: int, most: int) -> None:
    """Until nothing waits to be acted on, and for eight turns at most."""
    turns: list[int] = []

    async def act() -> None:
        while True:
            turns.append(len(task.minibatches))
            await asyncio.sleep(0)

    task = Squares(minibatch_size=1)
    async with opened(task, quiet=lambda: not busy) as bench, asyncio.TaskGroup() as tasks:
        for _ in range(2):
            await (
                bench.learn()
            )  # so that the minibatches have their place on the loop, which turns for nothing else then
        acting = tasks.create_task(act())
        await bench.learn()
        acting.cancel()
    assert all(fewest <= turns.count(20 + number) <= most for number in range(1, 10))


# ---------------------------------------------------------------------- pages, failures, cancellation
class Raising(Squares):
    def __init__(self, where: str, **options: Any) -> None:
        super().__init__(**options)
        self.where = where

    def postprocess_trajectories(self, batch: TrajectoryBatch) -> TrajectoryBatch:
        if self.where == "postprocess":
            raise LookupError(self.where)
        return batch

    def run_model(self, model: Any, batch: dict[str, Tensor], state: State) -> Any:
        if self.where == "run_model":
            raise LookupError(self.where)
        return super().run_model(model, batch, state)


@pytest.mark.parametrize("where", ["nowhere", "postprocess", "run_model"])
async def test_pages_are_released_whatever_happens(where: str) -> None:
    async with opened(Raising(where)) as bench:
        sealed = sealed_epoch(bench.pool, NUM_ROWS)
        assert bench.pool.num_used == 3
        with contextlib.suppress(LookupError):
            await bench.learner.learn(sealed, bench.pool)
        assert bench.pool.num_used == 0


class Blocking(Squares):
    """Its second minibatch holds its thread until it is let go."""

    def __init__(self, where: str, **options: Any) -> None:
        super().__init__(**options)
        self.where = where
        self.loop = asyncio.get_running_loop()
        self.begun = asyncio.Event()
        self.let_go = threading.Event()

    def block(self) -> None:
        self.loop.call_soon_threadsafe(self.begun.set)
        assert self.let_go.wait(PATIENCE_S)

    def build_rl_dataset(self, batch: TrajectoryBatch) -> dict[str, NDArray[Any]]:
        if self.where == "prepare":
            self.block()
        return super().build_rl_dataset(batch)

    def compute_loss(
        self, model: Any, batch: dict[str, Tensor], state: State, output: Any
    ) -> Tensor | dict[str, Tensor]:
        if self.where == "step" and len(self.minibatches) == 1:
            self.block()
        return super().compute_loss(model, batch, state, output)


@pytest.mark.parametrize(("where", "num_steps"), [("prepare", 0), ("step", 2)])
async def test_a_cancellation_leaves_the_weights_between_two_steps(where: str, num_steps: int) -> None:
    task = Blocking(where, minibatch_size=3)
    async with opened(task) as bench, asyncio.TaskGroup() as tasks:
        learning = tasks.create_task(bench.learn())
        await task.begun.wait()
        learning.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not learning.done()
        task.let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await learning
        assert bench.pool.num_used == 0
        assert bench.state.num_steps == num_steps
        weight, bias, _ = descend([batch.real for batch in task.minibatches], 0.01, 10.0, 2.0)
        assert bench.model.critic.weight.item() == pytest.approx(weight, rel=1e-4)
        assert bench.model.critic.bias.item() == pytest.approx(bias, rel=1e-4)
        task.where = "nowhere"
        assert (await bench.learn()).complete  # it still works
