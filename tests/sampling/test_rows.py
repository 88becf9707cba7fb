from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aiorl.sampling import rows


def test_rows_are_counted_by_the_first_dimension() -> None:
    assert rows.count(np.zeros((3, 2))) == 3
    assert rows.count((np.zeros((4, 2)), np.zeros(4))) == 4


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (np.zeros(()), ValueError),
        ((np.zeros(2), np.zeros(3)), ValueError),
        ((), ValueError),
        ([1, 2], TypeError),
        ((np.zeros(2), [1, 2]), TypeError),
        (None, TypeError),
    ],
)
def test_what_has_no_rows_is_refused(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        rows.count(value)


def test_layouts_tell_shape_dtype_and_structure_apart() -> None:
    array = np.zeros((3, 2), np.float32)
    layouts = [rows.layout(value) for value in (array, array[:, 0], array.astype(int), (array,), (array, array))]
    assert len(set(layouts)) == 5
    assert rows.layout(array) == rows.layout(array[:1])
    assert rows.describe(layouts[0]) == "float32 (2,)"
    assert rows.describe(layouts[4]) == "a tuple of float32 (2,) and float32 (2,)"


def test_cut_and_join_undo_each_other() -> None:
    array = np.arange(10).reshape(5, 2)
    pair = (array, array[:, 0] * 2)
    assert np.array_equal(rows.join([rows.cut(array, 0, 2), rows.cut(array, 2, 5)]), array)
    joined = rows.join([rows.cut(pair, 0, 2), rows.cut(pair, 2, 5)])
    assert isinstance(joined, tuple)
    assert [part.tolist() for part in joined] == [part.tolist() for part in pair]
    assert rows.join([array]) is array
    assert np.shares_memory(rows.cut(array, 1, 2), array)
