"""What one step of a group of environments brings.

Dimensions: K environments of a group, E of them whose episode ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(slots=True)
class Tick:
    """What one step of a group brought.

    Attributes:
        observations: ``[K, *shape]``, from which the next actions are chosen.
        rewards: float32 ``[K]``.
        terminated: bool ``[K]``; wins where an environment sets both flags.
        truncated: bool ``[K]``; by the environment.
        final_observations: ``[E, *shape]``, in the order of ``np.flatnonzero(terminated | truncated)``.

    Arrays may be read-only. Observations and final observations may be rewritten once the group's next ``step`` or
    ``reset`` is called: whoever keeps them longer copies them.
    """

    observations: NDArray[Any]
    rewards: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    final_observations: NDArray[Any]
