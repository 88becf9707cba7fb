from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from aiorl.environments.config import EnvironmentConfig
from aiorl.environments.spaces import ArraySpec, EnvironmentInfo, EnvironmentSpec
from aiorl.errors import ConfigError
from aiorl.models.config import MLPConfig
from aiorl.models.mlp import MLP
from aiorl.sampling.trajectory import TrajectoryBatch
from aiorl.tasks.base import ReinforcementLearningTask, State, build_task, weighted_mean
from aiorl.tasks.config import OpenTaskConfig, PPOConfig, TaskConfig
from aiorl.tasks.ppo import PPO

if TYPE_CHECKING:
    from pathlib import Path


class Minimal(ReinforcementLearningTask):
    """Only what has no default."""

    def compute_loss(self, model: Any, batch: dict[str, torch.Tensor], state: State, output: Any) -> torch.Tensor:
        _, values = output
        loss: torch.Tensor = values.square()
        return loss


def model() -> MLP:
    info = EnvironmentInfo(ArraySpec((2,), "float32"), ArraySpec((), "int64"), 3, "same_step", None)
    return MLP(info, MLPConfig(hidden_sizes=(4,)))


def batch(num_rows: int) -> TrajectoryBatch:
    """One trajectory that is cut."""
    rows = np.arange(num_rows)
    return TrajectoryBatch(
        observations=np.zeros((num_rows, 2), np.float32),
        actions=rows,
        log_probs=np.full(num_rows, -1.0, np.float32),
        rewards=np.ones(num_rows, np.float32),
        terminated=np.zeros(num_rows, np.bool_),
        truncated=np.zeros(num_rows, np.bool_),
        versions=np.zeros(num_rows, np.int64),
        ends=rows == num_rows - 1,
        starts=np.array([0]),
        lengths=np.array([num_rows]),
        environments=np.array([0]),
        bootstrap_rows=np.array([num_rows - 1]),
        bootstrap_observations=np.zeros((1, 2), np.float32),
        final_rows=np.empty(0, np.int64),
        final_observations=np.empty((0, 2), np.float32),
        values=np.full(num_rows, 0.5, np.float32),
        next_values=np.full(num_rows, 0.5, np.float32),
        extras={"bonus": np.full(num_rows, 9.0, np.float32)},
    )


def test_a_task_without_a_loss_is_no_task() -> None:
    with pytest.raises(TypeError, match="compute_loss"):
        ReinforcementLearningTask()  # type: ignore[abstract]


def test_the_environment_is_what_the_table_names() -> None:
    environment = EnvironmentConfig(
        id="envs:Maze", kwargs={"size": 3}, wrappers=("envs:Wrapper",), register=("ale_py",), vectorization_mode="sync"
    )
    task = Minimal(TaskConfig(environment=environment))
    assert task.environment is environment
    assert task.get_environment() == EnvironmentSpec("envs:Maze", {"size": 3}, ("envs:Wrapper",), ("ale_py",), "sync")
    assert Minimal().get_environment().id == "CartPole-v1"


def test_defaults_of_learning() -> None:
    task, state, policy = Minimal(), State(), model()
    observations = torch.randn(5, 2)
    distribution = task.get_actions(policy, observations, optimal=False)
    assert not isinstance(distribution, tuple)
    assert torch.equal(distribution.log_probabilities, policy.policy(observations).log_probabilities)
    _, values = task.run_model(policy, {"observations": observations}, state)
    assert torch.equal(values, policy.value(observations))
    assert (task.num_update_epochs, task.minibatch_size) == (1, None)
    assert not task.epoch_is_over(state)
    assert not task.is_training_over(state)
    assert not task.update_is_over(state, {"approx_kl": 1e9})


def test_the_dataset_holds_the_rows_and_what_was_derived() -> None:
    task, rows = Minimal(), batch(3)
    (trajectory,) = rows.trajectories()
    assert task.postprocess_trajectory(trajectory) is trajectory
    assert task.postprocess_trajectories(rows) is rows
    dataset = task.build_rl_dataset(rows)
    assert set(dataset) == {"observations", "actions", "log_probs", "values", "bonus"}
    assert dataset["bonus"].tolist() == [9.0, 9.0, 9.0]


def test_what_is_logged_is_detached_and_handed_over_once() -> None:
    task = Minimal()
    weight = torch.tensor(3.0, requires_grad=True)
    task.log("loss", weight * 2.0)
    task.log("rows", torch.tensor([1.0, 2.0]))
    task.log("plain", 4.0)
    task.log("plain", 5.0)
    logged = task.take_logged()
    assert list(logged) == ["loss", "rows", "plain"]
    assert isinstance(logged["loss"], torch.Tensor)
    assert not logged["loss"].requires_grad
    assert (float(logged["loss"]), logged["plain"]) == (6.0, 5.0)
    assert task.take_logged() == {}


def test_weighted_mean_leaves_padding_out() -> None:
    values = torch.tensor([1.0, 3.0, 100.0])
    assert weighted_mean(values, torch.tensor([1.0, 1.0, 0.0])).item() == 2.0
    assert weighted_mean(values, torch.tensor([3.0, 1.0, 0.0])).item() == 1.5


def test_build_by_name() -> None:
    task = build_task(PPOConfig(gamma=0.5))
    assert isinstance(task, PPO)
    assert task.config.gamma == 0.5


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_tasks_of_test_base.py").write_text(
        "from aiorl.tasks.base import ReinforcementLearningTask\n"
        "from aiorl.tasks.ppo import PPO\n"
        "class Scaled(ReinforcementLearningTask):\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.scale = config.options['scale']\n"
        "    def compute_loss(self, model, batch, state, output):\n"
        "        return self.scale * output[1]\n"
        "class Tuned(PPO):\n"
        "    pass\n"
        "class Raising(PPO):\n"
        "    def __init__(self, config):\n"
        "        raise OSError('no task today')\n"
        "number = 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own_tasks")
def test_build_a_task_of_ones_own() -> None:
    table = {"name": "own_tasks_of_test_base:Scaled", "scale": 3.0}
    task = build_task(OpenTaskConfig.model_validate(table))
    assert task.compute_loss(None, {}, State(), (None, 2.0)) == 6.0


@pytest.mark.usefixtures("own_tasks")
def test_a_subclass_of_ppo_takes_its_section() -> None:
    name = "own_tasks_of_test_base:Tuned"
    assert TaskConfig.variant({"name": name}) is PPOConfig
    task = build_task(PPOConfig(name=name, gamma=0.9))
    assert type(task).__name__ == "Tuned"
    assert isinstance(task, PPO)
    assert task.config.gamma == 0.9


@pytest.mark.usefixtures("own_tasks")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ppoo", "ppoo"),
        ("no_such_module:Name", "cannot be imported"),
        ("own_tasks_of_test_base:Scale", 'did you mean "Scaled"'),
        ("own_tasks_of_test_base:number", "is no task"),
        (
            "own_tasks_of_test_base:Raising",
            r"OSError: no task today\n.*test_base\.py\", line \d+, in __init__\n.*raise",
        ),
    ],
)
def test_a_task_that_cannot_be_built_is_a_fault(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_task(OpenTaskConfig(name=name))
    assert [fault.path for fault in caught.value.faults] == ["task.name"]
