"""Lateness of a loop that is held up on purpose."""

from __future__ import annotations

import asyncio
import time

import pytest

from aiorl.monitoring.loop_lag import PERIOD_S, LoopLag

pytestmark = pytest.mark.anyio


class Announced(LoopLag):
    """Sets an event when its callback was due."""

    def __init__(self) -> None:
        super().__init__()
        self.due = asyncio.Event()

    def _count(self, now: float) -> None:
        super()._count(now)
        self.due.set()


async def test_a_hold_up_counts_with_all_that_it_held_up() -> None:
    """50 ms hold up 25 callbacks, of which the first is late by nearly all of that, and half of them by 25 ms or more."""
    lag = Announced()
    with lag:
        await lag.due.wait()
        before = lag.statistics().num_due
        time.sleep(0.05)  # noqa: ASYNC251 - the loop is to stand still
        await asyncio.sleep(0)
    found = lag.statistics()
    assert found.max >= 0.05 - 2 * PERIOD_S
    assert found.num_due - before >= 0.05 / PERIOD_S - 1
    assert found.p99 > 0.04


async def test_time_between_two_measurements_does_not_count() -> None:
    lag = Announced()
    with lag:
        await lag.due.wait()
    before = lag.statistics()
    time.sleep(0.05)  # noqa: ASYNC251 - nobody measures meanwhile
    with lag:
        await asyncio.sleep(0)
    assert lag.statistics().num_due == before.num_due
    lag.stop()


async def test_nothing_was_due_before_it_was_started() -> None:
    assert LoopLag().statistics().num_due == 0
