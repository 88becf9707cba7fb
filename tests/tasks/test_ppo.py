from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aiorl.compute.distributions import Categorical
from aiorl.sampling.trajectory import TrajectoryBatch
from aiorl.tasks.base import State
from aiorl.tasks.config import PPOConfig
from aiorl.tasks.ppo import PPO


def minibatch(
    *,
    old: list[float],
    advantages: list[float],
    actions: list[int] | None = None,
    returns: list[float] | None = None,
    values: list[float] | None = None,
    weights: list[float] | None = None,
    start: list[float] | None = None,
) -> dict[str, Tensor]:
    """A minibatch; `old` and `start` are probabilities of the actions."""
    rows = len(old)
    batch = {
        "actions": torch.tensor(actions or [0] * rows),
        "log_probs": torch.tensor(old).log(),
        "advantages": torch.tensor(advantages),
        "returns": torch.tensor(returns or [0.0] * rows),
        "values": torch.tensor(values or [0.0] * rows),
        "weights": torch.tensor(weights or [1.0] * rows),
    }
    if start is not None:
        batch["start_log_probs"] = torch.tensor(start).log()
    return batch


def losses(
    batch: dict[str, Tensor],
    *,
    new: list[float] | None = None,
    values: list[float] | None = None,
    state: State | None = None,
    **fields: Any,
) -> tuple[dict[str, float], dict[str, float]]:
    """The named losses and the logged figures; `new` are probabilities of action 0 of two."""
    rows = len(batch["weights"])
    probabilities = torch.tensor(new or [0.5] * rows)
    output = (
        Categorical(torch.stack([probabilities, 1.0 - probabilities], dim=1).log()),
        torch.tensor(values or [0.0] * rows),
    )
    task = PPO(PPOConfig(**({"norm_adv": False} | fields)))
    loss = task.compute_loss(None, batch, state or State(), output)
    weights = batch["weights"]
    figures = {
        name: float(figure if figure.ndim == 0 else (figure * weights).sum() / weights.sum())
        for name, figure in task.take_logged().items()
        if isinstance(figure, Tensor)
    }
    return {name: float(value) for name, value in loss.items()}, figures


def test_the_clipped_objective_by_hand() -> None:
    # ratios 1.6, 1.6, 0.4, 0.4, 1.1 with clipping at 1 ± 0.2
    batch = minibatch(old=[0.5] * 5, advantages=[1.0, -1.0, 1.0, -1.0, 2.0])
    loss, figures = losses(batch, new=[0.8, 0.8, 0.2, 0.2, 0.55], clip_coef=0.2)
    objective = [1.2, -1.6, 0.4, -0.8, 2.2]
    assert loss["policy"] == pytest.approx(-sum(objective) / 5)
    assert figures["policy_loss"] == pytest.approx(loss["policy"])
    assert figures["clipfrac"] == pytest.approx(4 / 5)


def test_clipped_rows_have_no_gradient() -> None:
    logits = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.2, 0.8], [0.2, 0.8]]).log().requires_grad_()
    batch = minibatch(old=[0.5] * 4, advantages=[1.0, -1.0, 1.0, -1.0])
    task = PPO(PPOConfig(norm_adv=False))
    loss = task.compute_loss(None, batch, State(), (Categorical(logits), torch.zeros(4)))
    (gradient,) = torch.autograd.grad(loss["policy"], [logits])
    assert (gradient.abs().sum(dim=1) > 0).tolist() == [False, True, True, False]


def test_approx_kl_by_hand() -> None:
    _, figures = losses(minibatch(old=[0.5, 0.5], advantages=[0.0, 0.0]), new=[0.6, 0.4])
    assert figures["approx_kl"] == pytest.approx(((1.2 - 1 - math.log(1.2)) + (0.8 - 1 - math.log(0.8))) / 2, rel=1e-5)


