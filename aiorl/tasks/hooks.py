"""How far a run has come, and who is told about it.

A hook is called by its name on the task and on every registered callback; `Callback` has the names and their moments.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

HookName = Literal[
    "on_training_start",
    "on_training_end",
    "on_epoch_start",
    "on_epoch_end",
    "on_step_start",
    "on_step_end",
    "on_before_forward_step",
    "on_after_forward_step",
    "on_after_compute_loss",
    "on_after_save_checkpoint",
    "on_after_load_checkpoint",
]
HOOK_NAMES: tuple[HookName, ...] = get_args(HookName)


@dataclass
class State:
    """How far a run has come. The trainer alone writes it; it is part of every checkpoint.

    An epoch counts once it was learned from: during its update, ``num_epochs``, ``num_samples``, ``num_episodes`` and
    ``progress`` are still those of the epochs before it.

    Attributes:
        num_epochs: Epochs learned from.
        num_steps: Optimizer steps taken.
        num_epoch_steps: Optimizer steps taken within the current epoch.
        num_samples: Environment transitions, those that were dropped as too short included.
        num_epoch_samples: Transitions kept for the current epoch.
        num_episodes: Episodes that came to their end.
        policy_version: The version of the weights; rises by one with each epoch that was learned from.
        elapsed_time_s: Time spent training, downtime between a checkpoint and its resumption left out.
        progress: The share of the run that is done, from 0 to 1, for whatever anneals with it: the largest share that
            any of the configured limits has used up, 0 throughout where a run is endless.
    """

    num_epochs: int = 0
    num_steps: int = 0
    num_epoch_steps: int = 0
    num_samples: int = 0
    num_epoch_samples: int = 0
    num_episodes: int = 0
    policy_version: int = 0
    elapsed_time_s: float = 0.0
    progress: float = 0.0

    def update_progress(
        self,
        *,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        max_samples: int | None = None,
        max_seconds: float | None = None,
    ) -> None:
        """Sets `progress` from the counts, given the limits of the run; None is no limit."""
        used = (
            (self.num_epochs, max_epochs),
            (self.num_steps, max_steps),
            (self.num_samples, max_samples),
            (self.elapsed_time_s, max_seconds),
        )
        shares = (count / limit if limit > 0 else 1.0 for count, limit in used if limit is not None)
        self.progress = min(1.0, max(shares, default=0.0))

    def state_dict(self) -> dict[str, int | float]:
        """Every field by name, as plain numbers."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over every field.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: A field is missing, unknown, or not a number of its kind; nothing is taken over then.
        """
        fields = {field.name: float if field.type == "float" else int for field in dataclasses.fields(self)}
        if fields.keys() != state_dict.keys():
            missing, unknown = sorted(fields.keys() - state_dict.keys()), sorted(state_dict.keys() - fields.keys())
            raise ValueError(f"not the state of a run: missing {missing}, unknown {unknown}")
        for name, kind in fields.items():
            value = state_dict[name]
            if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
                raise ValueError(f"not the state of a run: {name} is {value!r}, not of type {kind.__name__}")
        for name, kind in fields.items():
            setattr(self, name, kind(state_dict[name]))


class Callback:
    """Something that is told how a run goes on. Subclass it, override some hooks, and register it on a run.

    Each hook may be a plain method or a coroutine function. The run waits for it, so a plain one must be brief (it
    holds up the whole loop), while a coroutine holds up only what follows from it. What a hook raises ends the run with
    that very exception; cancelling the run cancels the hook that it waits for. The task's own hook runs first, then
    those of the callbacks in the order of their registration.
    """

    def on_training_start(self, state: State) -> Awaitable[None] | None:
        """Everything is built, and a checkpoint loaded where there was one; nothing has been learned yet."""

    def on_training_end(self, state: State) -> Awaitable[None] | None:
        """The run has come to its end and saved its last checkpoint; not called where it failed."""

    def on_epoch_start(self, state: State) -> Awaitable[None] | None:
        """The samples of an epoch are complete, and are about to be learned from."""

    def on_epoch_end(self, state: State) -> Awaitable[None] | None:
        """An epoch was learned from, and its weights are what acts next."""

    def on_step_start(self, state: State) -> Awaitable[None] | None:
        """A minibatch is about to be learned from."""

    def on_step_end(self, state: State) -> Awaitable[None] | None:
        """The optimizer has stepped, or the step was skipped because something in it was not finite."""

    def on_before_forward_step(self, state: State) -> Awaitable[None] | None:
        """The task's ``run_model`` is about to be called."""

    def on_after_forward_step(self, state: State) -> Awaitable[None] | None:
        """The task's ``run_model`` has returned."""

    def on_after_compute_loss(self, state: State) -> Awaitable[None] | None:
        """The task's ``compute_loss`` has returned; nothing was propagated backward yet."""

    def on_after_save_checkpoint(self, state: State) -> Awaitable[None] | None:
        """A checkpoint is on disk in full."""

    def on_after_load_checkpoint(self, state: State) -> Awaitable[None] | None:
        """Weights and counters were taken over from a checkpoint."""


class Hooks:
    """Calls a hook on the task and on every callback."""

    def __init__(self, task: Callback, callbacks: Iterable[Callback] = ()) -> None:
        """Takes the task, whose hooks come first, and the callbacks known so far."""
        self._listeners: tuple[Callback, ...] = (task, *callbacks)

    @property
    def callbacks(self) -> tuple[Callback, ...]:
        """The registered callbacks in the order of their calls, without the task."""
        return self._listeners[1:]

    def register(self, callback: Callback) -> None:
        """Adds a callback behind the others; a call that is already under way does not reach it.

        Raises:
            TypeError: ``callback`` is not a `Callback`.
        """
        if not isinstance(callback, Callback):
            raise TypeError(f"a callback must be an aiorl Callback, not {type(callback).__name__}")
        self._listeners = (*self._listeners, callback)

    def overridden(self, name: HookName) -> bool:
        """Whether anyone would do anything on this hook; where nobody would, `call` need not be awaited."""
        return any(_hook_of(listener, name) is not None for listener in self._listeners)

    async def call(self, name: HookName, state: State) -> None:
        """Calls the hook on the task, then on each callback, waiting for those that are coroutines.

        What a hook raises is raised unchanged, and later hooks are not called. A cancellation reaches the hook that is
        being waited for.
        """
        for listener in self._listeners:
            hook = _hook_of(listener, name)
            if hook is None:
                continue
            result = hook(state)
            if inspect.isawaitable(result):
                await result


def _hook_of(listener: Callback, name: HookName) -> Callable[[State], Awaitable[None] | None] | None:
    """The listener's hook, or None where it is still the empty one of `Callback`."""
    hook: Callable[[State], Awaitable[None] | None] = getattr(listener, name)
    return None if getattr(hook, "__func__", None) is getattr(Callback, name) else hook
