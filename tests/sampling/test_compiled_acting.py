"""Acting that torch compiles: the same actions as without, few shapes, and nothing compiled after the warm-up."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch._dynamo

from aiorl.compute.compiler import row_buckets
from aiorl.compute.config import CompilerConfig
from aiorl.environments.spaces import ArraySpec, EnvironmentInfo
from aiorl.models.config import MLPConfig
from aiorl.models.mlp import ACTIVATIONS, MLP
from aiorl.sampling.policy import CompiledActing, NumpyActing, Policy, TorchActing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from aiorl.compute.distributions import Categorical

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, as inductor is imported

CPU = torch.device("cpu")
COMPILER = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"


class Recording:
    """A compiler back end that compiles nothing, and notes the rows of what it is asked to compile and to compute."""

    def __init__(self) -> None:
        self.num_compiled = 0
        self.rows: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.num_compiled += 1

        def compute(*values: Any) -> Any:
            [observations] = [value for value in values if type(value) is torch.Tensor and value.ndim == 2]
            self.rows.append(len(observations))
            return graph.forward(*values)

        return compute


@pytest.fixture
def recording() -> Iterator[Recording]:
    """Known to torch as the back end "recording"."""
    back_end = Recording()
    torch._dynamo.reset()
    torch._dynamo.register_backend(back_end, name="recording")
    yield back_end
    del torch._dynamo.backends.registry._COMPILER_FNS["recording"]
    torch._dynamo.reset()


def mlp(*, activation: str = "tanh", hidden_sizes: tuple[int, ...] = (16,), num_actions: int = 5) -> MLP:
    info = EnvironmentInfo(ArraySpec((4,), "float32"), ArraySpec((), "int64"), num_actions, "same_step", None)
    torch.manual_seed(3)
    model = MLP(info, MLPConfig.model_validate({"activation": activation, "hidden_sizes": hidden_sizes}))
    with torch.no_grad():
        model.policy_head.weight.mul_(100.0)  # far from uniform
        for layer in model.policy_layers():
            layer.bias.normal_()
    return model


def get_actions(model: nn.Module, observations: Tensor, optimal: bool) -> Categorical:
    assert isinstance(model, MLP)
    return model.policy(observations)


def compiled_acting(model: MLP, max_rows: int, *, dtype: str = "float32", **compiler: Any) -> CompiledActing:
    config = CompilerConfig(model=True, **compiler)
    return CompiledActing(
        model, get_actions, CPU, compiler=config, observation=ArraySpec((4,), dtype), max_rows=max_rows
    )


def rows_of(num_rows: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num_rows, 4)) * 3).astype(np.float32), rng.random(num_rows)


def clear_of_edges(model: MLP, observations: NDArray[Any], noise: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where the noise is not within 1e-6 of where another action would be drawn."""
    with torch.no_grad():
        edges = model.policy(torch.tensor(observations)).probabilities().double().cumsum(1).numpy()
    clear: NDArray[np.bool_] = np.all(np.abs(edges - noise[:, None]) > 1e-6, axis=1)
    return clear


@pytest.mark.parametrize("optimal", [False, True])
@pytest.mark.parametrize(
    ("activation", "hidden_sizes"), [*((name, (16,)) for name in sorted(ACTIVATIONS)), ("tanh", ()), ("relu", (64, 32))]
)
def test_numpy_torch_and_compiled_act_alike(activation: str, hidden_sizes: tuple[int, ...], optimal: bool) -> None:
    model = mlp(activation=activation, hidden_sizes=hidden_sizes)
    compiled = compiled_acting(model, 500, backend="aot_eager", dynamic=True)
    compiled.warm_up(optimal)
    observations, noise = rows_of(500)
    clear = clear_of_edges(model, observations, noise)
    assert clear.mean() > 0.99
    in_torch = TorchActing(model, get_actions, CPU).act(observations, noise, optimal)
    assert len(set(in_torch[0].tolist())) >= 3
    for acting in (NumpyActing(model.policy_layers(), activation), compiled):
        actions, log_probs = acting.act(observations, noise, optimal)
        assert [actions.dtype.name, log_probs.dtype.name] == ["int64", "float32"]
        assert actions[clear].tolist() == in_torch[0][clear].tolist()
        np.testing.assert_allclose(log_probs[clear], in_torch[1][clear], atol=1e-4)


