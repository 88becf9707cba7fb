from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import pytest

from aiorl.tasks.hooks import HOOK_NAMES, Callback, Hooks, State

pytestmark = pytest.mark.anyio


class Recorder(Callback):
    """Writes down what it is told, under its name."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name = name
        self.told = told

    def on_epoch_end(self, state: State) -> None:
        self.told.append(f"{self.name} epoch {state.num_epochs}")


class AsyncRecorder(Recorder):
    async def on_epoch_end(self, state: State) -> None:  # type: ignore[override]
        self.told.append(f"{self.name} begins")
        await asyncio.sleep(0)
        self.told.append(f"{self.name} epoch {state.num_epochs}")


class Failing(Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def on_epoch_end(self, state: State) -> None:
        raise self.error


async def test_task_first_then_callbacks_in_order_each_waited_for() -> None:
    told: list[str] = []
    hooks = Hooks(Recorder("task", told), [AsyncRecorder("first", told)])
    hooks.register(Recorder("second", told))
    await hooks.call("on_epoch_end", State(num_epochs=3))
    assert told == ["task epoch 3", "first begins", "first epoch 3", "second epoch 3"]
    assert [callback.name for callback in hooks.callbacks if isinstance(callback, Recorder)] == ["first", "second"]


async def test_every_hook_can_be_called() -> None:
    told: list[str] = []

    def hook_named(name: str) -> Any:
        return lambda self, state: told.append(name)

    listener = type("Listener", (Callback,), {name: hook_named(name) for name in HOOK_NAMES})()
    hooks = Hooks(Callback(), [listener])
    for name in HOOK_NAMES:
        assert hooks.overridden(name)
        await hooks.call(name, State())
    assert told == list(HOOK_NAMES)
    assert len(told) == 11


async def test_hooks_that_nobody_overrides_do_nothing() -> None:
    hooks = Hooks(Callback(), [Recorder("callback", [])])
    for name in HOOK_NAMES:
        assert hooks.overridden(name) == (name == "on_epoch_end")
        await hooks.call(name, State())
        assert getattr(Callback(), name)(State()) is None


async def test_a_hook_set_on_an_object_counts() -> None:
    told: list[int] = []
    callback = Callback()
    hooks = Hooks(callback)
    assert not hooks.overridden("on_step_end")
    callback.on_step_end = lambda state: told.append(state.num_steps)  # type: ignore[method-assign]
    assert hooks.overridden("on_step_end")
    await hooks.call("on_step_end", State(num_steps=7))
    assert told == [7]


@pytest.mark.parametrize(
    "error", [ValueError("as it was"), ExceptionGroup("several", [OSError()]), KeyboardInterrupt()]
)
async def test_what_a_hook_raises_comes_out_unchanged_and_ends_the_round(error: BaseException) -> None:
    told: list[str] = []
    hooks = Hooks(Recorder("task", told), [Failing(error), Recorder("later", told)])
    with pytest.raises(type(error)) as caught:
        await hooks.call("on_epoch_end", State())
    assert caught.value is error
    assert error.__cause__ is None
    assert told == ["task epoch 0"]


async def test_a_cancellation_reaches_the_hook_that_is_waited_for() -> None:
    told: list[str] = []
    waiting = asyncio.Event()

    class Waiting(Callback):
        async def on_epoch_end(self, state: State) -> None:
            waiting.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                told.append("cancelled")
                raise

    hooks = Hooks(Waiting(), [Recorder("later", told)])
    async with asyncio.TaskGroup() as group:
        task = group.create_task(hooks.call("on_epoch_end", State()), name="calls the hook")
        await waiting.wait()
        task.cancel()
    assert task.cancelled()
    assert told == ["cancelled"]


async def test_one_that_is_registered_during_a_round_waits_for_the_next() -> None:
    told: list[str] = []

    class Registering(Callback):
        def on_epoch_end(self, state: State) -> None:
            hooks.register(Recorder("new", told))

    hooks = Hooks(Registering())
    await hooks.call("on_epoch_end", State())
    assert told == []
    await hooks.call("on_epoch_end", State(num_epochs=1))
    assert told == ["new epoch 1"]


def test_only_callbacks_can_be_registered() -> None:
    with pytest.raises(TypeError, match="must be an aiorl Callback, not State"):
        Hooks(Callback()).register(State())  # type: ignore[arg-type]


def full_state() -> State:
    return State(
        num_epochs=1, num_steps=2, num_epoch_steps=3, num_samples=4, num_epoch_samples=5, num_episodes=6,
        policy_version=7, elapsed_time_s=8.5, progress=0.25,
    )  # fmt: skip


def test_a_state_survives_a_checkpoint() -> None:
    state = State()
    state.load_state_dict(json.loads(json.dumps(full_state().state_dict())))
    assert state == full_state()


def test_a_whole_number_is_taken_for_a_time() -> None:
    state = State()
    state.load_state_dict(full_state().state_dict() | {"elapsed_time_s": 9})
    assert state.elapsed_time_s == 9.0
    assert isinstance(state.elapsed_time_s, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_stepz": 1}, "unknown \\['num_stepz'\\]"),
        ({"num_steps": None}, "num_steps is None, not of type int"),
        ({"num_steps": 1.5}, "num_steps is 1.5, not of type int"),
        ({"num_steps": True}, "num_steps is True, not of type int"),
        ({"elapsed_time_s": "9"}, "elapsed_time_s is '9', not of type float"),
    ],
)
def test_what_is_no_state_is_refused_whole(change: dict[str, Any], message: str) -> None:
    state = State()
    with pytest.raises(ValueError, match=message):
        state.load_state_dict(full_state().state_dict() | change)
    assert state == State()


def test_a_missing_field_is_named() -> None:
    saved = full_state().state_dict()
    del saved["policy_version"]
    with pytest.raises(ValueError, match="missing \\['policy_version'\\]"):
        State().load_state_dict(saved)


def test_progress_is_the_share_of_the_limit_that_is_nearest() -> None:
    state = dataclasses.replace(full_state(), num_epochs=1, num_samples=30, elapsed_time_s=2.0)
    state.update_progress(max_epochs=10, max_samples=60, max_seconds=8.0)
    assert state.progress == 0.5
    state.update_progress(max_samples=20)
    assert state.progress == 1.0
    state.update_progress()
    assert state.progress == 0.0
    state.update_progress(max_steps=8)
    assert state.progress == 0.25
