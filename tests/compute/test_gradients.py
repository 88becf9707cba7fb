"""Norm and clipping of gradients, against torch's own functions."""

from __future__ import annotations

import math

import pytest
import torch

from aiorl.compute.gradients import clip_by_norm, total_norm


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in ((4, 3), (3,), (1,), (2, 2, 2))]


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_the_norm_is_that_of_all_gradients_as_one_vector(order: float) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients()])
    assert total_norm(gradients(), order).item() == pytest.approx(flat.norm(order).item(), rel=1e-6)


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0, None])
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_clipping_is_torchs(limit: float | None, order: float) -> None:
    ours, theirs = gradients(), gradients()
    clip_by_norm(ours, limit, total_norm(ours, order).item())
    if limit is not None:
        parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in theirs]
        for parameter, gradient in zip(parameters, theirs, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, limit, order)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_no_gradients_have_no_norm_and_nothing_to_clip() -> None:
    assert total_norm([], 2.0).item() == 0.0
    clip_by_norm([], 1.0, 0.0)


def test_what_is_not_finite_makes_the_norm_not_finite() -> None:
    broken = gradients()
    broken[2][0] = math.nan
    assert not math.isfinite(total_norm(broken, 2.0))
    broken[2][0] = math.inf
    assert not math.isfinite(total_norm(broken, math.inf))
