"""Proximal policy optimisation.

Dimensions: B rows of an epoch or of a minibatch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from aiorl.tasks.base import ReinforcementLearningTask, State
from aiorl.tasks.config import PPOConfig
from aiorl.tasks.returns import explained_variance, gae

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from aiorl.compute.distributions import Categorical
    from aiorl.sampling.trajectory import TrajectoryBatch
    from aiorl.tasks.config import TaskConfig

_MAX_BEHAVIOUR_WEIGHT = 2.0


class PPO(ReinforcementLearningTask):
    """Clipped policy gradients with a value function, over a few passes of each epoch.

    Schulman et al. 2017, "Proximal policy optimization algorithms", equation 7, with advantages by `returns.gae`. The
    loss of a row is ``policy + vf_coef * value - ent_coef * entropy``.

    Where policies may lag (``max_policy_lag`` of 1 or more) the objective is decoupled: Hilton, Cobbe and Schulman
    2022, "Batch size-invariance for policy optimization". The ratio that is clipped is then taken against π_start, the
    policy at the start of the update (the dataset's ``start_log_probs``), and each row's objective is weighted by
    ``π_start / π_behaviour`` of its action, truncated at 2. Without lag the two policies are one, and so are the two
    objectives.

    Figures (``learner/...``), means over the rows of an update:

    ======================  ==========================================================================================
    ``policy_loss``         the clipped objective, negated
    ``value_loss``          half the squared error of the values, before ``vf_coef``
    ``entropy``             of the policy, in nats
    ``approx_kl``           estimate of KL(π_start, π): ``(ratio - 1) - log ratio`` (Schulman 2020, "Approximating KL
                            divergence")
    ``clipfrac``            share of rows whose ratio lies outside ``1 ± clip_coef``
    ``behaviour_weight``    ``π_start / π_behaviour``, truncated; only where policies may lag
    ``explained_variance``  share of the returns' variance that the values foretold, before the update
    ======================  ==========================================================================================

    Attributes:
        config: The ``[task]`` table.
    """

    Config: ClassVar = PPOConfig
    config: PPOConfig

    def __init__(self, config: PPOConfig | None = None) -> None:
        """Takes the ``[task]`` table, or its defaults."""
        super().__init__(PPOConfig() if config is None else config)
        self.num_update_epochs = self.config.num_update_epochs
        self.minibatch_size = self.config.minibatch_size

    def reconfigure(self, config: TaskConfig) -> None:
        """Goes by another ``[task]`` table from now on; see the base class."""
        super().reconfigure(config)
        self.num_update_epochs = self.config.num_update_epochs

    def postprocess_trajectories(self, batch: TrajectoryBatch) -> TrajectoryBatch:
        """Adds ``advantages`` and ``returns``, float32 ``[B]``, to the extras."""
        batch.extras["advantages"], batch.extras["returns"] = gae(
            batch.rewards,
            batch.values,
            batch.next_values,
            batch.terminated,
            batch.ends,
            self.config.gamma,
            self.config.gae_lambda,
        )
        return batch

    def build_rl_dataset(self, batch: TrajectoryBatch) -> dict[str, NDArray[Any]]:
        """The default dataset, with ``advantages`` and ``returns``; logs the explained variance."""
        self.log("explained_variance", explained_variance(batch.values, batch.extras["returns"]))
        return super().build_rl_dataset(batch)

    def compute_loss(
        self, model: Any, batch: dict[str, Tensor], state: State, output: tuple[Categorical, Tensor]
    ) -> dict[str, Tensor]:
        """The losses ``policy``, ``value`` and ``entropy``, each a scalar that holds its coefficient already."""
        distribution, values = output
        clip = self.clip_coefficient(state)
        share = batch["weights"] / batch["weights"].sum()  # of each row in a mean
        policy_loss = self._policy_loss(distribution, batch, share, clip)
        value_loss = _mean(self._value_loss(values, batch, clip), share)
        entropy = _mean(distribution.entropy(), share)
        for name, figure in (("policy_loss", policy_loss), ("value_loss", value_loss), ("entropy", entropy)):
            self.log(name, figure)
        return {
            "policy": policy_loss,
            "value": self.config.vf_coef * value_loss,
            "entropy": -self.config.ent_coef * entropy,
        }

    def update_is_over(self, state: State, metrics: Mapping[str, float]) -> bool:
        """Whether the last pass has moved the policy by more than ``target_kl``."""
        return self.config.target_kl is not None and metrics.get("approx_kl", 0.0) > self.config.target_kl

    def clip_coefficient(self, state: State) -> float:
        """``clip_coef``, which with ``anneal`` falls linearly to 0 as ``state.progress`` goes from 0 to 1."""
        return self.config.clip_coef * (1.0 - state.progress if self.config.anneal else 1.0)

    def _policy_loss(self, distribution: Categorical, batch: dict[str, Tensor], share: Tensor, clip: float) -> Tensor:
        """The negated objective, a scalar; logs how far the policy has moved."""
        behaviour = batch["log_probs"]
        start = batch.get("start_log_probs", behaviour)
        log_ratio = distribution.log_prob(batch["actions"]) - start
        ratio = log_ratio.exp()
        advantages = batch["advantages"]
        if self.config.norm_adv:
            advantages = _normalised(advantages, share)
        objective = torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages)
        if "start_log_probs" in batch:
            behaviour_weight = (start - behaviour).exp().clamp(max=_MAX_BEHAVIOUR_WEIGHT)
            self.log("behaviour_weight", _mean(behaviour_weight, share))
            objective = behaviour_weight * objective
        with torch.no_grad():
            moved = ratio - 1.0
            self.log("approx_kl", _mean(moved - log_ratio, share))
            self.log("clipfrac", _mean(moved.abs() > clip, share))
        return -_mean(objective, share)

    def _value_loss(self, values: Tensor, batch: dict[str, Tensor], clip: float) -> Tensor:
        """Half the squared error of each row's value, floating ``[B]``."""
        error = (values - batch["returns"]).square()
        if self.config.clip_vloss:
            clipped = batch["values"] + (values - batch["values"]).clamp(-clip, clip)
            error = torch.maximum(error, (clipped - batch["returns"]).square())
        return 0.5 * error


def _normalised(advantages: Tensor, share: Tensor) -> Tensor:
    """Advantages with mean 0 and deviation 1 over the rows that count; a single such row is left as it is."""
    centred = advantages - _mean(advantages, share)
    spread = 1.0 - _mean(share, share)  # Bessel's correction; 0 for a single row
    deviation = (_mean(centred.square(), share) / spread).sqrt()
    return torch.where(spread > 0.0, centred / (deviation + 1e-8), advantages)


def _mean(values: Tensor, share: Tensor) -> Tensor:
    """The mean over the rows that count, of which each has its share."""
    return (values * share).sum()
