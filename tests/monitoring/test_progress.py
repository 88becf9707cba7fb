from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import time
from typing import TYPE_CHECKING, TextIO

import pytest

from aiorl.monitoring.config import LoggerConfig
from aiorl.monitoring.metrics import EpochRecord
from aiorl.monitoring.progress import Goals, Outlook, ProgressDisplay, plain_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Screen

OFTEN = LoggerConfig(interval_s=1e-9)
RARELY = LoggerConfig(interval_s=1e9)


def record(epoch: int, **metrics: float) -> EpochRecord:
    return EpochRecord.make(
        epoch=epoch,
        num_samples=epoch * 2048,
        time_s=epoch * 2.0,
        metrics={name.replace("__", "/"): value for name, value in metrics.items()},
    )


@pytest.fixture
def terminal(screen: Screen) -> Iterator[TextIO]:
    with contextlib.suppress(OSError), os.fdopen(os.dup(screen.near), "w") as file:  # where it hung up
        yield file


def test_off_a_terminal_there_are_plain_lines_and_the_last_epoch_is_always_told() -> None:
    out = io.StringIO()
    with ProgressDisplay(RARELY, name="cartpole", goals=Goals(), file=out) as display:
        for epoch in range(1, 6):
            display.update(record(epoch, episode__return_mean=21.333, sampling__samples_per_s=15000.4))
        assert out.getvalue().count("\n") == 1
    assert out.getvalue().splitlines() == [
        "epoch=1 samples=2048 samples_per_s=15000 return_mean=21.33 time_s=2.0",
        "epoch=5 samples=10240 samples_per_s=15000 return_mean=21.33 time_s=10.0",
    ]


def test_every_epoch_where_the_interval_allows_it_and_none_twice() -> None:
    out = io.StringIO()
    with ProgressDisplay(OFTEN, name="cartpole", goals=Goals(), file=out) as display:
        for epoch in range(1, 4):
            display.update(record(epoch))
    assert [line.split()[0] for line in out.getvalue().splitlines()] == ["epoch=1", "epoch=2", "epoch=3"]


def test_switched_off_it_is_silent(screen: Screen, terminal: TextIO) -> None:
    silent = LoggerConfig(terminal=False)
    for file in (io.StringIO(), terminal):
        with ProgressDisplay(silent, name="cartpole", goals=Goals(), file=file) as display:
            display.update(record(1))
    assert screen.lines() == [""]


def test_without_an_epoch_nothing_is_told() -> None:
    out = io.StringIO()
    with ProgressDisplay(OFTEN, name="cartpole", goals=Goals(), file=out):
        pass
    assert out.getvalue() == ""


def test_a_plain_line_with_everything() -> None:
    outlook = Outlook(Goals(max_samples=20480))
    line = ""
    for epoch in (1, 2):
        made = record(
            epoch,
            sampling__samples_per_s=1024.0,
            episode__return_mean=-0.5,
            episode__num_episodes=12,
            sampling__lag_mean=0.25,
            sampling__batch_size_mean=15.75,
        )
        outlook.add(made)
        line = plain_line(made, outlook)
    assert line == (
        "epoch=2 samples=4096 samples_per_s=1024 return_mean=-0.50 episodes=12 lag_mean=0.25 batch_size_mean=15.8 "
        "time_s=4.0 eta_s=16"
    )


def test_the_live_display(screen: Screen, terminal: TextIO) -> None:
    with ProgressDisplay(OFTEN, name="cart[pole]", goals=Goals(max_samples=40960), file=terminal) as display:
        display.update(record(1, episode__return_mean=20.0))
        assert screen.lines()[1].startswith("return 20.0  best -  length -  episodes -  epoch 1")
        display.update(record(5, episode__return_mean=99.0))
    top, good, fast, after = screen.lines()
    assert re.fullmatch(r"cart\[pole\] [━╸╺ ]{30}  25% eta 0:00:30", top)
    assert good.startswith("return 99.0 ")
    assert fast == "samples 10,240  per second -  batch -  lag -  time 0:00:10"
    assert after == ""
    assert not screen.sent.endswith("\x1b[?25l")
    assert screen.sent.rfind("\x1b[?25h") > screen.sent.rfind("\x1b[?25l")


def test_a_run_without_an_end_has_no_bar(screen: Screen, terminal: TextIO) -> None:
    with ProgressDisplay(OFTEN, name="endless", goals=Goals(), file=terminal) as display:
        display.update(record(1))
        display.update(record(2))
    assert screen.lines()[0] == "endless"


