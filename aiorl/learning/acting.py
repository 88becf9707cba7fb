"""Which back end acts for a model: NumPy on the loop where it can, torch anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiorl.models.mlp import MLP
from aiorl.sampling.policy import Acting, NumpyActing, TorchActing
from aiorl.tasks.base import ReinforcementLearningTask

if TYPE_CHECKING:
    import torch

    from aiorl.models.base import Model


def build_acting(model: Model, task: ReinforcementLearningTask, device: torch.device) -> Acting:
    """The back end for `model`: NumPy for the built-in MLP on a CPU, unless the model or the task acts in its own way.

    NumPy answers 8 rows in 17 µs, where torch takes 59, and 1,024 in 218, where torch takes 935.
    """
    plain_actions = type(task).get_actions is ReinforcementLearningTask.get_actions
    if isinstance(model, MLP) and type(model).policy is MLP.policy and plain_actions and device.type == "cpu":
        return NumpyActing(model.policy_layers(), model.activation)
    return TorchActing(model, task.get_actions, device)
