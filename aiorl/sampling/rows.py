"""Rows: what a batch is made of. An array ``[n, ...]``, or a tuple of arrays whose first dimensions are equal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

Rows: TypeAlias = NDArray[Any] | tuple[NDArray[Any], ...]

Layout: TypeAlias = tuple[Any, ...]
"""Shape and dtype of a row: ``(shape, dtype)`` of an array, and ``(layout, ...)`` of a tuple's arrays."""


def count(rows: Any) -> int:
    """The number of rows.

    Raises:
        TypeError: They are neither an array nor a tuple of arrays.
        ValueError: An array has no first dimension, or the arrays of a tuple do not share it.
    """
    if isinstance(rows, np.ndarray):
        if not rows.shape:
            raise ValueError("an array without dimensions, and so without rows")
        return len(rows)
    if not isinstance(rows, tuple):
        raise TypeError(f"a {type(rows).__name__}, which is neither an array nor a tuple of arrays")
    for part in rows:
        if not isinstance(part, np.ndarray):
            raise TypeError(f"a tuple with a {type(part).__name__} in it, which is no array")
    counts = {part.shape[:1] for part in rows}
    if len(counts) != 1 or () in counts:
        shapes = ", ".join(str(part.shape) for part in rows)
        raise ValueError(f"a tuple of arrays that do not share their first dimension: ({shapes})")
    return len(rows[0])


def layout(rows: Rows) -> Layout:
    """Shape and dtype of a row, to be compared."""
    if isinstance(rows, tuple):
        return tuple((part.shape[1:], part.dtype) for part in rows)
    return rows.shape[1:], rows.dtype


def describe(rows_layout: Layout) -> str:
    """A layout in words, for messages: ``float32 (4,)``, and with ``" and "`` between the arrays of a tuple."""
    parts = rows_layout if not rows_layout or isinstance(rows_layout[-1], tuple) else (rows_layout,)
    text = " and ".join(f"{dtype} {shape}" for shape, dtype in parts)
    return text if parts is not rows_layout else f"a tuple of {text}"


def cut(rows: Rows, start: int, stop: int) -> Rows:
    """A view of the rows from ``start`` up to ``stop``."""
    if isinstance(rows, tuple):
        return tuple([part[start:stop] for part in rows])
    return rows[start:stop]


def join(parts: Sequence[Rows]) -> Rows:
    """Rows after rows, copied; a single part is returned itself.

    Raises:
        ValueError: Their shapes or their structures differ.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, tuple):
        return tuple([np.concatenate(column) for column in zip(*parts, strict=True)])
    return np.concatenate(parts)
