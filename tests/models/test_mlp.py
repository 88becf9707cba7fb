from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from aiorl.environments.spaces import ArraySpec, EnvironmentInfo
from aiorl.errors import ConfigError, UnsupportedSpace
from aiorl.models.base import build_model
from aiorl.models.config import MLPConfig, ModelConfig, OpenModelConfig
from aiorl.models.mlp import ACTIVATIONS, MLP

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray


def environment(
    shape: tuple[int, ...] = (4,), dtype: str = "float32", num_actions: int = 3, action_shape: tuple[int, ...] = ()
) -> EnvironmentInfo:
    return EnvironmentInfo(
        observation=ArraySpec(shape, dtype),
        action=ArraySpec(action_shape, "int64"),
        num_actions=num_actions,
        autoreset="same_step",
        max_episode_steps=None,
    )


def in_plain_loops(model: MLP, observation: NDArray[Any]) -> list[float]:
    """Log-probabilities of one row, from the module's own description and the formulas of the activations."""
    activations: dict[str, Callable[[float], float]] = {
        "tanh": math.tanh,
        "relu": lambda x: max(x, 0.0),
        "elu": lambda x: x if x > 0 else math.exp(x) - 1.0,
        "gelu": lambda x: 0.5 * x * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
        "silu": lambda x: x / (1.0 + math.exp(-x)),
    }
    features = [float(feature) for feature in observation.flatten()]
    layers = model.policy_layers()
    for index, layer in enumerate(layers):
        weight, bias = layer.weight.tolist(), layer.bias.tolist()
        features = [
            sum(w * x for w, x in zip(row, features, strict=True)) + b for row, b in zip(weight, bias, strict=True)
        ]
        if index < len(layers) - 1:
            features = [activations[model.activation](x) for x in features]
    total = math.log(sum(math.exp(logit) for logit in features))
    return [logit - total for logit in features]


@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "gelu", "silu"])
@pytest.mark.parametrize("shared_trunk", [False, True])
def test_the_policy_is_what_its_layers_say(activation: Any, shared_trunk: bool) -> None:
    torch.manual_seed(0)
    model = MLP(environment(), MLPConfig(hidden_sizes=(8, 5), activation=activation, shared_trunk=shared_trunk))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1.0, 1.0)
        observations = torch.randn(6, 4)
        log_probabilities = model.policy(observations).log_probabilities
    for row, observation in enumerate(observations.numpy()):
        assert log_probabilities[row].tolist() == pytest.approx(in_plain_loops(model, observation), abs=1e-5)


def test_every_activation_of_the_configuration_is_there() -> None:
    assert set(ACTIVATIONS) == {"tanh", "relu", "elu", "gelu", "silu"}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3), "float64"),
        ((2, 3), "uint8"),
        ((2, 3), "int64"),
        ((2, 3), "bool"),
        ((), "int32"),
        ((2, 1, 2), "float16"),
    ],
)
def test_observations_of_any_shape_and_number_type(shape: tuple[int, ...], dtype: str) -> None:
    model = MLP(environment(shape, dtype), MLPConfig(hidden_sizes=(4,)))
    observations = (np.arange(5 * math.prod(shape)).reshape(5, *shape) % 2).astype(dtype)
    distribution, values = model(torch.from_numpy(observations))
    assert distribution.log_probabilities.shape == (5, 3)
    assert values.shape == (5,)
    assert distribution.log_probabilities[1].tolist() == pytest.approx(in_plain_loops(model, observations[1]), abs=1e-6)


def test_a_batch_of_no_rows() -> None:
    distribution, values = MLP(environment((2, 3)), MLPConfig())(torch.empty(0, 2, 3))
    assert distribution.log_probabilities.shape == (0, 3)
    assert values.shape == (0,)


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_forward_is_policy_and_value(shared_trunk: bool) -> None:
    model = MLP(environment(), MLPConfig(shared_trunk=shared_trunk))
    observations = torch.randn(7, 4)
    distribution, values = model(observations)
    assert torch.equal(distribution.log_probabilities, model.policy(observations).log_probabilities)
    assert torch.equal(values, model.value(observations))


