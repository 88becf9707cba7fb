"""What minibatches are cut from, against plain loops over trajectories whose every number is known."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from aiorl.learning.dataset import prepare
from aiorl.tasks.base import ReinforcementLearningTask
from tests.learning.epochs import Line, pool_of, sealed_epoch

if TYPE_CHECKING:
    from torch import Tensor

    from aiorl.sampling.trajectory import Trajectory, TrajectoryBatch

CPU = torch.device("cpu")
# Three environments over seven ticks, cut after every fourth transition of a trajectory.
TERMINATED, TRUNCATED, NUM_TICKS, NUM_ENVS, MAXIMUM = {(2, 0), (6, 1)}, {(3, 2)}, 7, 3, 4


class Plain(ReinforcementLearningTask):
    """A task with every default."""

    def compute_loss(self, model: Any, batch: dict[str, Tensor], state: Any, output: Any) -> Tensor:
        raise AssertionError("nothing is learned here")


def value_of(observation: float) -> float:
    """What `Line` says of it."""
    return 0.1 * observation + 0.2


def log_prob_of(observation: float, action: int) -> float:
    """What `Line` says of it: its logits are 0.02 and -0.02 times the observation."""
    return -math.log(1 + math.exp(-0.04 * observation * (1 if action == 0 else -1)))


def expected() -> list[tuple[float, float, bool]]:
    """(observation, value that follows, whether the trajectory ends) of every row, by a walk along each environment."""
    rows = []
    for env in range(NUM_ENVS):
        since_start = 0
        for tick in range(NUM_TICKS):
            now, after = tick + 100.0 * env, tick + 1 + 100.0 * env
            since_start += 1
            if (tick, env) in TERMINATED:
                rows.append((now, 0.0, True))
            elif (tick, env) in TRUNCATED:
                rows.append((now, value_of(after + 0.5), True))  # the final observation, not the one after the reset
            else:
                rows.append((now, value_of(after), since_start == MAXIMUM or tick == NUM_TICKS - 1))
            if rows[-1][2]:
                since_start = 0
    return rows


def prepared(
    task: ReinforcementLearningTask, model: Any = None, *, lagging: bool = False
) -> tuple[TrajectoryBatch, dict[str, Tensor]]:
    pool = pool_of()
    sealed = sealed_epoch(
        pool, NUM_TICKS, num_envs=NUM_ENVS, terminated=TERMINATED, truncated=TRUNCATED, maximum=MAXIMUM
    )
    try:
        return prepare(sealed, Line() if model is None else model, task, CPU, lagging=lagging)
    finally:
        sealed.release(pool)
        assert pool.num_used == 0


def test_values_are_those_of_a_walk_along_each_trajectory() -> None:
    batch, _ = prepared(Plain())
    rows = expected()
    assert batch.observations[:, 0].tolist() == [observation for observation, _, _ in rows]
    assert batch.values == pytest.approx([value_of(observation) for observation, _, _ in rows], rel=1e-5)
    assert batch.next_values == pytest.approx([following for _, following, _ in rows], rel=1e-5)
    assert batch.ends.tolist() == [ends for _, _, ends in rows]
    assert batch.values.dtype == batch.next_values.dtype == np.float32


class Watched(Line):
    """Notes how many rows it values at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def value(self, observations: Tensor) -> Tensor:
        self.sizes.append(len(observations))
        return super().value(observations)