def test_at_most_four_refreshes_in_a_second(screen: Screen, terminal: TextIO) -> None:
    with ProgressDisplay(OFTEN, name="cartpole", goals=Goals(), file=terminal) as display:
        began = time.monotonic()
        for epoch in range(1, 51):
            display.update(record(epoch))
        if time.monotonic() - began < 0.25:
            assert screen.lines()[1].endswith("epoch 1")
    assert screen.lines()[1].endswith("epoch 50")


def test_log_lines_stay_whole_above_the_live_display(screen: Screen, terminal: TextIO) -> None:
    logger = logging.getLogger("aiorl")
    handler = logging.StreamHandler(terminal)
    logger.addHandler(handler)
    try:
        with ProgressDisplay(OFTEN, name="cartpole", goals=Goals(), file=terminal) as display:
            for epoch in range(1, 4):
                display.update(record(epoch))
                logging.getLogger("aiorl.trainer").warning("line %d", epoch)
            assert screen.lines()[:4] == ["line 1", "line 2", "line 3", "cartpole"]
        assert handler.stream is terminal
        logger.warning("after")
    finally:
        logger.removeHandler(handler)
    lines = screen.lines()
    assert [line.split()[0] for line in lines if line] == [
        "line", "line", "line", "cartpole", "return", "samples", "after"
    ]  # fmt: skip


def test_handlers_that_write_elsewhere_are_left_alone(screen: Screen, terminal: TextIO) -> None:
    logger, elsewhere = logging.getLogger("aiorl"), io.StringIO()
    handler = logging.StreamHandler(elsewhere)
    logger.addHandler(handler)
    try:
        with ProgressDisplay(OFTEN, name="cartpole", goals=Goals(), file=terminal):
            assert handler.stream is elsewhere
    finally:
        logger.removeHandler(handler)


def test_a_terminal_without_a_cursor_gets_plain_lines(
    screen: Screen, terminal: TextIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with ProgressDisplay(OFTEN, name="cartpole", goals=Goals(), file=terminal) as display:
        display.update(record(1))
    assert screen.lines() == ["epoch=1 samples=2048 time_s=2.0", ""]
    assert "\x1b" not in screen.sent


def test_a_terminal_that_hangs_up_ends_the_display_and_not_the_run(screen: Screen, terminal: TextIO) -> None:
    with ProgressDisplay(OFTEN, name="cartpole", goals=Goals(), file=terminal) as display:
        display.update(record(1))
        screen.hang_up()
        display.update(record(2))


def test_a_reader_that_is_slow_or_gone_never_holds_the_run_up() -> None:
    reading, writing = os.pipe()
    with (
        contextlib.suppress(BrokenPipeError),  # the file still holds what nobody took
        os.fdopen(writing, "w") as file,
        ProgressDisplay(OFTEN, name="cartpole", goals=Goals(), file=file) as display,
    ):
        for epoch in range(1, 3000):  # 130 KB into a pipe of 64
            display.update(record(epoch))
        told = os.read(reading, 2**20).decode()
        assert told.startswith("epoch=1 ")
        assert told.endswith("\n")
        display.update(record(3000))
        assert os.read(reading, 2**20).decode().startswith("epoch=3000 ")
        os.close(reading)
        for epoch in range(3001, 3004):
            display.update(record(epoch))


def test_the_outlook_by_hand() -> None:
    outlook = Outlook(Goals(max_samples=20480, max_seconds=100.0, max_epochs=50))
    assert outlook.share_done == 0.0
    assert outlook.remaining_s is None
    outlook.add(record(1))
    assert outlook.share_done == 0.1
    assert outlook.remaining_s is None
    outlook.add(record(2))
    assert outlook.share_done == 0.2
    assert outlook.remaining_s == 16.0  # 8 epochs of 2048 samples, 2 s each; 96 s and 48 epochs are further away
    for epoch in range(3, 12):
        outlook.add(record(epoch))
    assert outlook.share_done == 1.0
    assert outlook.remaining_s == 0.0


def test_the_outlook_goes_by_the_pace_of_the_last_epochs() -> None:
    outlook = Outlook(Goals(max_steps=1000))
    for epoch in range(1, 101):
        time_s = float(epoch if epoch <= 50 else 50 + (epoch - 50) * 4)
        metrics = {"learner/num_steps": epoch * 8}
        outlook.add(EpochRecord.make(epoch=epoch, num_samples=epoch, time_s=time_s, metrics=metrics))
    assert outlook.share_done == 0.8
    assert outlook.remaining_s == 25 * 4.0


def test_a_run_without_goals_has_no_outlook() -> None:
    outlook = Outlook(Goals())
    outlook.add(record(1))
    outlook.add(record(2))
    assert outlook.share_done is None
    assert outlook.remaining_s is None
