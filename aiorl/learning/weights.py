"""Loading weights into a model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from aiorl.errors import CheckpointCorrupt

if TYPE_CHECKING:
    from torch import Tensor

    from aiorl.models.base import Model

logger = logging.getLogger(__name__)


def load_into(model: Model, weights: dict[str, Tensor], *, strict: bool) -> None:
    """Loads weights, or those that fit where `strict` is not set."""
    own = model.state_dict()
    misfits = [
        f"{name} {list(weights[name].shape) if name in weights else '(missing)'} for {list(tensor.shape)}"
        for name, tensor in own.items()
        if name not in weights or weights[name].shape != tensor.shape
    ]
    misfits += [f"{name} (unknown)" for name in weights if name not in own]
    if misfits and strict:
        raise CheckpointCorrupt(f"the checkpoint's weights are not this model's: {'; '.join(misfits[:5])}")
    for misfit in misfits:
        logger.warning("weights left as they were: %s", misfit)
    model.load_state_dict(
        {name: tensor for name, tensor in weights.items() if name in own and own[name].shape == tensor.shape},
        strict=False,
    )
