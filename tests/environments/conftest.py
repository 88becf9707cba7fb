"""Makes ``walks`` importable, here and, by the import path that workers are given, in workers."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
