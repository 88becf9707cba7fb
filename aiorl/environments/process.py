"""Where a worker runs: a process of its own, or a thread of the trainer's. Neither is ever left behind silently.

A process is started from the thread of the loop, never from a pool's: the kernel kills it when the thread that started
it ends. Its death is seen through a pidfd on the loop, within a millisecond.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import msgpack

from aiorl.environments.slab import open_slab
from aiorl.environments.worker import TERMINATE, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiorl.environments.link import LinkServer
    from aiorl.environments.slab import Slab

logger = logging.getLogger(__name__)

TAIL_BYTES: Final = 16 * 1024
"""How much of a worker's output is kept, to be shown where the worker fails."""

_READ_BYTES: Final = 64 * 1024
_REAP_S: Final = 5.0
_ONE_THREAD: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Host(Protocol):
    """A worker's process or thread, as its supervisor sees it.

    Attributes:
        ended: Set on the loop when it has ended, for whatever reason.
        slab: Memory that it shares with the trainer; None where it shares none.
    """

    ended: asyncio.Event
    slab: Slab | None

    @property
    def pid(self) -> int | None:
        """Its own process; None where it has none, or has it no more."""

    def describe_end(self) -> tuple[int, str]:
        """Exit status (negative for a signal), and in words how it ended."""

    def read_tail(self) -> str:
        """The end of what it wrote to its standard output and error."""

    def terminate(self) -> None:
        """Interrupts what its environments do, and gives them a chance to clean up."""

    def kill(self) -> None:
        """Ends it at once, where that is possible."""

    def close(self) -> bool:
        """Frees what belongs to it, killing it first where it runs; False where it cannot be ended."""


class WorkerProcess:
    """``python -m aiorl.environments.worker``, with this interpreter's flags and import path.

    Its standard output and error are one pipe, which is kept as a tail and logged line by line at DEBUG.

    Args:
        link: Where it connects to.
        worker: Its number.
        incarnation: Of this number.
        identity: Its name on the link.
        token: The secret that shows that it is the one started here.
        on_end: Called on the loop when it has ended.
    """

    def __init__(
        self,
        link: LinkServer,
        *,
        worker: int,
        incarnation: int,
        identity: bytes,
        token: bytes,
        on_end: Callable[[], None],
    ) -> None:
        self.ended = asyncio.Event()
        self._worker = worker
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._tail = b""
        self._line = b""
        self._waiter: threading.Thread | None = None
        self._pidfd: int | None = None
        self.slab: Slab | None = open_slab()
        lifeline, self._lifeline = os.pipe()
        self._output, output = os.pipe()
        try:
            slab = -1 if self.slab is None else self.slab.descriptor
            command = _command(link.endpoint, worker, incarnation, lifeline, slab)
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(lifeline,) if slab < 0 else (lifeline, slab),
                env=child_environment(),
            )
        except BaseException:  # no descriptor is left open, whatever happened; raised again
            os.close(self._lifeline)
            os.close(self._output)
            self._release_slab()
            raise
        finally:
            os.close(lifeline)
            os.close(output)
        boot = msgpack.packb({"identity": identity, "token": token, "path": list(_import_path())})
        os.set_blocking(self._lifeline, False)  # a pipe holds 64 KB, many times what is written here
        with suppress(BrokenPipeError):  # it has ended already, which is seen below
            os.write(self._lifeline, len(boot).to_bytes(4, "big") + boot)
        os.set_blocking(self._output, False)
        self._loop.add_reader(self._output, self._read)
        self._watch()

    def _watch(self) -> None:
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
        except (AttributeError, OSError):  # no Linux, or one older than 5.3
            self._waiter = threading.Thread(target=self._wait, name=f"worker {self._worker} exit", daemon=True)
            self._waiter.start()
        else:
            self._loop.add_reader(self._pidfd, self._end)

    def _wait(self) -> None:
        self._process.wait()
        with suppress(RuntimeError):  # the loop is closed: nobody asks any more
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self._process.poll() is None or self.ended.is_set():
            return
        self._stop_watching()
        self.ended.set()
        self._on_end()

    def _stop_watching(self) -> None:
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    @property
    def pid(self) -> int | None:
        """The process; None once it has ended."""
        return None if self.ended.is_set() else self._process.pid

    def describe_end(self) -> tuple[int, str]:
        """Exit status, and how it ended."""
        status = self._process.returncode
        if status is None:
            return 0, "it is still running"
        if status >= 0:
            return status, f"its process ended with exit status {status} although nobody had asked it to"
        name = signal.Signals(-status).name if -status in signal.valid_signals() else f"signal {-status}"
        hint = ", perhaps by the kernel for want of memory" if name == "SIGKILL" else ""
        return status, f"its process was ended by {name}{hint}"

    def read_tail(self) -> str:
        """The end of its output, what has just arrived included."""
        self._read()
        return self._tail.decode("utf-8", "replace")

    def _read(self) -> None:
        while self._output >= 0:
            try:
                data = os.read(self._output, _READ_BYTES)
            except BlockingIOError:
                return
            if not data:
                self._stop_reading()
                return
            self._tail = (self._tail + data)[-TAIL_BYTES:]
            if logger.isEnabledFor(logging.DEBUG):
                *lines, self._line = (self._line + data).split(b"\n")
                for line in lines:
                    logger.debug("worker %d: %s", self._worker, line.decode("utf-8", "replace"))

    def _stop_reading(self) -> None:
        if self._output >= 0:
            self._loop.remove_reader(self._output)
            os.close(self._output)
            self._output = -1

    def terminate(self) -> None:
        """Interrupts its environments by the lifeline; a SIGTERM from elsewhere it leaves to the trainer."""
        if self._lifeline >= 0:
            with suppress(OSError):  # it has ended
                os.write(self._lifeline, TERMINATE)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def close(self) -> bool:
        """Kills it where it runs, waits for its end, which then is a matter of milliseconds, and closes its pipes."""
        self._process.kill()
        try:
            self._process.wait(_REAP_S)
        except subprocess.TimeoutExpired:  # in an uninterruptible wait of the kernel's
            logger.exception("worker %d, process %d, was killed and does not end", self._worker, self._process.pid)
            return False
        finally:
            self._stop_watching()
            self._read()
            self._stop_reading()
            if self._lifeline >= 0:
                os.close(self._lifeline)
                self._lifeline = -1
        self._release_slab()  # only now: nobody writes any more
        if self._waiter is not None:
            self._waiter.join()
        self.ended.set()
        return True

    def _release_slab(self) -> None:
        if self.slab is not None:
            self.slab.release()


