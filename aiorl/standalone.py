"""A run to its end, with a loop and signals of its own.

| signal               | what follows                                                                              |
|----------------------|-------------------------------------------------------------------------------------------|
| SIGUSR1              | a checkpoint at the next epoch end                                                        |
| SIGTERM, first SIGINT| the open epoch is finished, within ``drain_timeout``; a checkpoint; the end               |
| second SIGINT        | the end, at once                                                                          |

Before the run is open there is nothing to drain: the first SIGINT or SIGTERM is the end. User code in a thread (a constructor that
takes long, say) cannot be cancelled, and embedded runs wait for it, as their host goes on. Here the process itself is to end: it
is left by `os._exit`, which runs no ``finally`` and no atexit handler, while the kernel ends the workers and frees the folder's lock,

- a second after the first signal to end at once, five where a run was open (it closes, and writes ``summary.json``), if
  a thread still holds it up then;
- at the next SIGINT, at once where a thread holds it up, else within a second;
- at a SIGINT a second after a signal that the loop did not hear, since user code holds the loop itself up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aiorl.compute.threads import held_up, leave
from aiorl.errors import ConfigError, Fault
from aiorl.monitoring.folder import RunFolder, log_to
from aiorl.runs import import_torch, open_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType

    from aiorl.config import Config
    from aiorl.preparation import Resume
    from aiorl.runs import Run
    from aiorl.session import Outcome
    from aiorl.tasks.base import Callback

logger = logging.getLogger(__name__)

PATIENCE_S = 1.0  # for what was told to end at once
PATIENCE_WITH_RUN_S = 5.0  # the same, for a run that has a folder to leave in order
ONE_INTERRUPT_S = 0.05  # `timeout -s INT` and the like signal a process and then its group: that is one interrupt


@dataclass(frozen=True, slots=True)
class RunResult:
    """What `run` returns.

    Attributes:
        folder: The run's folder.
        outcome: How it ended; None where a signal ended it at once.
        signal: The signal that stopped it; None where none did.
    """

    folder: Path
    outcome: Outcome | None
    signal: signal.Signals | None


def run(
    config: Config,
    *,
    resume: Resume = "auto",
    callbacks: Iterable[Callback] = (),
    opened: Callable[[Run], Any] | None = None,
    beside: Callable[[Run], Any] | None = None,
    leaving: Callable[[], Any] | None = None,
) -> RunResult:
    """Runs to the end, with a loop and signal handlers of its own. Blocks; to be called in the main thread.

    SIGUSR1 asks for a checkpoint at the next epoch end. SIGTERM and the first SIGINT finish the open epoch, within
    ``drain_timeout``, checkpoint and end; a second SIGINT ends at once. Where user code in a thread does not come back
    after that, the process is left with 128 + signal, by ``os._exit``.

    Args:
        config: What `load_config` returned.
        resume: As for `open_run`.
        callbacks: Told about the run, after the task.
        opened: Called on the loop with the run, before its first step.
        beside: ``async (run) -> None``, runs beside the training; its end stops the run.
        leaving: Called before the process is left so, for what would otherwise be cleaned up when this returns.

    Raises:
        AiorlError: Why the run failed, first cause first.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is a run to checkpoint
    import_torch()  # before the loop starts: it would stall it
    with asyncio.Runner(loop_factory=loop_factory(config.trainer.loop)) as runner:
        return runner.run(_run(config, resume, tuple(callbacks), opened, beside, leaving))


def loop_factory(name: Literal["auto", "asyncio", "uvloop"]) -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes the loop that ``trainer.loop`` names.

    Raises:
        ConfigError: It is not installed.
    """
    if name != "asyncio":
        try:
            import uvloop
        except ImportError as error:
            if name == "uvloop":
                remedy = 'install uvloop, or set it to "auto"'
                raise ConfigError([Fault("trainer.loop", "uvloop is not installed", '"uvloop"', remedy)]) from error
        else:
            return uvloop.new_event_loop
    return asyncio.new_event_loop


def hear_while_blocked(unheard: list[float], leave_now: Callable[[signal.Signals], Any]) -> None:
    """Has a further SIGINT answered also where user code holds the loop up, so that the loop's own handlers are not called.

    To be called after these were added: what it adds runs in the main thread between two instructions of whatever runs there.

    Args:
        unheard: When signals came; whoever hears them on the loop clears it.
        leave_now: Called with a SIGINT that comes a second or more after the first signal that was not heard.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        unheard.append(time.monotonic())
        if number == signal.SIGINT and unheard[-1] - unheard[0] >= PATIENCE_S:
            leave_now(signal.Signals(number))

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)


async def _run(
    config: Config,
    resume: Resume,
    callbacks: tuple[Callback, ...],
    opened: Callable[[Run], Any] | None,
    beside: Callable[[Run], Any] | None,
    leaving: Callable[[], Any] | None,
) -> RunResult:
    loop = asyncio.get_running_loop()
    main = asyncio.current_task()
    assert main is not None
    outcome: Outcome | None
    runs: list[Run] = []
    received: list[signal.Signals] = []
    received_at: list[float] = []
    unheard: list[float] = []
    companions: list[asyncio.Task[None]] = []

    def leave_now(*, patient: bool) -> None:
        if patient and not held_up():
            return
        try:
            if leaving is not None:
                leaving()
        finally:
            leave(128 + received[0])

    def leave_blocked(number: signal.Signals) -> None:
        received.append(number)
        leave_now(patient=False)

    def on_signal(number: signal.Signals) -> None:
        unheard.clear()
        first = not received
        if not first and loop.time() - received_at[0] < ONE_INTERRUPT_S:
            return
        received.append(number)
        received_at[:] = [loop.time()]
        if runs and first:
            logger.info("%s: finishing the open epoch, then a checkpoint", number.name)
            runs[0].stop(f"stopped by {number.name}")
            for companion in companions:
                companion.cancel()
        elif not runs or number is signal.SIGINT:
            for run in runs:
                run.hurry()
            if main.cancelling():
                if held_up():
                    leave_now(patient=False)
                loop.call_later(PATIENCE_S, partial(leave_now, patient=False))
            else:
                main.cancel()
                loop.call_later(PATIENCE_WITH_RUN_S if runs else PATIENCE_S, partial(leave_now, patient=True))

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    hear_while_blocked(unheard, leave_blocked)
    loop.add_signal_handler(signal.SIGUSR1, lambda: runs[0].request_checkpoint() if runs else None)
    try:
        async with contextlib.AsyncExitStack() as stack:
            run = await stack.enter_async_context(open_run(config, callbacks=callbacks, resume=resume))
            runs.append(run)
            stack.enter_context(log_to(RunFolder(run.folder, config.trainer.log_dir_name)))
            if opened is not None:
                opened(run)
            if beside is not None:
                async with asyncio.TaskGroup() as tasks:
                    companions.append(tasks.create_task(beside(run), name="beside the run"))
                run.stop("its console was left")
            outcome = await run.wait()
    except asyncio.CancelledError:
        if not received:
            raise
        main.uncancel()
        outcome = runs[0].outcome if runs else None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            loop.remove_signal_handler(number)
    return RunResult(runs[0].folder if runs else Path(), outcome, received[0] if received else None)
