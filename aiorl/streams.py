"""What goes to standard error, and the standard streams of a process that was started without some of them."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Loudness:
    """How much goes to standard error."""

    verbose: Annotated[bool, Parameter(alias="-v")] = False
    """Log debug messages too."""
    quiet: Annotated[bool, Parameter(alias="-q")] = False
    """Log warnings and errors only, and show no progress."""

    def apply(self) -> None:
        """Sends what the logger ``aiorl`` gets to standard error."""
        level = logging.DEBUG if self.verbose else logging.WARNING if self.quiet else logging.INFO
        handler = logging.StreamHandler()
        handler.setLevel(level)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger = logging.getLogger("aiorl")
        logger.setLevel(min(level, logging.INFO))
        logger.addHandler(handler)


def open_standard_streams() -> None:
    """Opens what the shell closed (``>&-``), before a socket or a file of ours gets its number and is written to or closed."""
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free, which is this one
        if getattr(sys, name) is None:
            stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - it lives as long as the process
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
