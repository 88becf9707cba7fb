"""Every async test runs on asyncio's and on uvloop's loop, in debug mode, and every test leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import uvloop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


# libuv opens a pipe for signals with the first loop of a process, and keeps it.
uvloop.new_event_loop().close()


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"debug": True}), id="asyncio"),
        pytest.param(("asyncio", {"debug": True, "use_uvloop": True}), id="uvloop"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    backend: tuple[str, dict[str, Any]] = request.param
    return backend


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.fixturenames.insert(0, "no_task_left")


@pytest.fixture
async def no_task_left(anyio_backend: tuple[str, dict[str, Any]]) -> AsyncIterator[None]:
    """No asyncio task outlives the test that started it."""
    before = asyncio.all_tasks()
    yield
    left = [task for task in asyncio.all_tasks() - before if not task.done() and not _of_the_runner(task)]
    assert not left, f"tasks left running: {left}"


def _of_the_runner(task: asyncio.Task[Any]) -> bool:
    """Whether a task is the test runner's own."""
    return task is asyncio.current_task() or "TestRunner" in getattr(task.get_coro(), "__qualname__", "")


def _open_files() -> dict[str, str]:
    """The descriptors that a test could leak: sockets, pipes, shared memory, by number and target."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith(("socket:", "pipe:", "/memfd:", "anon_inode:")):
            found[entry.name] = target
    return found


def _leaked(before: dict[str, str]) -> dict[str, str]:
    return {number: target for number, target in _open_files().items() if before.get(number) != target}


def _leavable(thread: threading.Thread) -> bool:
    """Whether a thread belongs to the test machinery, or to the default pool that a loop joins when it is closed."""
    return thread.name.startswith(("pytest_timeout", "asyncio_", "uvloop_"))


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No thread, child process, socket, pipe or shared memory outlives the test that opened it."""
    threads = set(threading.enumerate())
    children = set(psutil.Process().children(recursive=True))
    files = _open_files()
    yield
    for thread in threading.enumerate():
        if thread not in threads and not _leavable(thread):
            thread.join(timeout=5)
            assert not thread.is_alive(), f"thread left running: {thread.name}"
    left = [child for child in psutil.Process().children(recursive=True) if child not in children]
    assert not left, f"child processes left running: {left}"
    if _leaked(files):
        gc.collect()  # 0.2 s once torch is loaded: only where something waits to be collected
        assert not _leaked(files), f"descriptors left open: {_leaked(files)}"
