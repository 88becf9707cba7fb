from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from aiorl.config import load_config
from aiorl.environments.spaces import ArraySpec, EnvironmentInfo
from aiorl.errors import ConfigError, Fault, UnsupportedSpace
from aiorl.learning.acting import build_acting
from aiorl.models.base import build_model
from aiorl.models.cnn import CNN, NatureCNN
from aiorl.models.config import CNNConfig, NatureCNNConfig
from aiorl.sampling.policy import TorchActing
from aiorl.tasks.ppo import PPO


def environment(shape: tuple[int, ...] = (2, 9, 8), dtype: str = "uint8", num_actions: int = 3) -> EnvironmentInfo:
    return EnvironmentInfo(ArraySpec(shape, dtype), ArraySpec((), "int64"), num_actions, "same_step", None)


def images(num_rows: int, shape: tuple[int, ...] = (2, 9, 8)) -> Any:
    return np.random.default_rng(3).integers(0, 256, (num_rows, *shape), np.uint8)


SMALL = CNNConfig(channels=(3, 2), kernel_sizes=(3, 2), strides=(2, 1), hidden_sizes=(5,), activation="tanh")


def in_plain_loops(model: CNN, image: Any) -> tuple[list[float], float]:
    """Log-probabilities and value of one image of bytes, from the definition of a convolution."""
    maps = image.astype(np.float64) / 255
    for convolution in model.convolutions:
        assert isinstance(convolution, nn.Conv2d)
        weight, bias = convolution.weight.detach().double().numpy(), convolution.bias
        assert bias is not None
        side, stride = weight.shape[2], convolution.stride[0]
        height, width = ((size - side) // stride + 1 for size in maps.shape[1:])
        result = np.zeros((len(weight), height, width))
        for channel in range(len(weight)):
            for row in range(height):
                for column in range(width):
                    window = maps[:, row * stride : row * stride + side, column * stride : column * stride + side]
                    result[channel, row, column] = np.tanh((window * weight[channel]).sum() + bias[channel].item())
        maps = result
    features = maps.reshape(-1)
    for layer in model.hidden:
        assert isinstance(layer, nn.Linear)
        features = np.tanh(layer.weight.detach().double().numpy() @ features + layer.bias.detach().double().numpy())
    heads = [
        head.weight.detach().double().numpy() @ features + head.bias.detach().double().numpy()
        for head in (model.policy_head, model.value_head)
    ]
    return (heads[0] - np.log(np.exp(heads[0]).sum())).tolist(), float(heads[1][0])


def test_policy_and_value_are_what_the_layers_say() -> None:
    torch.manual_seed(0)
    model = CNN(environment(), SMALL)
    observations = images(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5)
        distribution, values = model(torch.from_numpy(observations))
    for row in range(4):
        log_probabilities, value = in_plain_loops(model, observations[row])
        assert distribution.log_probabilities[row].tolist() == pytest.approx(log_probabilities, abs=1e-5)
        assert values[row].item() == pytest.approx(value, abs=1e-5)


def test_forward_is_policy_and_value() -> None:
    model = CNN(environment(), SMALL)
    observations = torch.from_numpy(images(4))
    distribution, values = model(observations)
    assert torch.equal(distribution.log_probabilities, model.policy(observations).log_probabilities)
    assert torch.equal(values, model.value(observations))


def test_bytes_are_scaled_and_floats_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    of_bytes = CNN(environment(), SMALL)
    of_floats = CNN(environment(dtype="float32"), SMALL)
    of_floats.load_state_dict(of_bytes.state_dict())
    observations = images(4)
    scaled = torch.from_numpy(observations.astype(np.float32) / 255)
    expected = of_floats.policy(scaled).log_probabilities.tolist()
    found = of_bytes.policy(torch.from_numpy(observations)).log_probabilities.tolist()
    assert np.array(found) == pytest.approx(np.array(expected), abs=1e-6)


def test_a_batch_of_no_rows() -> None:
    distribution, values = CNN(environment(), SMALL)(torch.from_numpy(images(0)))
    assert distribution.log_probabilities.shape == (0, 3)
    assert values.shape == (0,)


def test_the_network_of_mnih_et_al() -> None:
    model = NatureCNN(environment((4, 84, 84), num_actions=6), NatureCNNConfig())
    # 32 filters over 8 by 8 pixels of 4 frames, 64 of side 4, 64 of side 3, 512 units over 7 by 7 by 64 numbers
    layers = (8 * 8 * 4 + 1) * 32, (4 * 4 * 32 + 1) * 64, (3 * 3 * 64 + 1) * 64, (7 * 7 * 64 + 1) * 512
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(layers) + 513 * 6 + 513
    assert model.activation == "relu"
    assert [tuple(parameter.shape) for name, parameter in model.named_parameters() if name.startswith("conv")] == [
        (32, 4, 8, 8), (32,), (64, 32, 4, 4), (64,), (64, 64, 3, 3), (64,),
    ]  # fmt: skip


def test_weights_start_orthogonal() -> None:
    model = NatureCNN(environment((4, 84, 84)), NatureCNNConfig())
    gains: dict[nn.Module, float] = {model.policy_head: 0.01**2, model.value_head: 1.0}
    for module in (*model.convolutions, *model.hidden, model.policy_head, model.value_head):
        assert isinstance(module, nn.Conv2d | nn.Linear)
        matrix = module.weight.detach().flatten(1)
        gain = gains.get(module, 2.0)
        assert torch.allclose(matrix @ matrix.T, gain * torch.eye(len(matrix)), atol=1e-4 * gain)
        assert module.bias is not None
        assert not module.bias.any()


def model_of(*overrides: str, info: EnvironmentInfo) -> Any:
    return build_model(load_config(None, overrides).model, info)


def test_models_are_built_by_name() -> None:
    info = environment((4, 84, 84), num_actions=6)
    assert type(model_of("model.name=nature_cnn", info=info)) is NatureCNN
    benchmark = 'model={name = "cnn", channels = [8], kernel_sizes = [8], strides = [8], hidden_sizes = []}'
    model = model_of(benchmark, info=info)
    assert type(model) is CNN
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    assert shapes == [(8, 4, 8, 8), (8,), (6, 800), (6,), (1, 800), (1,)]


def fault_of(name: str, info: EnvironmentInfo) -> Fault:
    with pytest.raises(ConfigError) as caught:
        model_of(f"model.name={name}", info=info)
    (fault,) = caught.value.faults
    return fault


@pytest.mark.parametrize("name", ["cnn", "nature_cnn"])
@pytest.mark.parametrize(("shape", "dtype"), [((4,), "float32"), ((84, 84), "uint8"), ((4, 84, 84), "int64")])
def test_what_is_no_image_is_a_fault(name: str, shape: tuple[int, ...], dtype: str) -> None:
    fault = fault_of(name, environment(shape, dtype))
    assert (fault.path, fault.value) == ("model.name", f'"{name}"')
    assert f"the shape {shape} and the type {dtype}" in fault.message
    assert '"mlp"' in fault.remedy


@pytest.mark.parametrize("shape", [(4, 30, 84), (210, 160, 3)])
def test_images_that_are_too_small_or_have_their_channels_last_are_a_fault(shape: tuple[int, ...]) -> None:
    fault = fault_of("nature_cnn", environment(shape))
    assert fault.path == "model.kernel_sizes"
    assert f"an observation of shape {shape}" in fault.message
    assert "[channels, height, width]" in fault.remedy


def test_actions_that_are_not_one_choice_are_refused() -> None:
    info = EnvironmentInfo(ArraySpec((2, 9, 8), "uint8"), ArraySpec((2,), "int64"), 0, "same_step", None)
    with pytest.raises(UnsupportedSpace, match="discrete actions"):
        CNN(info, SMALL)


def test_acting_takes_bytes_and_the_policy_head_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = CNN(environment(), SMALL)
    acting = build_acting(model, PPO(), torch.device("cpu"))
    assert isinstance(acting, TorchActing)
    seen = []
    policy = CNN.policy

    def watched(self: CNN, rows: torch.Tensor) -> Any:
        seen.append(rows.dtype)
        return policy(self, rows)

    monkeypatch.setattr(CNN, "policy", watched)
    monkeypatch.setattr(CNN, "value", None)
    observations = images(5)
    actions, log_probs = acting.act(observations, np.zeros(5), True)
    assert seen == [torch.uint8]
    for row in range(5):
        expected, _ = in_plain_loops(model, observations[row])
        assert actions[row] == int(np.argmax(expected))
        assert log_probs[row] == pytest.approx(max(expected), abs=1e-5)
