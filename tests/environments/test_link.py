from __future__ import annotations

import asyncio
import os
import socket
import stat
import tempfile
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import zmq

from aiorl.environments.link import MAX_TURN, LinkServer, WorkerLink, check_endpoint, sweep
from aiorl.environments.wire import Reset, Stop, encode
from aiorl.errors import ConfigError

pytestmark = pytest.mark.anyio


class Inbox:
    """Collects what a server receives, and wakes whoever waits for a number of messages."""

    def __init__(self) -> None:
        self.messages: list[tuple[bytes, list[bytes]]] = []
        self._awaited = 0
        self._arrived = asyncio.Event()

    def receive(self, identity: bytes, frames: list[bytes]) -> None:
        self.messages.append((identity, frames))
        if len(self.messages) >= self._awaited:
            self._arrived.set()

    async def holds(self, count: int) -> None:
        self._awaited = count
        if len(self.messages) < count:
            self._arrived.clear()
            async with asyncio.timeout(10):
                await self._arrived.wait()


def listen(endpoint: str, inbox: Inbox) -> LinkServer:
    return LinkServer(endpoint, inbox.receive, asyncio.get_running_loop())


@pytest.mark.parametrize("endpoint", ["auto", "tcp://127.0.0.1:*", "inproc://here", "ipc://@aiorl-test"])
async def test_messages_cross_in_both_directions(endpoint: str) -> None:
    inbox = Inbox()
    with closing(listen(endpoint, inbox)) as server, WorkerLink(server.context, server.endpoint, b"w0") as worker:
        worker.send(Stop(1))
        await inbox.holds(1)
        assert inbox.messages == [(b"w0", encode(Stop(1)))]
        assert server.send(b"w0", encode(Reset(1, 0, 1)))
        assert worker.receive() == Reset(1, 0, 1)
        assert not server.send(b"nobody", encode(Stop(1)))
        assert (server.num_received, server.num_sent) == (1, 1)


async def test_no_message_is_stranded_under_a_flood() -> None:
    inbox = Inbox()
    count = 1000  # several turns of the loop, with as many messages sent between them

    def receive(identity: bytes, frames: list[bytes]) -> None:
        inbox.receive(identity, frames)
        assert server.send(identity, frames)

    with closing(LinkServer("auto", receive, asyncio.get_running_loop())) as server:

        def flood(identity: bytes) -> None:
            with WorkerLink(server.context, server.endpoint, identity) as worker:
                for sequence in range(count):
                    worker.send(Reset(0, 0, sequence))
                for sequence in range(count):
                    assert worker.receive() == Reset(0, 0, sequence)

        threads = [threading.Thread(target=flood, args=(identity,)) for identity in (b"a", b"b")]
        for thread in threads:
            thread.start()
        await inbox.holds(2 * count)
        for thread in threads:
            thread.join()
        assert server.is_idle
        for identity in (b"a", b"b"):
            mine = [frames for sender, frames in inbox.messages if sender == identity]
            assert mine == [encode(Reset(0, 0, sequence)) for sequence in range(count)]


@pytest.mark.parametrize("look", ["send", "is_idle"])
async def test_whoever_looks_at_the_socket_strands_no_message(look: str) -> None:
    inbox = Inbox()
    with closing(listen("inproc://look", inbox)) as server, WorkerLink(server.context, server.endpoint, b"w") as worker:
        worker.send(Stop(0))
        await inbox.holds(1)
        for count in range(2, 200):
            worker.send(Stop(count))  # the descriptor tells of it
            if look == "send":
                server.send(b"w", encode(Stop(0)))  # and does not any more
            else:
                assert not server.is_idle
            await inbox.holds(count)


async def test_what_is_beyond_a_turn_s_limit_comes_in_the_next_turns() -> None:
    inbox = Inbox()
    with closing(listen("inproc://more", inbox)) as server, WorkerLink(server.context, server.endpoint, b"w") as worker:
        num_messages = 2 * MAX_TURN + 1
        for count in range(num_messages):
            worker.send(Stop(count))
        assert not server.is_idle  # the descriptor tells of nothing any more
        await asyncio.sleep(0)
        assert len(inbox.messages) == MAX_TURN
        await inbox.holds(num_messages)
        assert server.is_idle


async def test_it_is_idle_unless_something_waits() -> None:
    inbox = Inbox()
    with closing(listen("inproc://idle", inbox)) as server:
        assert server.is_idle
        with WorkerLink(server.context, server.endpoint, b"w") as worker:
            worker.send(Stop(0))
            assert not server.is_idle
            server.receive_now()
            assert server.is_idle
            assert len(inbox.messages) == 1
    assert server.is_idle
    assert not server.send(b"w", encode(Stop(0)))


