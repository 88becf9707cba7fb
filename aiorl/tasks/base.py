"""The task: what is to be learned, in which environment, and from which loss; the interface that users subclass.

What the trainer asks of a task, in the order of one epoch (``→`` marks what runs for each minibatch):

======================================  ========================================================================
method                                  when
======================================  ========================================================================
``get_environment``                     once, before anything starts
``get_actions``                         for each batch of observations that the micro-batcher gathers
``postprocess_trajectory``              for each trajectory of an epoch that was sampled in full
``postprocess_trajectories``            for all of them together; values are known by then
``build_rl_dataset``                    once: the arrays that minibatches are cut from
→ ``run_model``, then ``compute_loss``  for each minibatch of each of ``num_update_epochs`` passes
``update_is_over``                      after each pass
``epoch_is_over``                       whenever samples have landed
``is_training_over``                    after each epoch
======================================  ========================================================================

Sampling goes on beside learning where ``max_policy_lag`` allows it, so ``get_actions`` may run between any two of the
others, and on another thread; the others never run beside one another. None of them may block on I/O: hooks may, by
being coroutines.

Dimensions: B rows (of a batch, an epoch or a minibatch).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from aiorl.environments.spaces import EnvironmentSpec
from aiorl.errors import ConfigError, Fault
from aiorl.section import UnknownName, load_object, translated
from aiorl.tasks.config import TaskConfig
from aiorl.tasks.hooks import HOOK_NAMES, Callback, HookName, Hooks, State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from aiorl.compute.distributions import Categorical
    from aiorl.sampling.trajectory import Trajectory, TrajectoryBatch

__all__ = [
    "HOOK_NAMES", "Callback", "HookName", "Hooks", "ReinforcementLearningTask", "State", "build_task", "weighted_mean",
]  # fmt: skip

_BUILT_IN = {"ppo": "aiorl.tasks.ppo:PPO"}


class ReinforcementLearningTask(Callback, ABC):
    """What is to be learned, in which environment, and from which loss.

    A task of one's own subclasses this, or `aiorl.tasks.ppo.PPO`, and overrides what differs; only `compute_loss` has
    no default. It is named in the TOML as ``[task] name = "module:Name"`` or passed to ``aiorl.open_run`` as an object.
    Its hooks, inherited from `Callback`, are called before those of registered callbacks.

    Attributes:
        config: The ``[task]`` table.
        environment: The ``[task.environment]`` table.
        num_update_epochs: Passes that the learner makes over each epoch's dataset.
        minibatch_size: Rows per minibatch. Each pass takes ``max(1, round(num_epoch_samples / minibatch_size))``
            minibatches of nearly equal size; None is one minibatch of everything.
    """

    num_update_epochs: int = 1
    minibatch_size: int | None = None

    def __init__(self, config: TaskConfig | None = None) -> None:
        """Takes the ``[task]`` table, or its defaults."""
        self.config = TaskConfig() if config is None else config
        self.environment = self.config.environment
        self._logged: dict[str, Tensor | float] = {}

    def reconfigure(self, config: TaskConfig) -> None:
        """Goes by another ``[task]`` table from now on, as ``run.set("task.ent_coef", 0.0)`` asks for.

        Called between two minibatches. The environment and the size of minibatches stay as they are.

        Args:
            config: The table as it is to be, of the same class as before.
        """
        self.config = config

    def get_environment(self) -> EnvironmentSpec:
        """The environment, as a description that a worker builds it from, not the environment itself.

        Returns:
            By default what ``[task.environment]`` names. Keyword arguments must be plain values, since they are sent to
            workers: numbers, strings, lists, mappings.
        """
        table = self.environment
        return EnvironmentSpec(
            id=table.id,
            kwargs=dict(table.kwargs),
            wrappers=tuple(table.wrappers),
            register=tuple(table.register),
            vectorization_mode=table.vectorization_mode,
        )

    def get_actions(self, model: Any, observations: Tensor, optimal: bool) -> Categorical | tuple[Tensor, Tensor]:
        """How the model acts, by default by drawing from its policy.

        Called without gradients, on acting weights that may be older than the learner's. Rows of several environments
        stand in one batch in no particular order, so nothing may be carried from call to call. A task that leaves this
        method alone lets small networks act in NumPy.

        Args:
            model: The `aiorl.models.base.Model`, or whatever model was passed, holding the acting weights.
            observations: ``[B, *shape]`` in the environment's own dtype.
            optimal: Greedy actions are asked for (``sampling.optimal``, and playing a checkpoint).

        Returns:
            Either a distribution of B rows, from which aiorl draws with the counter-based noise of each environment
            (reproducible whatever the order of batches), or takes the mode where ``optimal`` is set; or ``(actions,
            log_probs)``, integer ``[B]`` and floating ``[B]``, where ``optimal`` and all randomness are the task's.
        """
        distribution: Categorical = model.policy(observations)
        return distribution

    def postprocess_trajectory(self, trajectory: Trajectory) -> Trajectory:
        """Changes one trajectory, for example its rewards.

        Args:
            trajectory: Consecutive transitions of one environment; its arrays are views of the epoch's.

        Returns:
            A trajectory of the same length: the one given, changed in place or not, or a new one, whose arrays are
            copied back.
        """
        return trajectory

    def postprocess_trajectories(self, batch: TrajectoryBatch) -> TrajectoryBatch:
        """Derives what the loss needs from an epoch's trajectories, for example advantages.

        Args:
            batch: B rows, trajectory after trajectory. ``values`` and ``next_values`` are those of the weights at the
                start of the update; where policies may lag, ``extras["start_log_probs"]`` holds the log-probabilities
                of the actions under these weights.

        Returns:
            The batch; what is derived goes into ``extras``, each array ``[B, ...]``.
        """
        return batch

    def build_rl_dataset(self, batch: TrajectoryBatch) -> dict[str, NDArray[Any]]:
        """The arrays that minibatches are cut from.

        Args:
            batch: What `postprocess_trajectories` returned.

        Returns:
            Arrays ``[B, ...]`` by name: by default ``observations``, ``actions``, ``log_probs``, ``values`` and
            whatever is in ``extras``. Each minibatch holds the same names as tensors, and ``weights`` besides, which no
            array may be called.
        """
        return {
            "observations": batch.observations,
            "actions": batch.actions,
            "log_probs": batch.log_probs,
            "values": batch.values,
            **batch.extras,
        }

    def run_model(self, model: Any, batch: dict[str, Tensor], state: State) -> Any:
        """The forward pass over one minibatch.

        Args:
            model: The model, with gradients on; wrapped where it is compiled or shared between processes, so call the
                model itself rather than its methods.
            batch: The dataset's arrays as tensors ``[B, ...]``, and ``weights``.
            state: How far the run has come.

        Returns:
            Whatever `compute_loss` wants: by default ``(distribution, values)``.
        """
        return model(batch["observations"])

    @abstractmethod
    def compute_loss(
        self, model: Any, batch: dict[str, Tensor], state: State, output: Any
    ) -> Tensor | dict[str, Tensor]:
        """The loss of one minibatch.

        ``batch["weights"]``, float32 ``[B]``, is 1 for each row that counts and 0 for those that only pad the minibatch
        to its static number of rows (they repeat real ones). A mean over rows has to be weighted with it, which
        `weighted_mean` does; a loss per row is weighted by the learner. Figures are recorded with `log`. Nothing here
        should wait for a device: no ``.item()``, no branch on a tensor's value.

        Args:
            model: As in `run_model`.
            batch: As in `run_model`.
            state: How far the run has come.
            output: What `run_model` returned.

        Returns:
            A scalar, a loss per row ``[B]``, or several of either by name, whose sum is learned from and whose
            gradients ``trainer.balance_grad_norms`` balances.
        """

    def update_is_over(self, state: State, metrics: Mapping[str, float]) -> bool:
        """Whether to leave out the remaining passes over this epoch's dataset.

        Args:
            state: How far the run has come.
            metrics: What was logged during the pass that has just ended, averaged over its rows.

        Returns:
            By default False.
        """
        return False

    def epoch_is_over(self, state: State) -> bool:
        """Whether to seal the epoch before it holds ``num_epoch_samples``; by default False."""
        return False

    def is_training_over(self, state: State) -> bool:
        """Whether to end the run before any of the configured limits does; by default False."""
        return False

    def log(self, name: str, value: Tensor | float) -> None:
        """Records a figure for the metrics, where it appears as ``learner/<name>``.

        Args:
            name: The figure's name. Logging a name twice for one minibatch keeps the later value.
            value: A scalar, or one number per row ``[B]``. Those logged in `run_model` and `compute_loss` are averaged
                over all rows of all minibatches, weighted (a scalar counts for every row of its minibatch); those
                logged in ``postprocess_*`` and `build_rl_dataset` are taken as they are. A tensor is detached, and read
                only when a pass has ended, so that logging never waits for a device.
        """
        self._logged[name] = value if isinstance(value, float | int) else value.detach()

    def take_logged(self) -> dict[str, Tensor | float]:
        """Hands over what was logged since the last call, and forgets it; the learner calls this for each minibatch."""
        logged, self._logged = self._logged, {}
        return logged


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The mean over the rows that count.

    Args:
        values: Floating ``[B]``, finite in every row, those of weight 0 included.
        weights: Floating ``[B]``, not all 0: ``batch["weights"]``.

    Returns:
        A scalar tensor.
    """
    return (values * weights).sum() / weights.sum()


def build_task(config: TaskConfig) -> ReinforcementLearningTask:
    """Builds the task that ``[task]`` names: a built-in one, or ``module:Name`` as ``Name(config)``.

    A class may declare the section that its table is read by as ``Config``, a subclass of
    `aiorl.tasks.config.TaskConfig`; otherwise the table's further keys are in ``config.options``.

    Raises:
        ConfigError: The name is unknown, cannot be imported, raises when it is called, or names something else than a
            task.
    """
    try:
        factory = load_object(_BUILT_IN.get(config.name, config.name))
    except UnknownName as error:
        raise ConfigError([Fault("task.name", error.message, f'"{config.name}"', error.remedy)]) from error
    with translated("task.name", config.name, "cannot be constructed"):
        task = factory(config) if callable(factory) else factory
    if not isinstance(task, ReinforcementLearningTask):
        remedy = "name a subclass of aiorl.tasks.base.ReinforcementLearningTask"
        raise ConfigError([Fault("task.name", "is no task", f'"{config.name}"', remedy)])
    return task