def test_a_shared_trunk_is_shared_and_a_separate_one_is_not() -> None:
    def num_parameters(shared_trunk: bool) -> int:
        model = MLP(environment(), MLPConfig(hidden_sizes=(8, 6), shared_trunk=shared_trunk))
        return sum(parameter.numel() for parameter in model.parameters())

    trunk, heads = (4 * 8 + 8) + (8 * 6 + 6), (6 * 3 + 3) + (6 + 1)
    assert num_parameters(shared_trunk=True) == trunk + heads
    assert num_parameters(shared_trunk=False) == 2 * trunk + heads


def test_value_and_policy_gradients_meet_only_in_a_shared_trunk() -> None:
    for shared_trunk in (False, True):
        model = MLP(environment(), MLPConfig(shared_trunk=shared_trunk))
        gradients = torch.autograd.grad(
            model.value(torch.randn(3, 4)).sum(), model.policy_layers()[0].weight, allow_unused=True
        )
        assert (gradients[0] is not None) == shared_trunk


def test_weights_start_orthogonal() -> None:
    model = MLP(environment(num_actions=5), MLPConfig(hidden_sizes=(64, 64)))
    first, second, head = model.policy_layers()
    identity = torch.eye
    assert torch.allclose(first.weight.T @ first.weight, 2.0 * identity(4), atol=1e-5)  # gain √2, squared
    assert torch.allclose(second.weight @ second.weight.T, 2.0 * identity(64), atol=1e-5)
    assert torch.allclose(head.weight @ head.weight.T, 1e-4 * identity(5), atol=1e-8)
    assert torch.allclose(model.value_head.weight @ model.value_head.weight.T, identity(1), atol=1e-5)
    assert all(not parameter.any() for name, parameter in model.named_parameters() if name.endswith("bias"))
    probabilities = model.policy(torch.randn(100, 4)).probabilities()
    assert probabilities.sub(0.2).abs().max() < 0.05


def test_weights_are_a_function_of_torchs_seed() -> None:
    def weights() -> torch.Tensor:
        torch.manual_seed(11)
        return torch.nn.utils.parameters_to_vector(MLP(environment(), MLPConfig()).parameters())

    assert torch.equal(weights(), weights())


def test_no_hidden_layer_is_a_linear_policy() -> None:
    model = MLP(environment(), MLPConfig(hidden_sizes=()))
    assert [tuple(layer.weight.shape) for layer in model.policy_layers()] == [(3, 4)]
    assert model(torch.zeros(2, 4))[1].shape == (2,)


def test_double_precision_weights_take_observations_to_double() -> None:
    model = MLP(environment(dtype="uint8"), MLPConfig()).double()
    distribution, values = model(torch.zeros(2, 4, dtype=torch.uint8))
    assert distribution.log_probabilities.dtype == values.dtype == torch.float64


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (environment(dtype="complex64"), "not of complex64"),
        (environment(dtype="<U8"), "takes observations of floats, integers or booleans"),
        (environment(shape=(3, 0)), r"their shape is \(3, 0\)"),
        (environment(action_shape=(2,)), r"one of a number of discrete actions.*\(2,\)"),
        (environment(num_actions=0), "0 choices"),
    ],
)
def test_what_it_cannot_take_is_refused(info: EnvironmentInfo, message: str) -> None:
    with pytest.raises(UnsupportedSpace, match=message):
        MLP(info, MLPConfig())