class WorkerThread:
    """The same worker in a thread of this process. A thread cannot be ended from outside, only asked.

    Arguments are those of ``WorkerProcess``.
    """

    def __init__(
        self,
        link: LinkServer,
        *,
        worker: int,
        incarnation: int,
        identity: bytes,
        token: bytes,
        on_end: Callable[[], None],
    ) -> None:
        self.ended = asyncio.Event()
        self.pid = None
        self.slab: Slab | None = None
        self._worker = worker
        self._on_end = on_end
        self._error = ""
        self._loop = asyncio.get_running_loop()

        def run() -> None:
            try:
                serve(
                    link.context, link.endpoint, worker=worker, incarnation=incarnation, identity=identity, token=token
                )
            except BaseException:  # noqa: BLE001 - reported by the supervisor as the worker's end
                self._error = traceback.format_exc()
            with suppress(RuntimeError):  # the loop is closed: nobody asks any more
                self._loop.call_soon_threadsafe(self._end)

        self.thread = threading.Thread(target=run, name=f"aiorl worker {worker}", daemon=True)
        self.thread.start()

    def _end(self) -> None:
        self.thread.join()
        self.ended.set()
        self._on_end()

    def describe_end(self) -> tuple[int, str]:
        """Exit status 1 where it raised, else 0."""
        return int(bool(self._error)), "its thread ended although nobody had asked it to"

    def read_tail(self) -> str:
        """The traceback that ended it; what it printed is among the trainer's own output."""
        return self._error

    def terminate(self) -> None:
        """A thread takes no orders: nothing is done."""

    def kill(self) -> None:
        """A thread cannot be killed: nothing is done."""

    def close(self) -> bool:
        """Whether it has ended; it has been asked to."""
        if not self.ended.is_set():
            logger.warning(
                "worker %d, a thread, is still in its environment's code and is left to itself", self._worker
            )
        return self.ended.is_set()


def _command(endpoint: str, worker: int, incarnation: int, lifeline: int, slab: int) -> list[str]:
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # -W and -X are not inherited
    arguments = {"connect": endpoint, "worker": worker, "incarnation": incarnation}
    arguments |= {"parent": os.getpid(), "lifeline": lifeline, "slab": slab}
    options = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    # -P: the working folder is on the path where the trainer has it there, and nowhere else.
    return [sys.executable, *flags, "-P", "-m", "aiorl.environments.worker", *options]


def child_environment() -> dict[str, str]:
    """This process's environment, the import path by which the worker finds aiorl itself, and one thread of BLAS."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(_import_path()), **dict.fromkeys(_ONE_THREAD, "1")}


def _import_path() -> Iterator[str]:
    return (str(Path(entry).absolute()) for entry in sys.path)
