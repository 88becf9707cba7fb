"""Which settings may change while a run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from aiorl.errors import ConfigError, Fault

if TYPE_CHECKING:
    from aiorl.tasks.config import TaskConfig

_CHANGEABLE = frozenset(
    {
        "optimizer.lr",
        "trainer.max_epochs",
        "trainer.max_steps",
        "trainer.max_samples",
        "trainer.max_seconds",
        "trainer.target_return",
        "trainer.drain_timeout",
        "trainer.clip_grad_norm",
        "trainer.max_consecutive_skips",
        "trainer.checkpoint.save_every_n_steps",
        "trainer.checkpoint.save_every_n_seconds",
    }
)
_FIXED_OF_TASK = frozenset({"task.name", "task.minibatch_size"})


def is_changeable(path: str) -> bool:
    """Whether the setting at a TOML path may change while a run goes on."""
    own = path.startswith("task.") and not path.startswith("task.environment") and path not in _FIXED_OF_TASK
    return own or path in _CHANGEABLE


def with_field(section: TaskConfig, name: str, value: Any) -> TaskConfig:
    """The section with another value in one field, validated."""
    try:
        return type(section).model_validate({**section.values(), name: value})
    except ValidationError as error:
        faults = [
            Fault(f"task.{name}", each["msg"], repr(value), "see docs/configuration.md", "Run.set")
            for each in error.errors()
        ]
        raise ConfigError(faults) from error
