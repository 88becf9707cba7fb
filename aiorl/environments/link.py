"""The two ends of the link: the trainer's ROUTER on its loop's own reader, and a worker's blocking DEALER.

=====================================  ===============================================================================
hand-off                               what happens when it is full
=====================================  ===============================================================================
trainer → worker, ``MAX_QUEUED``       ``LinkServer.send`` answers False; never so while every group is owed one answer
worker → trainer, ``MAX_QUEUED``       the worker waits in ``send``
one turn of the loop, ``MAX_TURN``     the rest is taken in the next turn, so that a flood does not hold the loop
=====================================  ===============================================================================

ZeroMQ's descriptor tells of changes, not of a state: whoever sends or receives may swallow the change that announced a
message. So messages are received until there is none (EAGAIN, which also has every later one announced), and EVENTS is
looked at after sending: once for all that is sent in a turn of the loop, before the loop waits again.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import tempfile
import time
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import zmq
import zmq.backend

from aiorl.environments.fields import MAX_ARRAY_BYTES, MAX_HEADER_BYTES
from aiorl.environments.wire import decode, encode
from aiorl.errors import ConfigError, Fault

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from aiorl.environments.wire import Message

MAX_QUEUED: Final = 4096
MAX_TURN: Final = 256
MAX_IPC_PATH_BYTES: Final = 107
MAX_PORT: Final = 65535
_HANDSHAKE_MS: Final = 10_000
_MAX_ENTRIES, _MAX_SWEPT, _MIN_AGE_S = 4096, 32, 60.0

# Plain integers: an operation on pyzmq's flags costs a microsecond each.
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
_NOBLOCK, _SNDMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE)

# The socket's own method: the one that pyzmq puts before it serves other kinds of socket, for half a microsecond a frame.
_send_frame = zmq.backend.Socket.send


def _configure(end: zmq.Socket[bytes]) -> None:
    end.setsockopt(zmq.LINGER, 0)
    end.setsockopt(zmq.SNDHWM, MAX_QUEUED)
    end.setsockopt(zmq.RCVHWM, MAX_QUEUED)
    end.setsockopt(zmq.MAXMSGSIZE, max(MAX_ARRAY_BYTES, MAX_HEADER_BYTES))
    end.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)


def _send(end: zmq.Socket[bytes], parts: list[bytes], flags: int = 0) -> None:
    """What ``send_multipart`` does, in half its time."""
    for part in parts[:-1]:
        _send_frame(end, part, flags | _SNDMORE)
    _send_frame(end, parts[-1], flags)


def _receive(end: zmq.Socket[bytes], flags: int = 0) -> list[bytes]:
    """What ``recv_multipart`` does, in half its time: a frame itself knows whether more of them follow."""
    frame = end.recv(flags, copy=False)
    parts = [frame.bytes]
    while frame.more:
        frame = end.recv(flags, copy=False)
        parts.append(frame.bytes)
    return parts


class LinkServer:
    """The trainer's end: listens, hands what arrives to ``receive``, and sends without ever waiting.

    Belongs to the thread and loop that made it. ``receive(identity, frames)`` is called on the loop and must not raise.

    Attributes:
        endpoint: Where workers connect to.
        context: For workers that are threads of this process.
        num_received: Messages, whoever they came from.
        num_sent: Messages.

    Raises:
        ConfigError: The endpoint is in use, or cannot be listened on; a fault on ``link.endpoint``.
    """

    def __init__(
        self,
        endpoint: str,
        receive: Callable[[bytes, list[bytes]], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.num_received = 0
        self.num_sent = 0
        self._receive = receive
        self._loop = loop
        self._folder: Path | None = None
        self._drain_handle: asyncio.Handle | None = None
        self._look_handle: asyncio.Handle | None = None
        self._socket = self.context.socket(zmq.ROUTER)
        self._is_closed = False
        self.endpoint = ""
        try:
            _configure(self._socket)
            self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self.endpoint = self._bind_private() if endpoint == "auto" else _bind_given(self._socket, endpoint)
            self._descriptor = int(self._socket.getsockopt(zmq.FD))
            loop.add_reader(self._descriptor, self._drain)
        except BaseException:  # a cancellation too must not leave the socket open; raised again
            self.release()
            raise

    def _bind_private(self) -> str:
        """Listens where only this user can connect: a socket in a new folder of mode 0700, or loopback TCP.

        An abstract socket would need no folder, but every user of the machine, and of a container that shares its
        network, can connect to one; the token keeps them from being heard, not from flooding the link.
        """
        sweep(Path("/tmp"))
        for parent in (tempfile.gettempdir(), "/tmp"):
            path = str(Path(parent) / "aiorl-01234567" / "link")
            if zmq.has("ipc") and Path(parent).is_dir() and len(os.fsencode(path)) <= MAX_IPC_PATH_BYTES:
                self._folder = Path(tempfile.mkdtemp(prefix="aiorl-", dir=parent))
                self._socket.bind(f"ipc://{self._folder / 'link'}")
                return f"ipc://{self._folder / 'link'}"
        return _bind_given(self._socket, "tcp://127.0.0.1:*")

    def _drain(self) -> None:
        """Receives until nothing is left, or ``MAX_TURN`` messages were taken: then the rest comes in the next turn."""
        if self._drain_handle is not None:
            self._drain_handle.cancel()
            self._drain_handle = None
        for _ in range(MAX_TURN):
            if self._is_closed:
                return
            try:
                identity = self._socket.recv(_NOBLOCK)
                frames = _receive(self._socket, _NOBLOCK)
            except zmq.Again:
                return
            self.num_received += 1
            self._receive(identity, frames)
        self._drain_soon()

    def _look(self) -> None:
        """Receives what sending swallowed the announcement of."""
        self._look_handle = None
        if not self._is_closed and self._is_readable():
            self._drain()

    def _is_readable(self) -> bool:
        return bool(int(self._socket.getsockopt(_EVENTS)) & _POLLIN)

    def _drain_soon(self) -> None:
        if self._drain_handle is None:
            self._drain_handle = self._loop.call_soon(self._drain)

    def send(self, identity: bytes, frames: list[bytes]) -> bool:
        """Sends to one worker; False where it is not connected, or where more waits for it than can be owed to it."""
        if self._is_closed:
            return False
        if self._look_handle is None:
            self._look_handle = self._loop.call_soon(self._look)
        try:
            _send(self._socket, [identity, *frames], _NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise
            return False
        self.num_sent += 1
        return True

    @property
    def is_idle(self) -> bool:
        """Whether no message waits to be received; one that does is received in the loop's next turn."""
        if not self._is_closed and self._drain_handle is None and self._is_readable():
            self._drain_soon()  # looking swallowed the change that would have woken the loop
        return self._drain_handle is None

    def receive_now(self) -> None:
        """Receives what has arrived, without waiting for the loop."""
        if not self._is_closed:
            self._drain()

    def close(self, release: bool = True) -> None:
        """Stops listening and removes the socket's folder; further calls do nothing.

        Args:
            release: False leaves the context to a thread that still has a socket of it; ``release`` is due later.
        """
        if not self._is_closed:
            self._is_closed = True
            self._loop.remove_reader(self._descriptor)
            for handle in (self._drain_handle, self._look_handle):
                if handle is not None:
                    handle.cancel()
            self._drain_handle = self._look_handle = None
        if release:
            self.release()

    def release(self) -> None:
        """Closes the socket and ends the context; waits until no other socket of the context is open."""
        self._is_closed = True
        if self._socket.closed:
            return
        # First of all: as long as this end listens, no other run takes the path.
        _unlink(self.endpoint)
        self._socket.close()
        self.context.term()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class WorkerLink:
    """A worker's end: sends and receives typed messages, one at a time, and waits for each."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, identity: bytes) -> None:
        self._socket = context.socket(zmq.DEALER)
        _configure(self._socket)
        self._socket.setsockopt(zmq.IDENTITY, identity)
        self._socket.connect(endpoint)

    def send(self, message: Message) -> None:
        """Sends a message; raises ``MalformedMessage`` where it cannot be sent."""
        _send(self._socket, encode(message))

    def receive(self) -> Message:
        """Waits for the next message; raises ``MalformedMessage`` where it is none."""
        return decode(_receive(self._socket))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()


def sweep(parent: Path) -> None:
    """Removes the private folders that runs of this user left when they were killed; never raises.

    Only what is above a minute old, and holds nothing but a socket on which nobody listens. ``parent`` has to belong to
    this machine alone: the socket of a run that lives on another one refuses connections too.
    """
    with suppress(OSError), os.scandir(parent) as entries:
        found = (entry for entry in islice(entries, _MAX_ENTRIES) if entry.name.startswith("aiorl-"))
        for entry in islice(found, _MAX_SWEPT):
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
                if is_own and time.time() - status.st_mtime > _MIN_AGE_S:
                    _remove_dead(Path(entry.path))


def _remove_dead(folder: Path) -> None:
    link = folder / "link"
    if stat.S_ISSOCK(link.lstat().st_mode):
        with closing(socket.socket(socket.AF_UNIX)) as probe:
            probe.setblocking(False)  # a listener whose backlog is full lives
            try:
                probe.connect(str(link))
            except ConnectionRefusedError:
                link.unlink()
                folder.rmdir()


def check_endpoint(endpoint: str) -> None:
    """Listens on an endpoint and stops at once.

    Raises:
        ConfigError: It is in use, or cannot be listened on; a fault on ``link.endpoint``.
    """
    if endpoint != "auto":
        with zmq.Context() as context, context.socket(zmq.ROUTER) as end:
            _configure(end)
            _unlink(_bind_given(end, endpoint))


def _unlink(endpoint: str) -> None:
    """Removes an ipc endpoint's path, which ZeroMQ leaves behind."""
    path = endpoint.removeprefix("ipc://")
    if path != endpoint and not path.startswith("@"):
        Path(path).unlink(missing_ok=True)


