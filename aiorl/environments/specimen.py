"""One environment that is made only to be looked at, by a thread that nobody has to wait for."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from aiorl.environments.make import close_anyhow, close_environment

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

T = TypeVar("T")


def look_at_one(make: Callable[[], Any], look: Callable[[Any], T], *, name: str, env_cleanup_time: float) -> T:
    """Makes an environment, looks at it and closes it, all in one daemon thread. Blocks.

    Waits for the constructor as long as it takes, unless the wait is interrupted, as by Ctrl-C in the main thread: then
    the environment is closed once it is made, with nobody waiting. A ``close`` that takes longer than
    ``env_cleanup_time`` seconds is left to itself with a warning.

    Args:
        make: Returns the environment.
        look: Returns what is to be known of it.
        name: For messages.
        env_cleanup_time: Seconds.

    Returns:
        What ``look`` returned. Whatever ``make`` or ``look`` raises comes through unchanged.
    """
    seen: Future[T] = Future()

    def run() -> None:
        try:
            environment = make()
        except BaseException as error:  # noqa: BLE001 - raised to the caller
            seen.set_exception(error)
            return
        try:
            seen.set_result(look(environment))
        except BaseException as error:  # noqa: BLE001 - raised to the caller
            seen.set_exception(error)
        close_anyhow(partial(close_environment, environment), name)

    thread = threading.Thread(target=run, name="aiorl specimen", daemon=True)
    thread.start()
    seen.exception()  # waits
    thread.join(env_cleanup_time)
    if thread.is_alive():
        logger.warning("%s was still closing after %g s and is left to itself", name, env_cleanup_time)
    return seen.result()
