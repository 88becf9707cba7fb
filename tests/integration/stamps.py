"""A wrapper that tells when an environment was stepped first."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium


class Stamped(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Makes the file that AIORL_TEST_STAMP names at the first step of any environment."""

    is_stamped = False

    def step(self, action: Any) -> Any:
        if not self.is_stamped:
            with suppress(FileExistsError):
                Path(os.environ["AIORL_TEST_STAMP"]).touch(exist_ok=False)
            self.is_stamped = True
        return super().step(action)
