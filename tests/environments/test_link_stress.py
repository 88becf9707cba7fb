"""Many small bursts both ways between one server and peers that are processes, while the server does whatever comes into its mind.

A peer has several groups, each with a few messages under way. Every message is numbered within its group, is answered with its own
number, and only an answer makes room for the group's next one. So either end sees at once what is lost, repeated or out of order, and
a message that is stranded ends the traffic.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections import deque
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING

import pytest

from aiorl.environments.link import LinkServer

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.anyio

NUM_GROUPS = 3
WINDOWS = (1, 2, 8, 32)  # messages under way of each group, peer by peer
BURSTS = (1, 1, 2, 5, 20, 200)

PEER = f"""
import random, sys, zmq
endpoint, identity, window, count = sys.argv[1], sys.argv[2].encode(), int(sys.argv[3]), int(sys.argv[4])
rng = random.Random(identity)
groups = {NUM_GROUPS}
with zmq.Context() as context, context.socket(zmq.DEALER) as end:
    end.setsockopt(zmq.IDENTITY, identity)
    end.setsockopt(zmq.LINGER, 0)
    end.connect(endpoint)
    num_left = last = count * groups
    due = list(range(groups * window))  # number * groups + group
    awaited = list(range(groups))
    while True:
        for value in due:
            end.send(value.to_bytes(8, "little"))
        due.clear()
        burst = rng.choice({BURSTS})
        for at in range(burst):
            try:
                answer = end.recv(0 if not at else zmq.NOBLOCK)
            except zmq.Again:
                break
            value = int.from_bytes(answer, "little")
            group = value % groups
            if value != awaited[group]:
                sys.exit(f"group {{group}}: {{value}} instead of {{awaited[group]}}")
            awaited[group] = value + groups
            following = value + window * groups
            if following < last:
                due.append(following)
            num_left -= 1
            if not num_left:
                sys.exit(0)
"""


class Traffic:
    """Takes what the peers send, checks it, and keeps it until it is answered."""

    def __init__(self, identities: list[bytes], count: int) -> None:
        self.arrived = asyncio.Event()
        self.unanswered = {identity: deque[bytes]() for identity in identities}
        self.num_left = len(identities) * NUM_GROUPS * count
        self.num_unanswered = 0
        self.faults: list[str] = []
        self._awaited = {identity: list(range(NUM_GROUPS)) for identity in identities}

    def receive(self, identity: bytes, frames: list[bytes]) -> None:
        (frame,) = frames
        value = int.from_bytes(frame, "little")
        awaited = self._awaited[identity]
        if value != awaited[value % NUM_GROUPS]:
            self.faults.append(f"{identity!r}: {value} instead of one of {awaited}")
        awaited[value % NUM_GROUPS] = value + NUM_GROUPS
        self.unanswered[identity].append(frame)
        self.num_unanswered += 1
        self.num_left -= 1
        self.arrived.set()

    def answer(self, server: LinkServer, rng: random.Random) -> None:
        """Sends a burst of answers to one peer."""
        identity = rng.choice([identity for identity, frames in self.unanswered.items() if frames])
        frames = self.unanswered[identity]
        for _ in range(min(rng.choice(BURSTS), len(frames))):
            assert server.send(identity, [frames.popleft()])
            self.num_unanswered -= 1


async def serve(server: LinkServer, traffic: Traffic, rng: random.Random) -> None:
    """Answers everything, in an order and with interruptions of its own."""
    while traffic.num_left or traffic.num_unanswered:
        assert not traffic.faults
        what = rng.random()
        if what < 0.1:
            server.receive_now()
        elif what < 0.2:
            assert isinstance(server.is_idle, bool)
        elif what < 0.21:
            time.sleep(0.001)  # noqa: ASYNC251 - the loop stands still, and what arrives piles up
        elif what < 0.3:
            while traffic.num_unanswered:  # only sends
                traffic.answer(server, rng)
        if traffic.num_unanswered:
            traffic.answer(server, rng)
        if traffic.num_unanswered:
            await asyncio.sleep(0)
        elif traffic.num_left:
            traffic.arrived.clear()
            await traffic.arrived.wait()


@contextmanager
def peers(endpoint: str, identities: list[bytes], count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The peers' processes; killed where they have not ended."""
    with ExitStack() as stack:
        processes = []
        for identity, window in zip(identities, WINDOWS, strict=True):
            command = [sys.executable, "-c", PEER, endpoint, identity.decode(), str(window), str(count)]
            processes.append(stack.enter_context(subprocess.Popen(command)))
            stack.callback(processes[-1].kill)
        yield processes


async def exchange(num_messages: int, timeout_s: float) -> None:
    """Has about that many messages, both ways together, cross the link; none is lost or out of its group's order."""
    count = num_messages // (2 * NUM_GROUPS * len(WINDOWS))
    rng = random.Random(num_messages)
    identities = [b"peer %d" % index for index in range(len(WINDOWS))]
    traffic = Traffic(identities, count)
    with (
        closing(LinkServer("auto", traffic.receive, asyncio.get_running_loop())) as server,
        peers(server.endpoint, identities, count) as processes,
    ):
        async with asyncio.timeout(timeout_s):
            await serve(server, traffic, rng)
        assert [process.wait(10) for process in processes] == [0] * len(processes)
        assert server.num_received == server.num_sent == len(WINDOWS) * NUM_GROUPS * count


async def test_bursts_both_ways_lose_and_reorder_nothing() -> None:
    await exchange(100_000, timeout_s=60)


@pytest.mark.slow
@pytest.mark.soak
async def test_ten_million_messages_both_ways_lose_and_reorder_nothing() -> None:
    await exchange(10_000_000, timeout_s=3000)
