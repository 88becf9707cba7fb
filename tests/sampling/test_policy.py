from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from aiorl.environments.spaces import ArraySpec, EnvironmentInfo
from aiorl.models.config import MLPConfig
from aiorl.models.mlp import ACTIVATIONS, MLP
from aiorl.sampling.policy import NUMPY_ACTIVATIONS, NumpyActing, Policy, TorchActing

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from aiorl.compute.distributions import Categorical
    from aiorl.sampling.policy import Acting

CPU = torch.device("cpu")


def mlp(
    *, activation: str = "tanh", shape: tuple[int, ...] = (4,), dtype: str = "float32", num_actions: int = 5
) -> MLP:
    info = EnvironmentInfo(
        observation=ArraySpec(shape, dtype),
        action=ArraySpec((), "int64"),
        num_actions=num_actions,
        autoreset="same_step",
        max_episode_steps=None,
    )
    torch.manual_seed(3)
    model = MLP(info, MLPConfig.model_validate({"name": "mlp", "activation": activation, "hidden_sizes": (32, 16)}))
    with torch.no_grad():
        model.policy_head.weight.mul_(200.0)  # far from uniform
        for layer in model.policy_layers():
            layer.bias.normal_()
    return model


def get_actions(model: nn.Module, observations: Tensor, optimal: bool) -> Categorical:
    assert isinstance(model, MLP)
    return model.policy(observations)


def in_numpy(model: MLP) -> NumpyActing:
    return NumpyActing(model.policy_layers(), model.activation)


def in_torch(model: MLP) -> TorchActing:
    return TorchActing(model, get_actions, CPU)


BACK_ENDS = pytest.mark.parametrize("back_end", [in_numpy, in_torch])


def plain(model: MLP, observations: NDArray[Any]) -> NDArray[np.float64]:
    """Log-probabilities ``[B, A]``, in float64 by the model's own activation."""
    features = torch.tensor(observations.reshape(len(observations), -1)).double()
    *hidden, last = model.policy_layers()
    for layer in hidden:
        features = ACTIVATIONS[model.activation](features @ layer.weight.T.double() + layer.bias.double())
    logits = features @ last.weight.T.double() + last.bias.double()
    log_probs: NDArray[np.float64] = (logits - logits.logsumexp(1, keepdim=True)).detach().numpy()
    return log_probs


def drawn(log_probs: NDArray[np.float64], noise: NDArray[np.float64]) -> tuple[list[int], NDArray[np.bool_]]:
    """The action of each row, in plain loops, and whether the noise is far enough from where it would be another."""
    actions, clear = [], []
    for row, number in zip(np.exp(log_probs).tolist(), noise.tolist(), strict=True):
        total, action = 0.0, len(row) - 1
        edges = []
        for index, probability in enumerate(row):
            total += probability
            edges.append(total)
            if number < total:
                action = min(action, index)
        actions.append(action)
        clear.append(all(abs(number - edge) > 1e-5 for edge in edges))
    return actions, np.array(clear)


def test_both_know_the_same_activations() -> None:
    assert NUMPY_ACTIVATIONS.keys() == ACTIVATIONS.keys()


@BACK_ENDS
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_actions_and_log_probabilities_are_the_models(back_end: Any, activation: str) -> None:
    model = mlp(activation=activation)
    acting: Acting = back_end(model)
    rng = np.random.default_rng(1)
    observations = (rng.normal(size=(2000, 4)) * 3).astype(np.float32)
    noise = rng.random(2000)
    actions, log_probs = acting.act(observations, noise, optimal=False)
    assert [actions.dtype.name, log_probs.dtype.name] == ["int64", "float32"]
    expected = plain(model, observations)
    wanted, clear = drawn(expected, noise)
    assert clear.mean() > 0.99
    assert actions[clear].tolist() == np.array(wanted)[clear].tolist()
    assert len(set(actions.tolist())) == 5
    np.testing.assert_allclose(log_probs, expected[np.arange(2000), actions], atol=2e-4)


@pytest.mark.parametrize("num_rows", [1, 511, 512, 513, 1024, 4000, 30_000])
def test_numpy_multiplies_rows_in_blocks_without_a_difference(num_rows: int) -> None:
    model = mlp()  # its largest layer, 32 x 16, takes 512 rows on one thread
    rng = np.random.default_rng(2)
    observations = rng.normal(size=(num_rows, 4)).astype(np.float32)
    actions, log_probs = in_numpy(model).act(observations, rng.random(num_rows), optimal=False)
    np.testing.assert_allclose(log_probs, plain(model, observations)[np.arange(num_rows), actions], atol=2e-4)


def test_numpy_acts_on_the_calling_thread_alone() -> None:
    acting = in_numpy(mlp())
    observations, noise = np.ones((4096, 4), np.float32), np.zeros(4096)
    acting.act(observations, noise, optimal=False)
    ratios = []
    for _ in range(8):  # an earlier test's BLAS may have threads that spin for another moment
        alone, together = time.thread_time(), time.process_time()
        for _ in range(50):
            acting.act(observations, noise, optimal=False)
        ratios.append((time.process_time() - together) / (time.thread_time() - alone))
    assert min(ratios) < 1.3


@BACK_ENDS
def test_optimal_actions_are_the_most_probable_whatever_the_noise(back_end: Any) -> None:
    model = mlp()
    observations = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    expected = plain(model, observations)
    for noise in (np.zeros(100), np.full(100, 0.999)):
        actions, log_probs = back_end(model).act(observations, noise, optimal=True)
        assert actions.tolist() == expected.argmax(1).tolist()
        np.testing.assert_allclose(log_probs, expected.max(1), atol=1e-4)