def _bind_given(end: zmq.Socket[bytes], endpoint: str) -> str:
    scheme, _, address = endpoint.partition("://")
    is_file = scheme == "ipc" and not address.startswith("@")
    if is_file:
        _check_ipc_path(endpoint, Path(address))
    elif scheme == "tcp" and not address.startswith(("127.", "localhost:")):
        raise _refusal(endpoint, "is open to other machines, and the link is not encrypted", "listen on 127.0.0.1")
    port = address.rpartition(":")[2] if scheme == "tcp" else ""
    if port.isdecimal() and int(port) > MAX_PORT:  # of which ZeroMQ takes the lower 16 bits
        raise _refusal(endpoint, f"has a port above {MAX_PORT}", "lower it, or write * for any that is free")
    try:
        end.bind(endpoint)
    except zmq.ZMQError as error:
        if error.errno == errno.EADDRINUSE:
            raise _in_use(endpoint) from error
        raise _refusal(endpoint, f"cannot be listened on: {error.strerror}", 'give another one, or "auto"') from error
    if is_file:
        Path(address).chmod(0o600)
    return end.get_string(zmq.LAST_ENDPOINT)


def _check_ipc_path(endpoint: str, path: Path) -> None:
    """ZeroMQ removes whatever stands at the path and takes its place, a live socket too."""
    if len(os.fsencode(path)) > MAX_IPC_PATH_BYTES:
        raise _refusal(
            endpoint, f"is longer than the {MAX_IPC_PATH_BYTES} bytes of a socket's path", "shorten the path"
        )
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise _refusal(endpoint, "is a file or folder already", "give a path where nothing stands")
    with closing(socket.socket(socket.AF_UNIX)) as probe, suppress(ConnectionRefusedError):
        probe.connect(str(path))
        raise _in_use(endpoint)


def _in_use(endpoint: str) -> ConfigError:
    return _refusal(endpoint, "is in use already", 'end the run that listens there, give another one, or "auto"')


def _refusal(endpoint: str, message: str, remedy: str) -> ConfigError:
    value: Any = f'"{endpoint}"'
    return ConfigError([Fault("link.endpoint", message, value, remedy)])
