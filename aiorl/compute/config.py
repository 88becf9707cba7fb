"""``[trainer.compiler]`` and ``[trainer.mixed_precision]``: how the arithmetic of acting and learning is done."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from aiorl.section import MAY_DIFFER, Breach, Section, not_yet, rule

CompileMode: TypeAlias = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
_COMPILING = not_yet("compiling the train step")
_AUTOCAST = not_yet("mixed precision")


class CompilerConfig(Section):
    """What is compiled by ``torch.compile``, and how."""

    model: Annotated[bool, MAY_DIFFER] = Field(
        False,
        description="Compile acting, from observations to actions, before the first step; the learner's own passes are not. "
        "Takes seconds at the start for each number of rows. Where it fails, a warning, and acting goes on without.",
    )
    func: Annotated[bool, MAY_DIFFER, _COMPILING] = Field(False, description="Compile the train step.")
    fullgraph: Annotated[bool, MAY_DIFFER] = Field(
        False, description="Refuse graph breaks: end with an error instead of compiling in pieces."
    )
    dynamic: Annotated[bool, MAY_DIFFER] = Field(
        False,
        description="Compile once for any number of rows, instead of padding batches to powers of two and compiling for each.",
    )
    backend: Annotated[str, MAY_DIFFER] = Field(
        "inductor", min_length=1, description="Compiler back end, as torch names it; inductor wants a C++ compiler."
    )
    model_mode: Annotated[CompileMode, MAY_DIFFER] = Field("default", description="Inductor's mode for the model.")
    func_mode: Annotated[CompileMode, MAY_DIFFER, _COMPILING] = Field("default", description="Mode for the train step.")

    @rule("model_mode", "backend")
    def _only_inductor_has_modes(self) -> Breach | None:
        if self.model_mode == "default" or self.backend == "inductor":
            return None
        return f'is a mode of inductor, not of backend = "{self.backend}"', 'leave it at "default"'


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
