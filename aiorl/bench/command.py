"""A bench with a loop and signals of its own.

The first SIGINT or SIGTERM closes what is open and ends it; a second one ends the process at once, and with it all that it
started, and so does user code in a thread that does not come back within ``env_cleanup_time`` and five seconds.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import TYPE_CHECKING

from aiorl.bench.measuring import bench
from aiorl.compute.threads import held_up, leave
from aiorl.standalone import ONE_INTERRUPT_S, PATIENCE_WITH_RUN_S, hear_while_blocked, loop_factory

if TYPE_CHECKING:
    from aiorl.bench.figures import Findings
    from aiorl.config import Config


def run_bench(config: Config, *, seconds: float) -> Findings | signal.Signals:
    """Measures, in the main thread. Blocks.

    Args:
        config: What `load_config` returned.
        seconds: Of measuring.

    Returns:
        What was found, or the signal that ended it.

    Raises:
        AiorlError: As `aiorl.bench.measuring.bench`.
    """
    learning = logging.getLogger("aiorl.learning")
    if not logging.getLogger("aiorl").isEnabledFor(logging.DEBUG):
        learning.setLevel(logging.WARNING)  # it tells of the checkpoint of a run that is thrown away
    with asyncio.Runner(loop_factory=loop_factory(config.trainer.loop)) as runner:
        return runner.run(_until_signal(config, seconds))


async def _until_signal(config: Config, seconds: float) -> Findings | signal.Signals:
    loop = asyncio.get_running_loop()
    main = asyncio.current_task()
    assert main is not None
    received: list[signal.Signals] = []
    received_at: list[float] = []
    unheard: list[float] = []

    def leave_if_held_up() -> None:
        if held_up():
            leave(128 + received[0])

    def on_signal(number: signal.Signals) -> None:
        unheard.clear()
        if received and loop.time() - received_at[0] < ONE_INTERRUPT_S:
            return
        if received:
            leave(128 + received[0])
        received.append(number)
        received_at.append(loop.time())
        main.cancel()
        loop.call_later(PATIENCE_WITH_RUN_S + config.task.environment.env_cleanup_time, leave_if_held_up)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    hear_while_blocked(unheard, lambda number: leave(128 + number))
    try:
        return await bench(config, seconds=seconds)
    except asyncio.CancelledError:
        if not received:
            raise
        main.uncancel()
        return received[0]
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
