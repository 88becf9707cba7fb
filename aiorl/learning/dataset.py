"""From a sealed epoch to the dataset that minibatches are cut from: one batched pass with the weights at the start of the update.

Dimensions: B rows of the epoch, m trajectories that are bootstrapped.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aiorl.tasks.base import ReinforcementLearningTask

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from aiorl.models.base import Model
    from aiorl.sampling.trajectory import SealedEpoch, TrajectoryBatch

_CHUNK_ROWS = 16_384
_CHUNK_NUMBERS = 2**23  # of observations; 256 stacks of 4 frames take less of a CPU's time per image than 1,024


def prepare(
    sealed: SealedEpoch, model: Model, task: ReinforcementLearningTask, device: torch.device, *, lagging: bool
) -> tuple[TrajectoryBatch, dict[str, Tensor]]:
    """Trajectories with their values, postprocessed by the task, and the task's dataset on `device`, each tensor ``[B, ...]``.

    The epoch's pages may be released after it.

    Args:
        sealed: The epoch.
        model: Under whose weights rows are valued.
        task: Postprocesses, and builds the dataset.
        device: Where the model is.
        lagging: Whether rows may have been acted with older weights, so that the task needs their log-probabilities under these.
    """
    batch = sealed.gather()
    _add_values(batch, model, device)
    if lagging:
        _add_start_log_probs(batch, model, task, device)
    if type(task).postprocess_trajectory is not ReinforcementLearningTask.postprocess_trajectory:
        for trajectory in batch.trajectories():
            # A copy, so that an array that was put in the place of another one is told from it.
            batch.replace(trajectory, task.postprocess_trajectory(copy.copy(trajectory)))
    batch = task.postprocess_trajectories(batch)
    arrays = task.build_rl_dataset(batch)
    return batch, {name: torch.as_tensor(array, device=device) for name, array in arrays.items()}


@torch.no_grad()
def _add_values(batch: TrajectoryBatch, model: Model, device: torch.device) -> None:
    """The value of every row and of every bootstrap observation. A model without `value` leaves every value 0."""
    num_rows = len(batch)
    values = np.zeros(num_rows + len(batch.bootstrap_rows), np.float32)
    evaluate = getattr(model, "value", None)
    if evaluate is not None:
        size = _chunk_rows(batch)
        for begin in range(0, len(values), size):
            chunk = torch.as_tensor(_observations(batch, begin, begin + size), device=device)
            values[begin : begin + size] = evaluate(chunk).float().cpu().numpy()
    batch.set_values(values[:num_rows], values[num_rows:])


def _chunk_rows(batch: TrajectoryBatch) -> int:
    """Rows that the model is given at once."""
    return max(1, min(_CHUNK_ROWS, _CHUNK_NUMBERS // math.prod(batch.observations.shape[1:])))


def _observations(batch: TrajectoryBatch, begin: int, stop: int) -> NDArray[Any]:
    """Rows of the observations followed by the bootstrap observations, copied only where the ones follow the others."""
    num_rows = len(batch)
    if stop <= num_rows:
        return batch.observations[begin:stop]
    if begin >= num_rows:
        return batch.bootstrap_observations[begin - num_rows : stop - num_rows]
    return np.concatenate([batch.observations[begin:], batch.bootstrap_observations[: stop - num_rows]])


@torch.no_grad()
def _add_start_log_probs(
    batch: TrajectoryBatch, model: Model, task: ReinforcementLearningTask, device: torch.device
) -> None:
    """``extras["start_log_probs"]``, float32 ``[B]``; none where the task draws for itself and gives no distribution."""
    log_probs = np.empty(len(batch), np.float32)
    size = _chunk_rows(batch)
    for begin in range(0, len(batch), size):
        rows = slice(begin, begin + size)
        chosen = task.get_actions(model, torch.as_tensor(batch.observations[rows], device=device), optimal=False)
        if isinstance(chosen, tuple):
            return
        log_probs[rows] = chosen.log_prob(torch.as_tensor(batch.actions[rows], device=device)).float().cpu().numpy()
    batch.extras["start_log_probs"] = log_probs
