"""What a model is, and how the one that a configuration names is built.

Dimensions: B rows, A actions.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from aiorl.errors import ConfigError, Fault
from aiorl.section import UnknownName, load_object, translated

if TYPE_CHECKING:
    from aiorl.compute.distributions import Categorical
    from aiorl.environments.spaces import EnvironmentInfo
    from aiorl.models.config import ModelConfig

_BUILT_IN = {"mlp": "aiorl.models.mlp:MLP", "cnn": "aiorl.models.cnn:CNN", "nature_cnn": "aiorl.models.cnn:NatureCNN"}
_FAILING = "cannot be constructed"

LayerT = TypeVar("LayerT", nn.Linear, nn.Conv2d)


class Model(nn.Module, ABC):
    """A policy and a value function over one environment's observations.

    Observations arrive as the environment gave them, ``[B, *shape]`` in the environment's own dtype; converting,
    scaling and flattening them is the model's business, but not in place: they are still to be stored. A model is
    stateless between calls: each row is answered by itself, whatever stands beside it in the batch. Acting calls
    `policy` alone, the learner's preparation pass `value` and, where policies may lag, `policy`, and the training step
    `forward`.

    A model of one's own is named in the TOML as ``[model] name = "module:Name"`` and built as
    `build_model` says, or passed to ``aiorl.open_run`` as an object.
    """

    @abstractmethod
    def policy(self, observations: Tensor) -> Categorical:
        """The distribution over actions.

        Args:
            observations: ``[B, *shape]``.

        Returns:
            A distribution of B rows.
        """

    @abstractmethod
    def value(self, observations: Tensor) -> Tensor:
        """The expected discounted return from each observation on.

        Args:
            observations: ``[B, *shape]``.

        Returns:
            Floating ``[B]``.
        """

    def forward(self, observations: Tensor) -> tuple[Categorical, Tensor]:
        """Policy and value together; override it where they share work.

        Args:
            observations: ``[B, *shape]``.

        Returns:
            What `policy` and `value` return.
        """
        return self.policy(observations), self.value(observations)


def build_model(config: ModelConfig, info: EnvironmentInfo) -> Model:
    """Builds the model that ``[model]`` names, to fit an environment.

    A built-in model, and any ``module:Name`` that declares the section of its table as ``Config`` (a subclass of
    `aiorl.models.config.ModelConfig`), is built as ``Name(info, config)``; any other as ``Name(info, **options)`` with
    the table's further keys. Initial weights are drawn from torch's global generator, the only one that a model of
    one's own is sure to know: a caller that wants them to be a function of a seed, or its host's generator to be left
    alone, forks and seeds that generator around the call.

    Args:
        config: The ``[model]`` table.
        info: The environment's observations and actions.

    Returns:
        The model, in float32 on the CPU.

    Raises:
        ConfigError: The name is unknown or cannot be imported, names something else than a model, does not take the
            table's keys, or raises when it is called.
        UnsupportedSpace: The model cannot take these observations or actions.
    """
    try:
        factory = load_object(_BUILT_IN.get(config.name, config.name))
    except UnknownName as error:
        raise ConfigError([Fault("model.name", error.message, f'"{config.name}"', error.remedy)]) from error
    if not callable(factory):
        raise _no_model(config)
    if hasattr(factory, "Config"):
        with translated("model.name", config.name, _FAILING):
            model = factory(info, config)
    else:
        try:
            inspect.signature(factory).bind(info, **config.options)
        except TypeError as error:
            remedy = f"{config.name} is called with the environment's information and the table's keys"
            raise ConfigError([Fault("model", str(error), None, remedy)]) from error
        with translated("model.name", config.name, _FAILING):
            model = factory(info, **config.options)
    if not isinstance(model, Model):
        raise _no_model(config)
    return model


def orthogonal(layer: LayerT, gain: float) -> LayerT:
    """The layer with orthogonal weights of a gain, drawn from torch's global generator, and biases of 0."""
    nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _no_model(config: ModelConfig) -> ConfigError:
    remedy = "name a subclass of aiorl.models.base.Model, or a function that returns one"
    return ConfigError([Fault("model.name", "is no model", f'"{config.name}"', remedy)])
