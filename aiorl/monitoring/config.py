"""``[trainer.profiler]``, ``[logger]`` and ``[console]``: what a run tells, and where."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from aiorl.section import MAY_DIFFER, Section, not_yet

_PROFILING = not_yet("the profiler")


class ProfilerConfig(Section):
    """A ``torch.profiler`` schedule of one profiler step per optimizer step; traces go into the run's folder."""

    enabled: Annotated[bool, MAY_DIFFER, _PROFILING] = Field(False, description="Profile the run.")
    record_shapes: Annotated[bool, MAY_DIFFER, _PROFILING] = Field(False, description="Record the shapes of operands.")
    profile_memory: Annotated[bool, MAY_DIFFER, _PROFILING] = Field(False, description="Record allocations.")
    with_stack: Annotated[bool, MAY_DIFFER, _PROFILING] = Field(False, description="Record source lines.")
    with_flops: Annotated[bool, MAY_DIFFER, _PROFILING] = Field(
        False, description="Estimate floating-point operations."
    )
    with_modules: Annotated[bool, MAY_DIFFER, _PROFILING] = Field(False, description="Record the module hierarchy.")
    wait_steps: Annotated[int, MAY_DIFFER, _PROFILING] = Field(10, ge=0, description="Idle steps at a cycle's start.")
    warmup_steps: Annotated[int, MAY_DIFFER, _PROFILING] = Field(10, ge=0, description="Steps profiled and discarded.")
    active_steps: Annotated[int, MAY_DIFFER, _PROFILING] = Field(10, ge=1, description="Steps recorded in each cycle.")
    repeat_steps: Annotated[int, MAY_DIFFER, _PROFILING] = Field(1, ge=0, description="Cycles; 0 = until the run ends.")
    skip_first_steps: Annotated[int, MAY_DIFFER, _PROFILING] = Field(
        10, ge=0, description="Steps before the first cycle."
    )
    table_size: Annotated[int, MAY_DIFFER, _PROFILING] = Field(
        10, ge=1, description="Rows of the table that is logged for each cycle."
    )


class LoggerConfig(Section):
    """Where figures go beside ``metrics.jsonl``, which is always written."""

    terminal: Annotated[bool, MAY_DIFFER] = Field(
        True, description="Show progress: a live display on a terminal, plain lines elsewhere."
    )
    tensorboard: Annotated[bool, MAY_DIFFER] = Field(True, description="Write TensorBoard events into `log_dir_name`.")
    interval_s: Annotated[float, MAY_DIFFER] = Field(
        1.0, gt=0.0, description="Shortest time in seconds between two updates of the terminal."
    )


class ConsoleConfig(Section):
    """The console through which `attach` reaches a live run."""

    enabled: Annotated[bool, MAY_DIFFER, not_yet("the console of a live run")] = Field(
        False, description="Open a console socket, for this user alone, in a private folder."
    )
