"""Which back end acts for a model: NumPy on the loop where it can, torch anywhere, compiled where that is asked for."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiorl.compute.compiler import refused_graph_break
from aiorl.errors import ConfigError, Fault
from aiorl.models.mlp import MLP
from aiorl.sampling.policy import Acting, CompiledActing, NumpyActing, TorchActing, block_rows
from aiorl.tasks.base import ReinforcementLearningTask

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import torch

    from aiorl.compute.config import CompilerConfig
    from aiorl.compute.device import Placement
    from aiorl.environments.spaces import ArraySpec
    from aiorl.models.base import Model
    from aiorl.sampling.policy import Policy

logger = logging.getLogger(__name__)

_MIN_BLOCK_ROWS = (
    8  # where NumPy would have to multiply fewer rows at a time, by a layer above 32,768 weights, torch is faster
)


@dataclass(frozen=True, slots=True)
class Compilation:
    """What has to be known to compile acting before the first batch.

    Attributes:
        config: ``[trainer.compiler]``.
        observation: Of one row.
        max_rows: Of the largest batch.
        optimal: Whether actions are greedy.
    """

    config: CompilerConfig
    observation: ArraySpec
    max_rows: int
    optimal: bool


def build_acting(
    model: Model, task: ReinforcementLearningTask, device: torch.device, compilation: Compilation | None = None
) -> Acting:
    """The back end for `model`: NumPy for a small built-in MLP on a CPU, unless the model or the task acts in its own way.

    NumPy answers 8 rows in a sixth of torch's time, and 1,024 in a third: see ``docs/benchmarks.md``.

    Args:
        model: The model.
        task: Its `get_actions` is what acts.
        device: Where.
        compilation: Where it is given, acting is compiled, for every number of rows: this takes seconds, and has to be called in the
            torch settings that batches are computed in. Where compiling fails, a warning says so, and acting is not compiled.

    Raises:
        ConfigError: ``fullgraph`` is set, and the model or the task cannot be compiled as one graph.
    """
    if compilation is not None:
        acting = _compiled(model, task, device, compilation)
        if acting is not None:
            return acting
    plain_actions = type(task).get_actions is ReinforcementLearningTask.get_actions
    if isinstance(model, MLP) and type(model).policy is MLP.policy and plain_actions and device.type == "cpu":
        layers = model.policy_layers()
        if all(block_rows(layer.weight.numel()) >= _MIN_BLOCK_ROWS for layer in layers):
            return NumpyActing(layers, model.activation)
    return TorchActing(model, task.get_actions, device)


def _compiled(
    model: Model, task: ReinforcementLearningTask, device: torch.device, compilation: Compilation
) -> CompiledActing | None:
    """Acting compiled for every batch there will be; None, after a warning, where that fails."""
    started = time.perf_counter()
    try:
        acting = CompiledActing(
            model,
            task.get_actions,
            device,
            compiler=compilation.config,
            observation=compilation.observation,
            max_rows=compilation.max_rows,
        )
        acting.warm_up(compilation.optimal)
    except Exception as error:  # compilers raise of every kind; nothing has acted yet, and acting does without
        if compilation.config.fullgraph and refused_graph_break(error):
            fault = Fault("trainer.compiler.fullgraph", f"acting breaks the graph: {_in_a_line(error)}", "true")
            raise ConfigError([fault]) from error
        logger.warning("acting is not compiled: %s failed: %s", compilation.config.backend, _in_a_line(error))
        return None
    logger.info("acting was compiled by %s in %.1f s", compilation.config.backend, time.perf_counter() - started)
    return acting


def _in_a_line(error: Exception) -> str:
    """What a compiler raised, in one line: without the traceback that torch puts into its messages."""
    cause = getattr(error, "inner_exception", error)
    lines = [line for line in str(cause).splitlines() if line]
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__


def in_its_place(policy: Policy, place: Placement) -> Callable[[Any], Awaitable[Any]]:
    """The inference of a batcher: `policy` loads weights, and acts, on the loop or the acting thread, each where it belongs.

    Loading a large model takes longer than the loop may be held up, also where a batch does not.
    """

    async def infer(rows: Any) -> Any:
        if policy.must_load:
            await place.call(policy.load)
        return await place.call(policy.act, rows)

    return infer
