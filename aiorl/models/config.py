"""``[model]``: the network, by name or as ``module:Name``.

A class of one's own may declare a subclass of ``ModelConfig`` as its ``Config``: then the table is validated by that.
Without one, every further key of the table is handed to it in ``config.options``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field

from aiorl.section import MODULE_NAME, Section, TomlValue, choose_variant

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAME = rf"^(\w+|{MODULE_NAME})$"
_NAMES = '`"mlp"`, or `module:Name` of a class of your own.'


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


MODELS: Mapping[str, type[ModelConfig]] = {"mlp": MLPConfig}
"""The models that are called by name."""
