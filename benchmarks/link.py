"""The link against ``zmq.asyncio``: how many messages a second one loop takes from its workers and answers.

    python benchmarks/link.py [--peers 2] [--windows 2 16] [--bytes 512] [--seconds 1] [--pairs 10]

Peers are processes of their own, each with a window of messages under way: 2 are what a worker with two groups has, 16 keep the
server busy, so that its rate is what is measured. Ours answers in the turn of the loop after the message's, as the trainer does;
``zmq.asyncio`` in a coroutine that awaits each message and sends its answer. The two alternate, pair after pair, on asyncio's
loop and on uvloop's. Printed are medians and ranges of messages per second, of the processor time that the loop's thread spends
on a message and its answer, and of their ratios within a pair.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvloop
import zmq
import zmq.asyncio

from aiorl.environments.link import MAX_QUEUED, LinkServer

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence
    from typing import Any

ANSWER = b"a" * 256
WARM_UP_S = 0.3

PEER = """
import sys, zmq
endpoint, identity, window, size = sys.argv[1], sys.argv[2].encode(), int(sys.argv[3]), int(sys.argv[4])
with zmq.Context() as context, context.socket(zmq.DEALER) as end:
    end.setsockopt(zmq.IDENTITY, identity)
    end.setsockopt(zmq.LINGER, 0)
    end.connect(endpoint)
    message = b"m" * size
    for _ in range(window):
        end.send(message)
    while end.recv() != b"stop":
        end.send(message)
"""


@dataclass(frozen=True)
class Rate:
    """What one measurement found."""

    messages_per_s: float
    thread_us: float  # of the loop's thread, per message and its answer


@contextmanager
def peers(endpoint: str, *, count: int, window: int, size: int) -> Iterator[list[bytes]]:
    """Starts processes that keep a server busy; waits for their end, for which the server has told them to stop."""
    identities = [b"0.%d.0123456789abcdef" % index for index in range(count)]
    processes = [
        subprocess.Popen([sys.executable, "-c", PEER, endpoint, identity.decode(), str(window), str(size)])
        for identity in identities
    ]
    try:
        yield identities
        for process in processes:
            process.wait(10)
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def measure(count: Callable[[], int], seconds: float, started: asyncio.Event) -> Rate:
    """The rate at which `count` grows, after a warm-up."""
    await started.wait()
    await asyncio.sleep(WARM_UP_S)
    before, since, used = count(), time.perf_counter(), time.thread_time()
    await asyncio.sleep(seconds)
    number = count() - before
    return Rate(number / (time.perf_counter() - since), (time.thread_time() - used) / number * 1e6)


async def measure_link(args: argparse.Namespace, window: int) -> Rate:
    """Ours."""
    loop = asyncio.get_running_loop()
    seen: set[bytes] = set()
    started = asyncio.Event()
    unanswered: list[bytes] = []

    def receive(identity: bytes, frames: list[bytes]) -> None:
        if not unanswered:
            loop.call_soon(answer)
        unanswered.append(identity)

    def answer() -> None:
        for identity in unanswered:
            server.send(identity, [ANSWER])
        if not started.is_set():
            seen.update(unanswered)
            if len(seen) == args.peers:
                started.set()
        unanswered.clear()

    with (
        closing(LinkServer("auto", receive, loop)) as server,
        peers(server.endpoint, count=args.peers, window=window, size=args.bytes) as identities,
    ):
        rate = await measure(lambda: server.num_received, args.seconds, started)
        for identity in identities:
            server.send(identity, [b"stop"])
    return rate


async def measure_zmq_asyncio(args: argparse.Namespace, window: int) -> Rate:
    """The usual way."""
    num_received = 0
    seen: set[bytes] = set()
    started = asyncio.Event()
    with tempfile.TemporaryDirectory() as folder, zmq.asyncio.Context() as context:
        socket = context.socket(zmq.ROUTER)
        with socket:
            socket.setsockopt(zmq.LINGER, 0)
            for limit in (zmq.SNDHWM, zmq.RCVHWM):
                socket.setsockopt(limit, MAX_QUEUED)
            socket.bind(f"ipc://{folder}/link")

            async def serve() -> None:
                nonlocal num_received
                while True:
                    identity, *_ = await socket.recv_multipart()
                    num_received += 1
                    await socket.send_multipart([identity, ANSWER])
                    if not started.is_set():
                        seen.add(identity)
                        if len(seen) == args.peers:
                            started.set()

            with peers(f"ipc://{folder}/link", count=args.peers, window=window, size=args.bytes) as identities:
                async with asyncio.TaskGroup() as tasks:
                    serving = tasks.create_task(serve())
                    rate = await measure(lambda: num_received, args.seconds, started)
                    serving.cancel()
                for identity in identities:
                    await socket.send_multipart([identity, b"stop"])
                await asyncio.sleep(0.1)
    return rate


def run(work: Coroutine[Any, Any, Rate], loop: str) -> Rate:
    """One measurement on a loop of its own."""
    factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(debug=False, loop_factory=factory) as runner:
        return runner.run(work)


def compare(args: argparse.Namespace, window: int, loop: str) -> None:
    """Measures pairs and prints them."""
    pairs = [
        (run(measure_link(args, window), loop), run(measure_zmq_asyncio(args, window), loop)) for _ in range(args.pairs)
    ]
    print(f"window {window}, {loop}")
    for name, rates in (("aiorl", [ours for ours, _ in pairs]), ("zmq.asyncio", [theirs for _, theirs in pairs])):
        speed = spread([rate.messages_per_s for rate in rates], 0)
        cost = spread([rate.thread_us for rate in rates], 1)
        print(f"  {name:12} {speed} messages/s; loop's thread {cost} us per message and answer")
    faster = spread([ours.messages_per_s / theirs.messages_per_s for ours, theirs in pairs], 2)
    cheaper = spread([theirs.thread_us / ours.thread_us for ours, theirs in pairs], 2)
    print(f"  {'ratio':12} {faster} in messages/s; {cheaper} in the loop's thread", flush=True)


def spread(values: Sequence[float], digits: int) -> str:
    """Median and range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--bytes", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=10)
    args = parser.parse_args()
    for window in args.windows:
        for loop in ("asyncio", "uvloop"):
            compare(args, window, loop)


if __name__ == "__main__":
    main()
