"""An asyncio-native reinforcement-learning trainer.

            ┌──────────────────────────── one asyncio loop ─────────────────────────────┐
 worker ────┤ link ──► rollout (one coroutine per environment group)                    │
 worker ────┤   ▲        │ observations                                                 │
 remote ────┤   │        ▼                                                              │
 worker     │   │     batcher ──► policy (a version of the weights, on the device)      │
            │   └────────┘ actions          ▲ publishes versions                        │
            │            │ full trajectories│                                           │
            │            ▼                  │                                           │
            │         channel ──────────► learner ──► checkpoint, metrics               │
            └───────────────────────────────────────────────────────────────────────────┘

The public names are loaded when they are first used: a worker imports this package and must not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiorl.config import Config, load_config
    from aiorl.errors import AiorlError, ConfigError
    from aiorl.evaluation import load_policy
    from aiorl.learning.config import ReinforcementLearningTrainerConfig
    from aiorl.runs import EpochReport, Run, open_run
    from aiorl.sampling.batcher import MicroBatcher
    from aiorl.sampling.config import SamplingConfig
    from aiorl.standalone import run
    from aiorl.tasks.base import Callback, ReinforcementLearningTask, State
    from aiorl.trainer import ReinforcementLearningTrainer

__all__ = [
    "AiorlError",
    "Callback",
    "Config",
    "ConfigError",
    "EpochReport",
    "MicroBatcher",
    "ReinforcementLearningTask",
    "ReinforcementLearningTrainer",
    "ReinforcementLearningTrainerConfig",
    "Run",
    "SamplingConfig",
    "State",
    "__version__",
    "load_config",
    "load_policy",
    "open_run",
    "run",
]

_HOMES = {
    "AiorlError": "aiorl.errors",
    "Callback": "aiorl.tasks.base",
    "Config": "aiorl.config",
    "ConfigError": "aiorl.errors",
    "EpochReport": "aiorl.runs",
    "MicroBatcher": "aiorl.sampling.batcher",
    "ReinforcementLearningTask": "aiorl.tasks.base",
    "ReinforcementLearningTrainer": "aiorl.trainer",
    "ReinforcementLearningTrainerConfig": "aiorl.learning.config",
    "Run": "aiorl.runs",
    "SamplingConfig": "aiorl.sampling.config",
    "State": "aiorl.tasks.base",
    "load_config": "aiorl.config",
    "load_policy": "aiorl.evaluation",
    "open_run": "aiorl.runs",
    "run": "aiorl.standalone",
}


def __getattr__(name: str) -> Any:
    """Loads a public name from its home."""
    if name == "__version__":
        from importlib.metadata import version

        return version("aiorl")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'aiorl' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
