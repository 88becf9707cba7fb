"""The numbers of rows that are compiled for."""

from __future__ import annotations

import pytest

from aiorl.compute.compiler import known_backends, row_buckets


@pytest.mark.parametrize(
    ("max_rows", "expected"),
    [
        (1, (1,)),
        (7, (7,)),
        (8, (8,)),
        (9, (8, 9)),
        (16, (8, 16)),
        (48, (8, 16, 32, 48)),
        (1024, (8, 16, 32, 64, 128, 256, 512, 1024)),
    ],
)
def test_buckets_double_from_8_up_to_the_largest_batch(max_rows: int, expected: tuple[int, ...]) -> None:
    assert row_buckets(max_rows) == expected


@pytest.mark.parametrize("max_rows", [1, 5, 16, 100, 1000])
def test_every_batch_of_8_or_more_is_padded_to_less_than_twice_its_rows(max_rows: int) -> None:
    buckets = row_buckets(max_rows)
    for num_rows in range(1, max_rows + 1):
        padded = min(size for size in buckets if size >= num_rows)
        assert padded < 2 * num_rows or padded <= 8


def test_torchs_compilers_are_known_by_name() -> None:
    assert {"inductor", "eager", "cudagraphs"} <= set(known_backends())
