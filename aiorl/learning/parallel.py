"""What the launcher of this process says of its place among others. Beside the command line the only reader of the environment."""

from __future__ import annotations

import os


def visible_devices() -> str | None:
    """The GPUs that this process may see, as ``CUDA_VISIBLE_DEVICES`` lists them; None: all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")