@pytest.mark.timeout(300)  # a first compilation on a machine takes half a minute
def test_what_a_real_compiler_makes_acts_alike_with_each_version_of_the_weights() -> None:
    model = mlp(activation="elu", hidden_sizes=(32, 16))
    compiled = compiled_acting(model, 8, backend=COMPILER, fullgraph=True)
    compiled.warm_up(optimal=False)
    for scale in (1.0, 0.5, -1.0):
        with torch.no_grad():
            model.policy_head.weight.mul_(scale)
        compiled.load(compiled.snapshot())
        for num_rows in (1, 5, 8):
            observations, noise = rows_of(num_rows, seed=num_rows)
            assert clear_of_edges(model, observations, noise).all()
            actions, log_probs = compiled.act(observations, noise, False)
            expected = TorchActing(model, get_actions, CPU).act(observations, noise, False)
            assert actions.tolist() == expected[0].tolist()
            np.testing.assert_allclose(log_probs, expected[1], atol=1e-5)


def test_few_shapes_are_seen_and_none_that_was_not_compiled_ahead(recording: Recording) -> None:
    model = mlp()
    compiled = compiled_acting(model, 100, backend="recording")
    compiled.warm_up(False)
    buckets = row_buckets(100)
    assert recording.num_compiled == len(buckets)
    assert recording.rows == [8, 16, 32, 64, 100]
    eager = TorchActing(model, get_actions, CPU)
    for num_rows in np.random.default_rng(1).integers(1, 101, 200).tolist():
        observations, noise = rows_of(num_rows, seed=num_rows)
        actions, log_probs = compiled.act(observations, noise, False)
        expected = eager.act(observations, noise, False)
        clear = clear_of_edges(model, observations, noise)
        assert len(actions) == len(log_probs) == num_rows
        assert actions[clear].tolist() == expected[0][clear].tolist()
        np.testing.assert_allclose(log_probs[clear], expected[1][clear], atol=1e-5)
    assert recording.num_compiled == len(buckets)
    assert set(recording.rows) == set(buckets)


def test_as_many_shapes_as_there_are_buckets_are_compiled_however_many_runs_there_were(recording: Recording) -> None:
    """Torch gives up on a function after eight variants, unless told otherwise."""
    for _ in range(3):
        compiled_acting(mlp(hidden_sizes=(4,)), 2048, backend="recording").warm_up(False)
    assert recording.rows == [*row_buckets(2048)] * 3


def test_a_batch_beyond_the_largest_is_computed_in_parts(recording: Recording) -> None:
    model = mlp()
    compiled = compiled_acting(model, 16, backend="recording")
    compiled.warm_up(True)
    del recording.rows[:]
    observations, noise = rows_of(37)
    actions, log_probs = compiled.act(observations, noise, True)
    expected = TorchActing(model, get_actions, CPU).act(observations, noise, True)
    assert recording.rows == [16, 16, 8]
    assert actions.tolist() == expected[0].tolist()
    np.testing.assert_allclose(log_probs, expected[1], atol=1e-5)


def test_dynamic_shapes_are_compiled_once_and_not_padded(recording: Recording) -> None:
    compiled = compiled_acting(mlp(), 100, backend="recording", dynamic=True)
    compiled.warm_up(False)
    num_compiled = recording.num_compiled
    assert num_compiled <= 2
    del recording.rows[:]
    for num_rows in (1, 8, 9, 33, 77, 100):
        actions, _ = compiled.act(*rows_of(num_rows), False)
        assert len(actions) == num_rows
    assert recording.rows == [8, 8, 9, 33, 77, 100]
    assert recording.num_compiled == num_compiled


def test_answers_are_not_overwritten_by_later_batches() -> None:
    model = mlp()
    compiled = compiled_acting(model, 16, backend="aot_eager")
    compiled.warm_up(False)
    for acting in (NumpyActing(model.policy_layers(), "tanh"), TorchActing(model, get_actions, CPU), compiled):
        policy = Policy(acting, optimal=False)
        first = policy.act(rows_of(12, seed=1))
        kept = [array.tolist() for array in first]
        policy.publish(1, policy.snapshot())
        policy.activate()
        policy.act(rows_of(12, seed=2))
        policy.act(rows_of(16, seed=3))
        assert [array.tolist() for array in first] == kept
