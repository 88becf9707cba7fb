"""``[trainer.compiler]`` and ``[trainer.mixed_precision]``: how the arithmetic of acting and learning is done."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from aiorl.section import MAY_DIFFER, Breach, Section, not_yet, rule

CompileMode: TypeAlias = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
_COMPILING = not_yet("torch.compile")
_AUTOCAST = not_yet("mixed precision")


class CompilerConfig(Section):
    """What is compiled by ``torch.compile``, and how."""

    model: Annotated[bool, MAY_DIFFER, _COMPILING] = Field(False, description="Compile the model.")
    func: Annotated[bool, MAY_DIFFER, _COMPILING] = Field(False, description="Compile the train step.")
    fullgraph: Annotated[bool, MAY_DIFFER, _COMPILING] = Field(False, description="Refuse graph breaks.")
    dynamic: Annotated[bool, MAY_DIFFER, _COMPILING] = Field(False, description="Compile for dynamic shapes.")
    backend: Annotated[str, MAY_DIFFER, _COMPILING] = Field("inductor", min_length=1, description="Compiler back end.")
    model_mode: Annotated[CompileMode, MAY_DIFFER, _COMPILING] = Field("default", description="Mode for the model.")
    func_mode: Annotated[CompileMode, MAY_DIFFER, _COMPILING] = Field("default", description="Mode for the train step.")


class MixedPrecisionConfig(Section):
    """The precision of the forward and backward pass, and the gradient scaler of float16."""

    enabled: Annotated[bool, _AUTOCAST] = Field(
        True,
        description="bfloat16 where the device has it, else float16 with a scaler; float32 on a CPU unless `dtype` "
        "says otherwise.",
    )
    dtype: Annotated[Literal["bfloat16", "float16", "float32"] | None, _AUTOCAST] = Field(
        None, description="The type to compute in; none = the device decides."
    )
    init_scale: Annotated[float, _AUTOCAST] = Field(65536.0, gt=0.0, description="The scaler's first scale.")
    growth_factor: Annotated[float, _AUTOCAST] = Field(
        2.0, gt=1.0, description="What the scale is multiplied by after `growth_interval` good steps."
    )
    backoff_factor: Annotated[float, _AUTOCAST] = Field(
        0.5, gt=0.0, lt=1.0, description="What the scale is multiplied by after a step that was not finite."
    )
    growth_interval: Annotated[int, _AUTOCAST] = Field(
        2000, ge=1, description="Finite steps in a row after which the scale grows."
    )
    min_grad_scale: Annotated[float, _AUTOCAST] = Field(
        1e-4, gt=0.0, description="Scale below which the run ends with an error."
    )
    foreach: Annotated[bool | None, MAY_DIFFER, _AUTOCAST] = Field(
        None, description="Unscale and clip all gradients in one kernel; none = where the device gains from it."
    )

    @rule("min_grad_scale", "init_scale")
    def _scale_starts_above_its_minimum(self) -> Breach | None:
        if self.min_grad_scale <= self.init_scale:
            return None
        return f"is above init_scale = {self.init_scale}", "lower it, or raise init_scale"
