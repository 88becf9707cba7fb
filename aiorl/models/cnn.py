"""Convolutional networks over images.

An image is ``[channels, height, width]``: a stack of frames, as ALE's vector environment, EnvPool, or Gymnasium's
AtariPreprocessing and FrameStackObservation give it. Bytes stay bytes on their way through pages and batches to the
device, and become numbers from 0 to 1 here.

Dimensions: B rows, C channels, H height and W width of an image, F features of the trunk, A actions.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor, nn

from aiorl.compute.distributions import Categorical
from aiorl.errors import ConfigError, Fault, UnsupportedSpace
from aiorl.models.base import Model, orthogonal
from aiorl.models.config import CNNConfig, NatureCNNConfig
from aiorl.models.mlp import ACTIVATIONS

if TYPE_CHECKING:
    from aiorl.environments.spaces import EnvironmentInfo


class CNN(Model):
    """A policy and a value function on one trunk of convolutions and linear layers.

    Weights start orthogonal, with the gains that PPO is used with on Atari (Huang et al. 2022, "The 37 implementation
    details of proximal policy optimization"): √2 in the trunk, 0.01 in the policy head, 1 in the value head; biases start
    at 0. They are drawn from torch's global generator: see `aiorl.models.base.build_model`.

    Attributes:
        activation: Name of the non-linearity after each layer of the trunk, a key of `aiorl.models.mlp.ACTIVATIONS`.
        convolutions: From images ``[B, C, H, W]`` to feature maps.
        hidden: The linear layers from flattened feature maps to features ``[B, F]``.
        policy_head: The layer that gives the logits.
        value_head: The layer that gives the value.
    """

    Config: ClassVar[type[CNNConfig | NatureCNNConfig]] = CNNConfig

    def __init__(self, info: EnvironmentInfo, config: CNNConfig) -> None:
        """Builds the layers that fit an environment.

        Args:
            info: The environment's observations and actions.
            config: The layers.

        Raises:
            ConfigError: Observations are no images, or too small for the convolutions.
            UnsupportedSpace: The actions are not one discrete choice.
        """
        super().__init__()
        _check_spaces(info, config.name)
        self.activation = config.activation
        self._is_bytes = info.observation.dtype == "uint8"
        depths = (info.observation.shape[0], *config.channels)
        layers = zip(itertools.pairwise(depths), config.kernel_sizes, config.strides, strict=True)
        self.convolutions = nn.ModuleList(
            orthogonal(nn.Conv2d(*channels, kernel_size, stride), math.sqrt(2.0))
            for channels, kernel_size, stride in layers
        )
        sizes = (_num_features(info.observation.shape, config), *config.hidden_sizes)
        self.hidden = nn.ModuleList(
            orthogonal(nn.Linear(fan_in, fan_out), math.sqrt(2.0)) for fan_in, fan_out in itertools.pairwise(sizes)
        )
        self.policy_head = orthogonal(nn.Linear(sizes[-1], info.num_actions), 0.01)
        self.value_head = orthogonal(nn.Linear(sizes[-1], 1), 1.0)

    def policy(self, observations: Tensor) -> Categorical:
        """The distribution over actions; ``observations`` as in `aiorl.models.base.Model.policy`."""
        return Categorical(self.policy_head(self._features(observations)))

    def value(self, observations: Tensor) -> Tensor:
        """The value of each observation, floating ``[B]``."""
        value: Tensor = self.value_head(self._features(observations))
        return value.squeeze(1)

    def forward(self, observations: Tensor) -> tuple[Categorical, Tensor]:
        """Both, passing through the trunk once."""
        features = self._features(observations)
        return Categorical(self.policy_head(features)), self.value_head(features).squeeze(1)

    def _features(self, observations: Tensor) -> Tensor:
        activate = ACTIVATIONS[self.activation]
        features = observations.to(self.policy_head.weight.dtype)
        if self._is_bytes:
            features.div_(255.0)  # in place: a second array of 1,024 images costs 4 times as much on a CPU
        for convolution in self.convolutions:
            features = activate(convolution(features))
        features = features.flatten(1)
        for layer in self.hidden:
            features = activate(layer(features))
        return features


class NatureCNN(CNN):
    """The network of Mnih et al. 2015, "Human-level control through deep reinforcement learning"."""

    Config: ClassVar = NatureCNNConfig

    def __init__(self, info: EnvironmentInfo, config: NatureCNNConfig) -> None:
        """Builds the layers that fit an environment; arguments and errors are those of `CNN`."""
        super().__init__(info, CNNConfig(name=config.name))


def _check_spaces(info: EnvironmentInfo, name: str) -> None:
    observation, action = info.observation, info.action
    is_image = len(observation.shape) == 3 and (observation.dtype == "uint8" or np.dtype(observation.dtype).kind == "f")
    if not is_image:
        message = (
            "takes images [channels, height, width] of uint8 or of floats, and the environment's observations have "
        )
        message += f"the shape {observation.shape} and the type {observation.dtype}"
        remedy = 'set it to "mlp", or wrap the environment so that it gives images'
        raise ConfigError([Fault("model.name", message, f'"{name}"', remedy)])
    if action.shape != () or info.num_actions < 1:
        raise UnsupportedSpace(
            f"the model {name!r} chooses one of a number of discrete actions; the environment's actions have the shape "
            f"{action.shape} and {info.num_actions} choices"
        )


def _num_features(shape: tuple[int, ...], config: CNNConfig) -> int:
    """Numbers that the convolutions make of an image ``[C, H, W]``."""
    sides = list(shape[1:])
    for kernel_size, stride in zip(config.kernel_sizes, config.strides, strict=True):
        if min(sides) < kernel_size:
            raise ConfigError([_too_small(shape, sides, kernel_size)])
        sides = [(side - kernel_size) // stride + 1 for side in sides]
    return config.channels[-1] * math.prod(sides)


def _too_small(shape: tuple[int, ...], sides: list[int], kernel_size: int) -> Fault:
    message = f"a kernel of {kernel_size} pixels does not fit what an observation of shape {shape} has become, {sides}"
    remedy = 'images are [channels, height, width]; smaller kernels and strides are set with model.name = "cnn"'
    return Fault("model.kernel_sizes", message, None, remedy)
