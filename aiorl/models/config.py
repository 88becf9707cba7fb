"""``[model]``: the network, by name or as ``module:Name``.

A class of one's own may declare a subclass of ``ModelConfig`` as its ``Config``: then the table is validated by that.
Without one, every further key of the table is handed to it in ``config.options``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field

from aiorl.section import MODULE_NAME, Breach, Section, TomlValue, choose_variant, rule

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAME = rf"^(\w+|{MODULE_NAME})$"
_NAMES = '`"mlp"`, `"cnn"` or `"nature_cnn"`, or `module:Name` of a class of your own.'


class ModelConfig(Section):
    """What every model's section has."""

    name: str = Field("custom", pattern=_NAME, description=_NAMES)

    @property
    def options(self) -> Mapping[str, Any]:
        """The further keys of the table, where the model's class declares no ``Config``."""
        return self.model_extra or {}

    @classmethod
    def variant(cls, table: Mapping[str, Any]) -> type[Section]:
        """The section of the model that ``table`` names."""
        return choose_variant(table, built_in=MODELS, default="mlp", base=ModelConfig, fallback=OpenModelConfig)


class OpenModelConfig(ModelConfig):
    """The section of a ``module:Name`` whose class declares no ``Config``: takes every key."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, TomlValue]


class MLPConfig(ModelConfig):
    """A multi-layer perceptron with a policy head and a value head."""

    name: str = Field("mlp", pattern=_NAME, description=_NAMES)
    hidden_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field((64, 64), description="Widths of the hidden layers.")
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = Field(
        "tanh", description="Non-linearity after each hidden layer."
    )
    shared_trunk: bool = Field(False, description="Share the hidden layers between policy and value.")


_Sizes: TypeAlias = tuple[Annotated[int, Field(ge=1)], ...]


class CNNConfig(ModelConfig):
    """A convolutional network over images, with a policy head and a value head on one trunk."""

    name: str = Field("cnn", pattern=_NAME, description=_NAMES)
    channels: _Sizes = Field((32, 64, 64), min_length=1, description="Output channels of each convolution.")
    kernel_sizes: _Sizes = Field((8, 4, 3), description="Side of each convolution's square kernel, in pixels.")
    strides: _Sizes = Field((4, 2, 1), description="Stride of each convolution, in pixels.")
    hidden_sizes: _Sizes = Field((512,), description="Widths of the linear layers between convolutions and heads.")
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = Field(
        "relu", description="Non-linearity after each convolution and each hidden layer."
    )

    @rule("kernel_sizes", "channels")
    def _every_convolution_has_a_kernel(self) -> Breach | None:
        return self._as_many(self.kernel_sizes)

    @rule("strides", "channels")
    def _every_convolution_has_a_stride(self) -> Breach | None:
        return self._as_many(self.strides)

    def _as_many(self, sizes: _Sizes) -> Breach | None:
        if len(sizes) == len(self.channels):
            return None
        return f"has {len(sizes)} entries, and channels has {len(self.channels)}", "give one for each convolution"


class NatureCNNConfig(ModelConfig):
    """The network of Mnih et al. 2015, which is what `"cnn"` is by default."""

    name: str = Field("nature_cnn", pattern=_NAME, description=_NAMES)


MODELS: Mapping[str, type[ModelConfig]] = {"mlp": MLPConfig, "cnn": CNNConfig, "nature_cnn": NatureCNNConfig}
"""The models that are called by name."""