def test_build_by_name() -> None:
    model = build_model(MLPConfig(hidden_sizes=(16,)), environment())
    assert isinstance(model, MLP)
    assert [tuple(layer.weight.shape) for layer in model.policy_layers()] == [(16, 4), (3, 16)]


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models_of_test_mlp.py").write_text(
        "import torch\n"
        "from aiorl.errors import UnsupportedSpace\n"
        "from aiorl.compute.distributions import Categorical\n"
        "from aiorl.models.base import Model\n"
        "from aiorl.models.mlp import MLP\n"
        "class Constant(Model):\n"
        "    def __init__(self, info, *, level=0.0):\n"
        "        super().__init__()\n"
        "        self.num_actions, self.level = info.num_actions, level\n"
        "    def policy(self, observations):\n"
        "        return Categorical(torch.zeros(len(observations), self.num_actions))\n"
        "    def value(self, observations):\n"
        "        return torch.full((len(observations),), self.level)\n"
        "class Wider(MLP):\n"
        "    pass\n"
        "def not_a_model(info):\n"
        "    return 7\n"
        "class Raising(Wider):\n"
        "    def __init__(self, *arguments):\n"
        "        raise OSError('no weights today')\n"
        "class Leaving(Wider):\n"
        "    def __init__(self, *arguments):\n"
        "        raise SystemExit('off')\n"
        "class Choosy(Wider):\n"
        "    def __init__(self, *arguments):\n"
        "        raise UnsupportedSpace('too round')\n"
        "number = 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own_models")
def test_build_a_model_of_ones_own() -> None:
    name = "own_models_of_test_mlp:Constant"
    model = build_model(OpenModelConfig.model_validate({"name": name, "level": 2.5}), environment())
    distribution, values = model(torch.zeros(2, 4))  # the forward pass that Model puts together
    assert values.tolist() == [2.5, 2.5]
    assert distribution.entropy().tolist() == pytest.approx([math.log(3)] * 2)
    assert build_model(ModelConfig(name=name), environment()).value(torch.zeros(1, 4)).tolist() == [0.0]


@pytest.mark.usefixtures("own_models")
def test_a_subclass_of_a_built_in_model_takes_its_section() -> None:
    name = "own_models_of_test_mlp:Wider"
    assert ModelConfig.variant({"name": name}) is MLPConfig
    model = build_model(MLPConfig(name=name, hidden_sizes=(9,)), environment())
    assert type(model).__name__ == "Wider"
    assert isinstance(model, MLP)
    assert model.policy_layers()[0].weight.shape == (9, 4)


@pytest.mark.usefixtures("own_models")
@pytest.mark.parametrize(
    ("table", "path", "message"),
    [
        ({"name": "cnnn"}, "model.name", "cnnn"),
        ({"name": "no_such_module:Name"}, "model.name", "cannot be imported"),
        ({"name": "own_models_of_test_mlp:Constantt"}, "model.name", 'did you mean "Constant"'),
        ({"name": "own_models_of_test_mlp:Constant", "levle": 1}, "model", "levle"),
        ({"name": "own_models_of_test_mlp:not_a_model"}, "model.name", "is no model"),
        ({"name": "own_models_of_test_mlp:number"}, "model.name", "is no model"),
        ({"name": "own_models_of_test_mlp:Leaving"}, "model.name", "cannot be constructed: SystemExit: off"),
    ],
)
def test_a_model_that_cannot_be_built_is_a_fault(table: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(OpenModelConfig.model_validate(table), environment())
    assert [fault.path for fault in caught.value.faults] == [path]


@pytest.mark.usefixtures("own_models")
def test_a_constructor_that_raises_is_a_fault_that_tells_where() -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(MLPConfig(name="own_models_of_test_mlp:Raising"), environment())
    (fault,) = caught.value.faults
    assert fault.path == "model.name"
    head, place, line = fault.message.splitlines()
    assert head == "cannot be constructed: OSError: no weights today"
    assert re.search(r'own_models_of_test_mlp\.py", line \d+, in __init__$', place)
    assert line.strip() == "raise OSError('no weights today')"
    with pytest.raises(UnsupportedSpace, match="too round"):
        build_model(MLPConfig(name="own_models_of_test_mlp:Choosy"), environment())
