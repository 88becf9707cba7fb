"""Clips of environments being played, as ``.gif`` or ``.mp4``, with what the extra ``video`` installs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from aiorl.errors import ConfigError, Fault

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL.Image import Image

_EXTRA: Final = 'pip install "aiorl[video]"'
_HIGHEST_GIF_RATE: Final = 50  # frames per second: players slow down what is shown for less than 20 ms


class Clip(Protocol):
    """A clip that is being recorded."""

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Adds a picture, uint8 ``[height, width, 3]``, of the size of the first one."""


def open_clip(path: Path, *, frames_per_s: float) -> Clip:
    """A clip into which frames can be added, and which `saved` writes.

    Args:
        path: Where to; ends in ``.gif`` or ``.mp4``.
        frames_per_s: How fast it is to be shown.

    Raises:
        ConfigError: Another ending, a folder that does not exist, or a library that is not installed.
    """
    raise NotImplementedError(path, frames_per_s)