@BACK_ENDS
@pytest.mark.parametrize(
    ("shape", "dtype"), [((), "float32"), ((2, 3), "float64"), ((3,), "int64"), ((4,), "uint8"), ((2,), "bool")]
)
def test_every_shape_and_dtype_of_observations(back_end: Any, shape: tuple[int, ...], dtype: str) -> None:
    model = mlp(shape=shape, dtype=dtype)
    observations = np.random.default_rng(0).integers(0, 2, (50, *shape)).astype(dtype)
    _, log_probs = back_end(model).act(observations, np.full(50, 0.5), optimal=True)
    np.testing.assert_allclose(log_probs, plain(model, observations).max(1), atol=1e-4)


@BACK_ENDS
def test_double_precision_weights_are_acted_with_in_double_precision(back_end: Any) -> None:
    model = mlp().double()
    observations = np.random.default_rng(0).normal(size=(50, 4))
    _, log_probs = back_end(model).act(observations, np.full(50, 0.5), optimal=True)
    np.testing.assert_allclose(log_probs, plain(model, observations).max(1), rtol=1e-6)


@BACK_ENDS
def test_the_extremes_of_the_noise_give_actions_that_exist(back_end: Any) -> None:
    model = mlp()
    observations = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32) * 50
    for number in (0.0, np.nextafter(1.0, 0.0)):
        actions, log_probs = back_end(model).act(observations, np.full(200, number), optimal=False)
        assert actions.min() >= 0
        assert actions.max() <= 4
        assert np.isfinite(log_probs).all()


@BACK_ENDS
def test_rows_and_their_order_do_not_depend_on_the_batch(back_end: Any) -> None:
    model = mlp()
    rng = np.random.default_rng(0)
    observations, noise = rng.normal(size=(60, 4)).astype(np.float32), rng.random(60)
    _, clear = drawn(plain(model, observations), noise)
    together, _ = back_end(model).act(observations, noise, optimal=False)
    apart = np.concatenate(
        [back_end(model).act(observations[rows], noise[rows], optimal=False)[0] for rows in (slice(25), slice(25, 60))]
    )
    assert together[clear].tolist() == apart[clear].tolist()


@BACK_ENDS
def test_acting_changes_neither_what_it_is_given_nor_the_model(back_end: Any) -> None:
    model = mlp()
    before = [tensor.clone() for tensor in model.state_dict().values()]
    observations, noise = np.ones((3, 4), np.float32), np.full(3, 0.5)
    observations.flags.writeable = noise.flags.writeable = False  # frames of a message
    back_end(model).act(observations, noise, optimal=False)
    assert all(torch.equal(old, new) for old, new in zip(before, model.state_dict().values(), strict=True))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_task_may_choose_its_actions_itself() -> None:
    def own(model: nn.Module, observations: Tensor, optimal: bool) -> tuple[Tensor, Tensor]:
        assert not torch.is_grad_enabled()
        return torch.full((len(observations),), int(optimal), dtype=torch.int32), observations.double().sum(1)

    acting = TorchActing(mlp(), own, CPU)
    actions, log_probs = acting.act(np.ones((2, 4), np.float32), np.zeros(2), optimal=True)
    assert [actions.dtype.name, log_probs.dtype.name] == ["int64", "float32"]
    assert actions.tolist() == [1, 1]
    assert log_probs.tolist() == [4.0, 4.0]


# ---------------------------------------------------------------------- versions
@BACK_ENDS
@pytest.mark.parametrize("optimal", [False, True])
def test_weights_and_version_change_only_by_activating(back_end: Any, optimal: bool) -> None:
    model = mlp()
    policy = Policy(back_end(model), optimal=optimal, version=4)
    observations, noise = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32), np.full(64, 0.3)

    def log_probs() -> tuple[list[float], int]:
        _, values, versions = policy.act((observations, noise))
        assert versions.dtype == np.int64
        [version] = set(versions.tolist())
        return values.tolist(), version

    first = log_probs()
    assert first[1] == policy.version == policy.published == 4
    with torch.no_grad():
        model.policy_head.bias.add_(torch.arange(5.0))  # the learner's weights move under it
    assert log_probs() == first
    policy.publish(5, policy.snapshot())
    assert (policy.version, policy.published) == (4, 5)
    assert log_probs() == first
    with torch.no_grad():
        model.policy_head.bias.zero_()  # what was published is a copy
    policy.activate()
    second = log_probs()
    assert second[1] == policy.version == 5
    assert second[0] != first[0]
    policy.publish(6, policy.snapshot())
    policy.publish(7, policy.snapshot())
    policy.activate()
    third = log_probs()
    assert third[1] == 7
    assert third[0] != second[0]
    policy.activate()
    assert log_probs() == third
    fresh = Policy(back_end(model), optimal=optimal).act((observations, noise))
    assert third[0] == fresh[1].tolist()


def test_a_shared_trunk_is_published_whole() -> None:
    info = EnvironmentInfo(ArraySpec((4,), "float32"), ArraySpec((), "int64"), 3, "same_step", None)
    model = MLP(info, MLPConfig(name="mlp", shared_trunk=True))
    policy = Policy(in_torch(model), optimal=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    policy.publish(1, policy.snapshot())
    policy.activate()
    observations = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    _, log_probs, _ = policy.act((observations, np.zeros(20)))
    np.testing.assert_allclose(log_probs, plain(model, observations).max(1), atol=1e-4)
