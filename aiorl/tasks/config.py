"""``[task]``: what is learned, by name or as ``module:Name``, and from which environment.

A class of one's own may declare a subclass of ``TaskConfig`` as its ``Config``: then the table is validated by that.
Without one, every further key of the table is handed to it in ``config.options``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field

from aiorl.environments.config import EnvironmentConfig
from aiorl.section import MODULE_NAME, Section, TomlValue, choose_variant

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAME = rf"^(\w+|{MODULE_NAME})$"
_NAMES = '`"ppo"`, or `module:Name` of a class of your own.'


class TaskConfig(Section):
    """What every task's section has."""

    name: str = Field("custom", pattern=_NAME, description=_NAMES)
    environment: EnvironmentConfig = Field(default_factory=EnvironmentConfig, description="The environments.")

    @property
    def options(self) -> Mapping[str, Any]:
        """The further keys of the table, where the task's class declares no ``Config``."""
        return self.model_extra or {}

    @classmethod
    def variant(cls, table: Mapping[str, Any]) -> type[Section]:
        """The section of the task that ``table`` names."""
        return choose_variant(table, built_in=TASKS, default="ppo", base=TaskConfig, fallback=OpenTaskConfig)


class OpenTaskConfig(TaskConfig):
    """The section of a ``module:Name`` whose class declares no ``Config``: takes every key."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, TomlValue]


class PPOConfig(TaskConfig):
    """Proximal policy optimisation (Schulman et al. 2017)."""

    name: str = Field("ppo", pattern=_NAME, description=_NAMES)
    gamma: float = Field(0.99, ge=0.0, le=1.0, description="Discount of future rewards.")
    gae_lambda: float = Field(0.95, ge=0.0, le=1.0, description="Bias against variance of the advantages (GAE).")
    clip_coef: float = Field(0.2, gt=0.0, description="How far the probability ratio may move before it is clipped.")
    clip_vloss: bool = Field(False, description="Clip the value loss around the old values, by `clip_coef` too.")
    norm_adv: bool = Field(True, description="Normalise the advantages of each minibatch.")
    ent_coef: float = Field(0.01, ge=0.0, description="Weight of the entropy bonus.")
    vf_coef: float = Field(0.5, ge=0.0, description="Weight of the value loss.")
    target_kl: float | None = Field(
        None, gt=0.0, description="Approximate KL divergence above which an update's remaining passes are left out."
    )
    num_update_epochs: int = Field(4, ge=1, description="Passes over each epoch's samples.")
    minibatch_size: int | None = Field(
        256,
        ge=1,
        description="Rows of a minibatch, nearly: an epoch is divided evenly; none = the whole epoch at once.",
    )
    anneal: bool = Field(False, description="Let `clip_coef` fall linearly to 0 over the run.")


TASKS: Mapping[str, type[TaskConfig]] = {"ppo": PPOConfig}
"""The tasks that are called by name."""
