"""Loading weights that fit, that do not, and that fit in part."""

from __future__ import annotations

import logging

import pytest
import torch

from aiorl.errors import CheckpointCorrupt
from aiorl.learning.weights import load_into
from tests.learning.epochs import Line

OWN = {name: tensor.clone() for name, tensor in Line().state_dict().items()}


def numbers(model: Line) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("strict", [True, False])
def test_weights_that_fit_are_taken(caplog: pytest.LogCaptureFixture, strict: bool) -> None:
    model = Line()
    weights = {name: torch.full_like(tensor, 3.0) for name, tensor in OWN.items()}
    load_into(model, weights, strict=strict)
    assert all(set(values) == {3.0} for values in numbers(model).values())
    weights["critic.weight"].fill_(4.0)
    assert model.critic.weight.item() == 3.0  # a copy
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"critic.weight": torch.zeros(1, 7)}, r"critic\.weight \[1, 7\] for \[1, 1\]"),
        ({"critic.weight": None}, r"critic\.weight \(missing\) for \[1, 1\]"),
        ({"stranger": torch.zeros(1)}, r"stranger \(unknown\)"),
    ],
)
def test_weights_that_do_not_fit(
    caplog: pytest.LogCaptureFixture, change: dict[str, torch.Tensor | None], message: str
) -> None:
    """Strictly they are refused, and nothing is loaded; else those that fit are taken and the others named."""
    weights = {name: torch.full_like(tensor, 3.0) for name, tensor in OWN.items()}
    changed = {name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}
    model = Line()
    before = numbers(model)
    with pytest.raises(CheckpointCorrupt, match=message):
        load_into(model, changed, strict=True)
    assert numbers(model) == before
    with caplog.at_level(logging.WARNING, "aiorl.learning.weights"):
        load_into(model, changed, strict=False)
    assert caplog.text.count("weights left as they were") == 1
    after = numbers(model)
    for name in OWN:
        assert after[name] == (before[name] if name in change else [3.0] * len(before[name]))


def test_a_refusal_names_five_at_most() -> None:
    with pytest.raises(CheckpointCorrupt) as caught:
        load_into(Line(), {f"stranger{number}": torch.zeros(1) for number in range(9)}, strict=True)
    assert str(caught.value).count(";") == 4
