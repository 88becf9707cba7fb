from __future__ import annotations

import logging
import signal
import threading
from typing import TYPE_CHECKING, Any

import gymnasium
import pytest

from aiorl.environments.make import load
from aiorl.environments.preflight import preflight
from aiorl.environments.spaces import ArraySpec, EnvironmentSpec
from aiorl.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def test_one_environment_is_described() -> None:
    info = preflight(EnvironmentSpec("CartPole-v1"))
    assert (info.observation, info.num_actions, info.max_episode_steps) == (ArraySpec((4,), "float32"), 2, 500)
    assert preflight(EnvironmentSpec("CartPole-v1", vectorization_mode="vector_entry_point")).autoreset == "next_step"
    assert preflight(EnvironmentSpec("walks:AwaitableWalk")).is_awaitable


def test_an_environment_is_neither_reset_nor_stepped() -> None:
    preflight(EnvironmentSpec("walks:Walk", {"misbehave": "raise", "where": "reset"}))


def test_what_closing_raises_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        preflight(EnvironmentSpec("walks:Walk", {"misbehave": "raise", "where": "close"}))
    assert "raised in close" in caplog.text


@pytest.mark.parametrize("misbehave", ["sys.exit", "interrupt", "cancel"])
def test_nothing_that_closing_raises_goes_further(misbehave: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        preflight(EnvironmentSpec("walks:AwaitableWalk", {"misbehave": misbehave, "where": "close"}))
    assert "raised in close" in caplog.text


def test_a_close_that_hangs_is_left_to_itself(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        preflight(EnvironmentSpec("walks:Walk", {"misbehave": "wait", "where": "close"}), env_cleanup_time=0.05)
    assert "walks:Walk was still closing after 0.05 s" in caplog.text
    release()


def test_ctrl_c_ends_the_wait_for_a_constructor_that_hangs() -> None:
    waiting = load("walks:WAITING")

    def press() -> None:
        waiting.wait()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    waiting.clear()
    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        preflight(EnvironmentSpec("walks:Walk", {"misbehave": "wait", "where": "constructor"}))
    release()


def release() -> None:
    """Lets what waits go on, and waits for its end."""
    released = load("walks:RELEASED")
    released.set()
    for thread in threading.enumerate():
        if thread.name == "aiorl specimen":
            thread.join()
    released.clear()


def test_awaitable_environments_are_for_the_trainer_s_own_loop() -> None:
    with pytest.raises(ConfigError) as caught:
        preflight(EnvironmentSpec("walks:AwaitableWalk"), num_env_workers=2)
    (fault,) = caught.value.faults
    assert (fault.path, fault.value, fault.remedy) == ("task.environment.num_env_workers", "2", "set it to 0")
    assert "walks:AwaitableWalk is awaitable" in fault.message
    assert not preflight(EnvironmentSpec("walks:Walk"), num_env_workers=2).is_awaitable


VECTOR = "vector_entry_point"
RAISES: dict[str, Any] = {"misbehave": "raise", "where": "constructor"}


@pytest.mark.parametrize(
    ("spec", "field", "message", "remedy"),
    [
        (EnvironmentSpec("CartPol-v1"), "id", "unknown to Gymnasium", "register"),
        (EnvironmentSpec("CartPole-v99"), "id", "unknown to Gymnasium", "register"),
        (EnvironmentSpec("no_such_module:Walk"), "id", "No module named 'no_such_module'", ""),
        (EnvironmentSpec("walks:Wolk"), "id", "'Wolk'", "'Walk'"),
        (EnvironmentSpec("walks:NOT_CALLABLE"), "id", "not callable", ""),
        (EnvironmentSpec("builtins:dict"), "id", "is no environment", ""),
        (EnvironmentSpec("walks:Walk", RAISES), "id", "ValueError: the bridge is out", ""),
        (EnvironmentSpec("walks:Walk", RAISES | {"misbehave": "sys.exit"}), "id", "SystemExit: 9", ""),
        (EnvironmentSpec("walks:Walk", RAISES | {"misbehave": "interrupt"}), "id", "KeyboardInterrupt", ""),
        (EnvironmentSpec("walks:Walk", {"colour": 1}), "kwargs", "'colour'", "constructor"),
        (EnvironmentSpec("walks:Nested"), "id", "observation space Dict", "wrap"),
        (EnvironmentSpec("CartPole-v1", register=("json", "no_such")), "register[1]", "No module named 'no_such'", ""),
        (EnvironmentSpec("CartPole-v1", wrappers=("walks:Doublet",)), "wrappers[0]", "'Doublet'", "'Doubled'"),
        (EnvironmentSpec("walks:vector", {"num_envs": 1}), "id", "a vector environment", "vector_entry_point"),
        (
            EnvironmentSpec("Acrobot-v1", vectorization_mode=VECTOR),
            "vectorization_mode",
            "no vectorised version",
            "sync",
        ),
        (
            EnvironmentSpec("walks:vector", {"num_envs": 1}, vectorization_mode=VECTOR),
            "kwargs.num_envs",
            "",
            "leave it out",
        ),
        (EnvironmentSpec("walks:Walk", wrappers=("walks:NOT_CALLABLE",)), "wrappers[0]", "not callable", ""),
        (EnvironmentSpec("walks:Walk", wrappers=("builtins:repr",)), "wrappers[0]", "is no environment", ""),
        (
            EnvironmentSpec("walks:vector", wrappers=("walks:Doubled",), vectorization_mode=VECTOR),
            "wrappers[0]",
            "cannot wrap this environment",
            "gymnasium.wrappers.vector",
        ),
    ],
    ids=lambda value: value.id if isinstance(value, EnvironmentSpec) else "",
)
def test_faults_are_named_by_their_field(spec: EnvironmentSpec, field: str, message: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        preflight(spec)
    (fault,) = caught.value.faults
    assert fault.path == f"task.environment.{field}"
    assert message in fault.message
    assert remedy in fault.remedy


def test_a_vectorised_version_has_to_be_one() -> None:
    plain: Any = lambda num_envs: gymnasium.make("CartPole-v1").unwrapped  # noqa: E731
    gymnasium.register("Plain-v0", vector_entry_point=plain)
    try:
        with pytest.raises(ConfigError, match=r"task\.environment\.id"):
            preflight(EnvironmentSpec("Plain-v0", vectorization_mode="vector_entry_point"))
    finally:
        del gymnasium.registry["Plain-v0"]


def test_an_import_that_raises_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_world.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be imported: RuntimeError: no licence .*broken_world\.py, line 1"):
        preflight(EnvironmentSpec("broken_world:Walk"))