@pytest.mark.parametrize("bound", ["_CHUNK_ROWS", "_CHUNK_NUMBERS"])
def test_many_rows_are_valued_in_several_calls(monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    """Rows and bootstraps are valued together, so that a chunk may hold both."""
    whole, dataset = prepared(Plain(), lagging=True)
    monkeypatch.setattr(f"aiorl.learning.dataset.{bound}", 4)
    model = Watched()
    parts, again = prepared(Plain(), model, lagging=True)
    assert sum(model.sizes) == len(whole) + len(whole.bootstrap_rows)
    assert set(model.sizes[:-1]) == {4}
    assert parts.values == pytest.approx(whole.values)
    assert parts.next_values == pytest.approx(whole.next_values)
    assert again["start_log_probs"].tolist() == pytest.approx(dataset["start_log_probs"].tolist())


def test_the_default_dataset() -> None:
    batch, dataset = prepared(Plain())
    assert set(dataset) == {"observations", "actions", "log_probs", "values"}
    assert dataset["observations"].shape == (NUM_TICKS * NUM_ENVS, 1)
    assert dataset["actions"].tolist() == [tick % 2 for _ in range(NUM_ENVS) for tick in range(NUM_TICKS)]
    assert dataset["log_probs"].tolist() == [-tick for _ in range(NUM_ENVS) for tick in range(NUM_TICKS)]
    assert dataset["values"].tolist() == batch.values.tolist()
    assert not any(tensor.requires_grad for tensor in dataset.values())


def test_log_probabilities_at_the_start_where_policies_lag() -> None:
    batch, dataset = prepared(Plain(), lagging=True)
    want = [
        log_prob_of(observation, action)
        for observation, action in zip(batch.observations[:, 0].tolist(), batch.actions.tolist(), strict=True)
    ]
    assert dataset["start_log_probs"].tolist() == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert dataset["start_log_probs"].dtype == torch.float32


class DrawsItself(Plain):
    """Gives actions instead of a distribution."""

    def get_actions(self, model: Any, observations: Tensor, optimal: bool) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(len(observations))
        return zeros.long(), zeros


def test_a_task_that_draws_for_itself_has_no_log_probabilities_at_the_start() -> None:
    _, dataset = prepared(DrawsItself(), lagging=True)
    assert "start_log_probs" not in dataset


class Postprocesses(Plain):
    """Replaces an array, writes into another, and adds two of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def postprocess_trajectory(self, trajectory: Trajectory) -> Trajectory:
        self.seen.append((trajectory.environment, len(trajectory)))
        trajectory.rewards = np.cumsum(trajectory.rewards, dtype=np.float32)
        trajectory.log_probs *= 2.0
        trajectory.extras["position"] = np.arange(len(trajectory), dtype=np.float32)
        trajectory.extras["pairs"] = np.full((len(trajectory), 2), trajectory.environment, np.int64)
        return trajectory

    def postprocess_trajectories(self, batch: TrajectoryBatch) -> TrajectoryBatch:
        batch.extras["rewards"] = batch.rewards
        return batch


def test_postprocessing_replaces_arrays_and_adds_others() -> None:
    task = Postprocesses()
    batch, dataset = prepared(task)
    rows = expected()
    lengths: list[int] = [0]
    position: list[int] = []
    total: list[float] = []
    for observation, _, ends in rows:
        tick = observation % 100
        total.append((total[-1] if lengths[-1] else 0.0) + tick / 10)
        position.append(lengths[-1])
        lengths[-1] += 1
        if ends:
            lengths.append(0)
    assert [length for _, length in task.seen] == lengths[:-1]
    assert [environment for environment, _ in task.seen] == batch.environments.tolist()
    assert dataset["rewards"].tolist() == pytest.approx(total)
    assert dataset["position"].tolist() == position
    assert dataset["log_probs"].tolist() == [-2 * (observation % 100) for observation, _, _ in rows]
    assert dataset["pairs"].tolist() == [[observation // 100] * 2 for observation, _, _ in rows]


class Shortens(Plain):
    def postprocess_trajectory(self, trajectory: Trajectory) -> Trajectory:
        trajectory.rewards = trajectory.rewards[1:]
        return trajectory


def test_a_trajectory_keeps_its_length() -> None:
    with pytest.raises(ValueError, match="must keep its 3 transitions"):
        prepared(Shortens())


def test_a_model_without_a_value_leaves_values_0() -> None:
    batch, dataset = prepared(Plain(), torch.nn.Linear(1, 2))
    assert not batch.values.any()
    assert not batch.next_values.any()
    assert len(dataset["values"]) == NUM_TICKS * NUM_ENVS