def test_value_entropy_and_their_coefficients_by_hand() -> None:
    batch = minibatch(old=[0.5, 0.5], advantages=[0.0, 0.0], returns=[1.0, 4.0])
    loss, figures = losses(batch, new=[0.5, 0.25], values=[2.0, 2.0], vf_coef=0.1, ent_coef=0.02)
    entropy = (math.log(2) - 0.25 * math.log(0.25) - 0.75 * math.log(0.75)) / 2
    assert figures["value_loss"] == pytest.approx((0.5 * 1 + 0.5 * 4) / 2)
    assert figures["entropy"] == pytest.approx(entropy)
    assert loss["value"] == pytest.approx(0.1 * 1.25)
    assert loss["entropy"] == pytest.approx(-0.02 * entropy)
    assert set(loss) == {"policy", "value", "entropy"}


def test_value_clipping_by_hand() -> None:
    # old value 1; new 2 is clipped to 1.2. Towards a return of 3 clipping makes the error larger (1.8² against 1), away
    # from a return of 0 it does not make it smaller (2² against 1.2²).
    batch = minibatch(old=[0.5, 0.5], advantages=[0.0, 0.0], returns=[3.0, 0.0], values=[1.0, 1.0])
    _, figures = losses(batch, values=[2.0, 2.0], clip_vloss=True, clip_coef=0.2)
    assert figures["value_loss"] == pytest.approx((0.5 * 1.8**2 + 0.5 * 2.0**2) / 2)
    _, figures = losses(batch, values=[2.0, 2.0], clip_vloss=False)
    assert figures["value_loss"] == pytest.approx((0.5 * 1.0 + 0.5 * 4.0) / 2)


def test_advantages_are_normalised_over_the_rows_that_count() -> None:
    # at ratio 1 the objective is the advantage; ratios 1.1 and 0.9 tell the rows apart. Mean 3, deviation (n - 1) √2.
    batch = minibatch(old=[0.5] * 3, advantages=[2.0, 4.0, 1000.0], weights=[1.0, 1.0, 0.0])
    loss, _ = losses(batch, new=[0.55, 0.45, 0.5], norm_adv=True)
    assert loss["policy"] == pytest.approx(-(1.1 * -1 / math.sqrt(2) + 0.9 * 1 / math.sqrt(2)) / 2, abs=1e-6)


@pytest.mark.parametrize("advantages", [[5.0, 5.0], [0.0, 0.0]])
def test_equal_advantages_normalise_to_nothing(advantages: list[float]) -> None:
    loss, _ = losses(minibatch(old=[0.5, 0.5], advantages=advantages), new=[0.55, 0.55], norm_adv=True)
    assert loss["policy"] == 0.0


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0, 0.0]])
def test_a_single_row_keeps_its_advantage(weights: list[float]) -> None:
    rows = len(weights)
    batch = minibatch(old=[0.5] * rows, advantages=[3.0] * rows, weights=weights)
    loss, figures = losses(batch, new=[0.55] * rows, norm_adv=True)
    assert loss["policy"] == pytest.approx(-3.3, rel=1e-5)
    assert all(math.isfinite(figure) for figure in figures.values())


@pytest.mark.parametrize("norm_adv", [False, True])
@pytest.mark.parametrize("lag", [False, True])
def test_padding_changes_neither_losses_nor_figures(norm_adv: bool, lag: bool) -> None:
    rows: dict[str, Any] = {
        "old": [0.5, 0.3, 0.6], "advantages": [1.0, -2.0, 0.5], "actions": [0, 1, 1], "returns": [1.0, 2.0, 3.0],
        "values": [0.5, 2.5, 3.0],
    }  # fmt: skip
    if lag:
        rows["start"] = [0.4, 0.35, 0.9]
    padded = {name: column + [column[0]] * 2 for name, column in rows.items()} | {"weights": [1.0, 1.0, 1.0, 0.0, 0.0]}
    options: dict[str, Any] = {"norm_adv": norm_adv, "clip_vloss": True}
    bare = losses(minibatch(**rows), new=[0.6, 0.7, 0.2], values=[1.0, 1.0, 1.0], **options)
    with_padding = losses(minibatch(**padded), new=[0.6, 0.7, 0.2, 0.1, 0.9], values=[1, 1, 1, 7, 8], **options)
    for mine, other in zip(bare, with_padding, strict=True):
        assert other == pytest.approx(mine, rel=1e-5)


