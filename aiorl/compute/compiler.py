"""``torch.compile``: how it is asked for, and for which numbers of rows.

torch._dynamo takes a second to import, so it is imported where something is compiled.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiorl.compute.config import CompilerConfig

P = ParamSpec("P")
T = TypeVar("T")

_SMALLEST_BUCKET = 8
_MOST_VARIANTS = 1024  # of one function in a process: buckets times runs


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """The numbers of rows that batches are padded to: powers of two from 8 up, and the largest batch, which is the commonest."""
    sizes = []
    size = _SMALLEST_BUCKET
    while size < max_rows:
        sizes.append(size)
        size *= 2
    return (*sizes, max_rows)


def compiled(function: Callable[P, T], config: CompilerConfig) -> Callable[P, T]:
    """`function`, to be compiled at its first call with each shape; see `compiling`."""
    mode = None if config.model_mode == "default" else config.model_mode
    return torch.compile(
        function, fullgraph=config.fullgraph, dynamic=config.dynamic, backend=config.backend, mode=mode
    )


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """What compiling ahead goes on in: as many shapes as it takes, and no process that outlives it."""
    import torch._dynamo.config
    import torch._inductor.config

    with (
        torch._dynamo.config.patch(recompile_limit=_MOST_VARIANTS, accumulated_recompile_limit=_MOST_VARIANTS),
        torch._inductor.config.patch(compile_threads=1),
    ):
        yield


def known_backends() -> list[str]:
    """The compiler back ends that torch knows by name. Blocks for a second the first time."""
    import torch._dynamo

    return sorted(torch._dynamo.list_backends(exclude_tags=()))


def refused_graph_break(error: BaseException) -> bool:
    """Whether `error` is what ``fullgraph`` ends a graph break with."""
    from torch._dynamo.exc import Unsupported

    return isinstance(error, Unsupported)
