from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from aiorl.compute.distributions import Categorical

INF = float("inf")
JUST_BELOW_ONE = 1.0 - 2.0**-53


def of_probabilities(*probabilities: float, rows: int = 1) -> Categorical:
    return Categorical(torch.tensor([probabilities]).log().expand(rows, -1))


def draw(logits: list[float], noise: float, dtype: torch.dtype = torch.float64) -> int:
    return int(Categorical(torch.tensor([logits])).sample(torch.tensor([noise], dtype=dtype)))


def test_sample_inverts_the_cumulative_distribution() -> None:
    noise = torch.tensor([0.0, 0.2499, 0.2501, 0.4999, 0.5001, 0.9999])
    actions = of_probabilities(0.25, 0.25, 0.5, rows=6).sample(noise)
    assert actions.tolist() == [0, 0, 1, 1, 2, 2]
    assert actions.dtype == torch.int64


def test_each_row_has_its_own_distribution() -> None:
    distribution = Categorical(torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]]).log())
    assert distribution.sample(torch.tensor([0.3, 0.3, 0.6])).tolist() == [0, 1, 1]


def test_an_action_depends_on_nothing_but_its_logits_and_noise() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, noise = torch.randn(512, 7, generator=generator), torch.rand(512, generator=generator)
    order = torch.randperm(512, generator=generator)
    state = torch.get_rng_state()
    together = Categorical(logits).sample(noise)
    assert torch.equal(Categorical(logits[order]).sample(noise[order]), together[order])
    assert torch.equal(Categorical(logits[100:101]).sample(noise[100:101]), together[100:101])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fixed_grid_of_noise_gives_each_action_its_share() -> None:
    probabilities, rows = (0.05, 0.5, 0.1, 0.35), 10_000
    noise = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    counts = of_probabilities(*probabilities, rows=rows).sample(noise).bincount(minlength=4).tolist()
    assert counts == [500, 5000, 1000, 3500]


def test_frequencies_pass_a_chi_square_test() -> None:
    probabilities, rows = np.array([0.02, 0.38, 0.25, 0.05, 0.3]), 50_000
    noise = np.random.Generator(np.random.Philox(7)).random(rows)
    counts = of_probabilities(*probabilities, rows=rows).sample(torch.from_numpy(noise)).bincount(minlength=5).numpy()
    statistic = float(((counts - rows * probabilities) ** 2 / (rows * probabilities)).sum())
    assert statistic < 18.47  # exceeded by one in a thousand, at 4 degrees of freedom


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.0, 1.0 - 2.0**-24, JUST_BELOW_ONE, 1.0])
def test_a_masked_action_is_never_drawn(noise: float, dtype: torch.dtype) -> None:
    assert draw([0.0, -INF], noise, dtype) == 0
    assert draw([-INF, 0.0], noise, dtype) == 1
    assert draw([-INF, 0.0, -INF], noise, dtype) == 1


def test_noise_of_one_yields_the_last_possible_action() -> None:
    assert draw([0.0, 0.0, 0.0], 1.0) == 2
    assert draw([0.0, 0.0, -INF], 1.0) == 1
    assert draw([5.0], 1.0) == 0


def test_rounding_never_yields_an_action_beyond_the_last() -> None:
    logits = torch.randn(4096, 33, generator=torch.Generator().manual_seed(0))
    logits[:, -1] = -INF
    assert Categorical(logits).sample(torch.full((4096,), JUST_BELOW_ONE, dtype=torch.float64)).max() == 31


def test_an_improbable_action_keeps_its_due() -> None:
    # exp(-30) is 9.4e-14: less than float32 can tell from nothing beside 1, more than the last step of float64 noise.
    assert draw([0.0, -30.0], JUST_BELOW_ONE) == 1
    assert draw([0.0, -30.0], 1.0 - 1e-12) == 0
    assert draw([-30.0, 0.0], 1e-14) == 0
    assert draw([-30.0, 0.0], 1e-12) == 1
    assert draw([0.0, -200.0], JUST_BELOW_ONE) == 0


def test_large_logits() -> None:
    distribution = Categorical(torch.tensor([[1e4, 1e4 - 1.0, -1e4], [3e38, -3e38, 0.0]]))
    expected = [-math.log1p(math.exp(-1.0)), -1.0 - math.log1p(math.exp(-1.0))]
    assert distribution.log_prob(torch.tensor([0, 0])).tolist() == pytest.approx([expected[0], 0.0], abs=1e-6)
    assert distribution.log_prob(torch.tensor([1, 0]))[0].item() == pytest.approx(expected[1], abs=1e-6)
    assert distribution.entropy().tolist() == pytest.approx([0.582203, 0.0], abs=1e-6)
    assert distribution.sample(torch.tensor([0.9, 0.999999])).tolist() == [1, 0]


def test_log_prob_and_entropy_by_hand() -> None:
    distribution = of_probabilities(0.5, 0.25, 0.25, rows=3)
    log_probs = distribution.log_prob(torch.tensor([0, 1, 2], dtype=torch.int32))
    assert log_probs.tolist() == pytest.approx([-0.693147, -1.386294, -1.386294], abs=1e-6)
    assert distribution.entropy().tolist() == pytest.approx([1.5 * 0.693147] * 3, abs=1e-6)
    assert distribution.probabilities()[0].tolist() == pytest.approx([0.5, 0.25, 0.25])
    assert of_probabilities(*[0.2] * 5).entropy().item() == pytest.approx(math.log(5))


def test_adding_a_constant_to_the_logits_changes_nothing() -> None:
    distribution, shifted = (Categorical(torch.tensor([[1.0, 2.0, 4.0]]) + shift) for shift in (0.0, 64.0))
    assert torch.equal(distribution.log_probabilities, shifted.log_probabilities)


def test_mode_is_the_first_of_the_most_probable() -> None:
    assert Categorical(torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0]])).mode().tolist() == [1, 0]


def test_a_masked_action_leaves_entropy_and_gradients_finite() -> None:
    logits = torch.tensor([[0.0, -INF, 0.0]], requires_grad=True)
    distribution = Categorical(logits)
    entropy = distribution.entropy()
    assert entropy.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad((entropy + distribution.log_prob(torch.tensor([0]))).sum(), [logits])
    assert gradient.tolist() == [pytest.approx([0.5, 0.0, -0.5])]
    assert distribution.log_prob(torch.tensor([1])).item() == -INF


def test_the_gradient_of_log_prob_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().requires_grad_()
    (gradient,) = torch.autograd.grad(Categorical(logits).log_prob(torch.tensor([1])).sum(), [logits])
    assert gradient.tolist() == [pytest.approx([-0.5, 0.75, -0.25])]  # one-hot minus probabilities


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_taken_to_float32(dtype: torch.dtype, computed: torch.dtype) -> None:
    distribution = Categorical(torch.zeros(2, 3, dtype=dtype))
    assert distribution.entropy().dtype == distribution.log_prob(torch.tensor([0, 1])).dtype == computed


def test_an_empty_batch() -> None:
    distribution = Categorical(torch.empty(0, 3))
    assert (
        distribution.sample(torch.empty(0)).shape == distribution.mode().shape == distribution.entropy().shape == (0,)
    )


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (5, 0)])
def test_logits_that_are_no_matrix_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"logits must be \[rows, actions\]"):
        Categorical(torch.zeros(shape))


def test_noise_and_actions_of_another_shape_are_refused() -> None:
    distribution = Categorical(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"noise must be \[2\], not \[2, 1\]"):
        distribution.sample(torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"actions must be \[2\], not \[3\]"):
        distribution.log_prob(torch.zeros(3))
