"""What a message costs the loop's thread, against ``zmq.asyncio`` in the same run; the rates are in docs/benchmarks.md."""

from __future__ import annotations

from argparse import Namespace

import pytest

from benchmarks.link import measure_link, measure_zmq_asyncio, run

ATTEMPTS = 3  # the machine may be busy with other things


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_message_costs_half_of_what_it_costs_in_zmq_asyncio(loop: str) -> None:
    args = Namespace(peers=2, bytes=512, seconds=0.3)
    shares = []
    for _ in range(ATTEMPTS):
        ours, theirs = run(measure_link(args, 16), loop), run(measure_zmq_asyncio(args, 16), loop)
        shares.append(ours.thread_us / theirs.thread_us)
        if shares[-1] < 0.5:
            return
    raise AssertionError(f"shares of zmq.asyncio's processor time: {shares}")