def reference_with_lag(rows: list[tuple[float, float, float, float]], clip: float) -> tuple[float, float, float]:
    """Negated objective, approximate KL and mean weight of (behaviour, start, new probability, advantage), in loops."""
    objective = divergence = weight = 0.0
    for behaviour, start, new, advantage in rows:
        ratio = new / start
        clipped = min(max(ratio, 1 - clip), 1 + clip)
        row_weight = min(start / behaviour, 2.0)
        objective += row_weight * min(ratio * advantage, clipped * advantage)
        divergence += ratio - 1 - math.log(ratio)
        weight += row_weight
    return -objective / len(rows), divergence / len(rows), weight / len(rows)


def test_with_lag_it_clips_against_the_start_of_the_update_and_weights_by_the_behaviour() -> None:
    rows = [(0.5, 0.4, 0.6, 1.0), (0.1, 0.4, 0.38, -2.0), (0.9, 0.3, 0.3, 4.0), (0.2, 0.4, 0.1, 1.0)]
    batch = minibatch(old=[row[0] for row in rows], start=[row[1] for row in rows], advantages=[row[3] for row in rows])
    loss, figures = losses(batch, new=[row[2] for row in rows], clip_coef=0.2)
    expected = reference_with_lag(rows, clip=0.2)
    assert (loss["policy"], figures["approx_kl"], figures["behaviour_weight"]) == pytest.approx(expected, rel=1e-5)
    # by hand: weights 0.8, 2 (4 truncated), 1/3, 2; ratios 1.5, 0.95, 1, 0.25
    assert loss["policy"] == pytest.approx(-(0.8 * 1.2 - 2 * 1.9 + 4 / 3 + 2 * 0.25) / 4, rel=1e-5)


def test_without_lag_both_objectives_are_one() -> None:
    rows: dict[str, Any] = {"old": [0.5, 0.3], "advantages": [1.0, -2.0]}
    plain, plain_figures = losses(minibatch(**rows), new=[0.6, 0.25])
    decoupled, figures = losses(minibatch(**rows, start=rows["old"]), new=[0.6, 0.25])
    assert decoupled == plain
    assert "behaviour_weight" not in plain_figures
    assert figures.pop("behaviour_weight") == 1.0
    assert figures == plain_figures


def test_annealing_lets_the_clipping_coefficient_fall_with_progress() -> None:
    annealed, fixed = PPO(PPOConfig(anneal=True, clip_coef=0.2)), PPO(PPOConfig(clip_coef=0.2))
    coefficients = [annealed.clip_coefficient(State(progress=progress)) for progress in (0.0, 0.25, 1.0)]
    assert coefficients == pytest.approx([0.2, 0.15, 0.0])
    assert fixed.clip_coefficient(State(progress=0.9)) == 0.2
    batch = minibatch(old=[0.5], advantages=[1.0])
    loss, _ = losses(batch, new=[0.8], anneal=True, clip_coef=0.2, state=State(progress=0.5))
    assert loss["policy"] == pytest.approx(-1.1)


def test_an_update_is_over_beyond_the_target_kl() -> None:
    limited = PPO(PPOConfig(target_kl=0.02))
    assert [limited.update_is_over(State(), {"approx_kl": kl}) for kl in (0.01, 0.02, 0.03)] == [False, False, True]
    assert not PPO(PPOConfig()).update_is_over(State(), {"approx_kl": 1e9})


def test_a_setting_changed_in_a_run_counts_from_then_on() -> None:
    task = PPO(PPOConfig(clip_coef=0.2, num_update_epochs=4))
    task.reconfigure(PPOConfig(clip_coef=0.1, num_update_epochs=2, minibatch_size=7))
    assert (task.clip_coefficient(State()), task.num_update_epochs, task.minibatch_size) == (0.1, 2, 256)


