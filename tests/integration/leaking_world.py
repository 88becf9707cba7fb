"""An environment that leaks a kilobyte for every step; apart from what leaks in the trainer, since workers know no torch."""

from __future__ import annotations

from typing import Any

import gymnasium

LEAKED: list[bytes] = []


class Leaking(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Leaks in its worker."""

    def step(self, action: Any) -> Any:
        LEAKED.append(bytes(1024))
        return super().step(action)