async def test_the_private_folder_is_private_and_short_lived() -> None:
    def look(path: Path) -> tuple[int, bool] | None:
        return (stat.S_IMODE(path.parent.stat().st_mode), path.is_socket()) if path.parent.exists() else None

    with closing(listen("auto", Inbox())) as server:
        path = Path(server.endpoint.removeprefix("ipc://"))
        assert look(path) == (0o700, True)
    assert look(path) is None
    server.close()


def left_behind(folder: Path, *, age_s: float, listens: bool = False) -> socket.socket:
    """A private folder, of which the socket is returned, so that the test closes it."""
    folder.mkdir(0o700)
    end = socket.socket(socket.AF_UNIX)
    end.bind(str(folder / "link"))
    if listens:
        end.listen(0)
    made_at = time.time() - age_s
    os.utime(folder, (made_at, made_at))
    return end


def test_only_what_killed_runs_left_is_swept(tmp_path: Path) -> None:
    with ExitStack() as sockets:
        for name, age_s, listens in (
            ("aiorl-dead", 61, False),
            ("aiorl-live", 3600, True),
            ("aiorl-full", 3600, True),
            ("aiorl-young", 30, False),
            ("other-dead", 3600, False),
        ):
            sockets.enter_context(left_behind(tmp_path / name, age_s=age_s, listens=listens))
        waiting = sockets.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(str(tmp_path / "aiorl-full" / "link"))  # its backlog is full
        (tmp_path / "aiorl-mine").mkdir()
        (tmp_path / "aiorl-mine" / "link").write_text("precious")
        (tmp_path / "aiorl-file").write_text("precious")
        (tmp_path / "aiorl-link").symlink_to(tmp_path / "other-dead")
        for name in ("aiorl-mine", "aiorl-file"):
            os.utime(tmp_path / name, (0, 0))
        os.utime(tmp_path / "aiorl-link", (0, 0), follow_symlinks=False)
        before = {entry.name for entry in tmp_path.iterdir()}
        sweep(tmp_path)
        assert before - {entry.name for entry in tmp_path.iterdir()} == {"aiorl-dead"}
        assert (tmp_path / "other-dead" / "link").is_socket()
    sweep(tmp_path / "missing")
    sweep(tmp_path / "aiorl-file")


async def test_a_new_private_folder_takes_the_place_of_dead_ones() -> None:
    with tempfile.TemporaryDirectory(prefix="aiorl-", dir="/tmp") as folder:
        left_behind(Path(folder) / "x", age_s=3600).close()
        dead = (Path(folder) / "x").rename(f"{folder}dead")
        with closing(listen("auto", Inbox())):
            assert not dead.exists()


async def test_a_temporary_folder_of_a_long_name_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with closing(listen("auto", Inbox())) as server:
        assert server.endpoint.startswith("ipc:///tmp/aiorl-")


async def test_without_ipc_it_is_loopback_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda capability: False)
    with closing(listen("auto", Inbox())) as server:
        assert server.endpoint.startswith("tcp://127.0.0.1:")


def refused(endpoint: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_endpoint(endpoint)
    (fault,) = caught.value.faults
    assert (fault.path, fault.value) == ("link.endpoint", f'"{endpoint}"')
    return fault.message


async def test_an_address_in_use_is_refused(tmp_path: Path) -> None:
    for endpoint in (f"ipc://{tmp_path}/link", "tcp://127.0.0.1:*", "ipc://@aiorl-in-use"):
        with closing(listen(endpoint, Inbox())) as server:
            assert refused(server.endpoint) == "is in use already"
            with pytest.raises(ConfigError, match="in use"):
                listen(server.endpoint, Inbox())
            with WorkerLink(server.context, server.endpoint, b"w") as worker:
                worker.send(Stop(0))  # it still listens
        check_endpoint(server.endpoint)


def test_addresses_that_cannot_be_listened_on_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    assert "is a file" in refused(f"ipc://{file}")
    assert file.read_text() == "precious"
    assert "No such file" in refused(f"ipc://{tmp_path}/missing/link")
    assert "longer" in refused(f"ipc://{tmp_path}/{'x' * 108}")
    assert "other machines" in refused("tcp://0.0.0.0:5555")
    for port in (65536, 99999):  # of which ZeroMQ takes the lower 16 bits
        assert "port above 65535" in refused(f"tcp://127.0.0.1:{port}")
    assert "cannot be listened on" in refused("tcp://127.0.0.1:notaport")
    check_endpoint("auto")


def test_a_dead_run_s_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "link"
    with closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(path))
    check_endpoint(f"ipc://{path}")


def test_a_given_socket_is_only_this_user_s(tmp_path: Path) -> None:
    async def run() -> None:
        with closing(listen(f"ipc://{tmp_path}/link", Inbox())):
            assert stat.S_IMODE((tmp_path / "link").stat().st_mode) == 0o600
        assert not (tmp_path / "link").exists()

    umask = os.umask(0)
    try:
        asyncio.run(run())
    finally:
        os.umask(umask)