def three_trajectories() -> TrajectoryBatch:
    """Two rows that terminate, one that is truncated, two that are cut; see test_returns.py for the numbers."""
    return TrajectoryBatch(
        observations=np.zeros((5, 2), np.float32),
        actions=np.zeros(5, np.int64),
        log_probs=np.zeros(5, np.float32),
        rewards=np.array([1, 2, 1, 0, 3], np.float32),
        terminated=np.array([0, 1, 0, 0, 0], np.bool_),
        truncated=np.array([0, 0, 1, 0, 0], np.bool_),
        versions=np.zeros(5, np.int64),
        ends=np.array([0, 1, 1, 0, 1], np.bool_),
        starts=np.array([0, 2, 3]),
        lengths=np.array([2, 1, 2]),
        environments=np.array([0, 0, 1]),
        bootstrap_rows=np.array([2, 4]),
        bootstrap_observations=np.zeros((2, 2), np.float32),
        final_rows=np.array([1, 2]),
        final_observations=np.zeros((2, 2), np.float32),
    )


def test_the_dataset_has_advantages_and_returns() -> None:
    task, batch = PPO(PPOConfig(gamma=0.5, gae_lambda=0.5)), three_trajectories()
    batch.set_values(np.array([1, 1, 2, 1, 2], np.float32), np.array([4, 2], np.float32))
    batch.extras["start_log_probs"] = np.full(5, -0.5, np.float32)
    dataset = task.build_rl_dataset(task.postprocess_trajectories(batch))
    assert dataset["advantages"].tolist() == [0.75, 1.0, 1.0, 0.5, 2.0]
    assert dataset["returns"].tolist() == [1.75, 2.0, 3.0, 1.5, 4.0]
    assert dataset["start_log_probs"].tolist() == [-0.5] * 5
    # the residuals are the advantages: mean 1.05, variance 1.3125 - 1.05² + ...; returns: mean 2.45
    residual = np.var([0.75, 1.0, 1.0, 0.5, 2.0])
    assert task.take_logged() == {
        "explained_variance": pytest.approx(1 - residual / np.var([1.75, 2.0, 3.0, 1.5, 4.0]), rel=1e-5)
    }


class Bandit(nn.Module):
    """Two states, three arms, a table of logits and values."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2, 3))
        self.values = nn.Parameter(torch.zeros(2))

    def forward(self, observations: Tensor) -> tuple[Categorical, Tensor]:
        return Categorical(self.logits[observations]), self.values[observations]


@pytest.mark.parametrize("lag", [False, True])
def test_it_learns_which_arm_pays(lag: bool) -> None:
    task, bandit, state = PPO(PPOConfig(gamma=0.0)), Bandit(), State()
    optimizer = torch.optim.SGD(bandit.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(0)
    best = torch.tensor([2, 0])
    for _ in range(60):
        observations = torch.arange(64) % 2
        with torch.no_grad():
            distribution, values = bandit(observations)
            # with lag, what acts is a blunter policy than what is learned
            behaviour = Categorical(0.5 * distribution.log_probabilities) if lag else distribution
            actions = behaviour.sample(torch.rand(64, generator=generator))
        returns = (actions == best[observations]).float()
        batch = {
            "observations": observations, "actions": actions, "log_probs": behaviour.log_prob(actions),
            "values": values, "returns": returns, "advantages": returns - values, "weights": torch.ones(64),
        }  # fmt: skip
        if lag:
            batch["start_log_probs"] = distribution.log_prob(actions)
        for _ in range(4):
            loss = task.compute_loss(bandit, batch, state, task.run_model(bandit, batch, state))
            optimizer.zero_grad()
            torch.autograd.backward(sum(loss.values(), start=torch.zeros(())))
            optimizer.step()
    probabilities = bandit(torch.tensor([0, 1]))[0].probabilities()
    assert probabilities[0, 2] > 0.9
    assert probabilities[1, 0] > 0.9
