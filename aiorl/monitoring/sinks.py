"""Where figures go: the recorder takes a run's records on the loop and hands them to its sinks in a thread.

The sinks are ``metrics.jsonl``, which is the truth (jsonl.py), TensorBoard events, which are a view of it
(tensorboard.py), and whatever else follows the protocol.

| what waits           | for                                             | unblocked by                          |
|----------------------|-------------------------------------------------|---------------------------------------|
| `Recorder.record`    | a free place in the queue (`CAPACITY` records)  | the writer has dealt with a record    |
| `Recorder.flush`     | everything recorded before it being on disk     | the writer has synced its files       |
| leaving the recorder | the writer's end, `close_timeout_s` at most     | the writer has closed its files       |
| the writer thread    | an order                                        | `record`, `flush`, leaving            |

A sink that fails (a full disk) never stops a run: it is reported at once, and then once a minute. The lines of
``metrics.jsonl`` are kept and tried again with the next record, so that a disk that is full for a while leaves no gap.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, Self, TypeAlias

from aiorl.monitoring.jsonl import JsonlSink, trim_records
from aiorl.monitoring.metrics import EpochRecord
from aiorl.monitoring.tensorboard import TensorBoardSink
from aiorl.monitoring.threads import OwnedThread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import TracebackType

    from aiorl.monitoring.config import LoggerConfig

logger = logging.getLogger(__name__)

CAPACITY: Final = 64
_REPORT_INTERVAL_S: Final = 60.0


class Sink(Protocol):
    """A place that figures go to. Every method is called in the writer thread and may block and raise."""

    name: str

    def open(self, last: EpochRecord | None) -> None:
        """Get ready; `last` is the newest record of an earlier part of this run, None for a new run."""
        ...

    def write(self, record: EpochRecord) -> None:
        """Take one record."""
        ...

    def flush(self) -> None:
        """Bring everything that was written to where it survives the process."""
        ...

    def close(self) -> None:
        """Flush and let go; also called where `open` or `write` failed."""
        ...


@dataclass(frozen=True, slots=True)
class RecorderStatistics:
    """What a recorder has done.

    Attributes:
        num_records: Records that were handed over.
        num_queued: Of these, the ones that the writer has not yet dealt with.
        num_failures: How often each sink failed, by the sink's name.
    """

    num_records: int
    num_queued: int
    num_failures: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Flush:
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class _Close:
    pass


_Order: TypeAlias = EpochRecord | _Flush | _Close


class Recorder:
    """Hands the records of a run to its sinks, in one thread of its own. An async context manager.

    Entering opens ``metrics.jsonl`` and raises where that fails: a run that cannot tell what it does should not
    begin. The other sinks are opened behind it. Leaving waits until everything is on disk, at most `close_timeout_s`;
    a writer that hangs longer in the operating system is reported and abandoned. Cancellation while leaving is held
    back until then.

    Args:
        metrics_path: ``metrics.jsonl`` of the run.
        logs_path: The folder of TensorBoard events.
        config: ``[logger]``.
        resume_epoch: Epoch of the checkpoint that the run goes on from: lines beyond it are removed. None keeps every
            line.
        sinks: Further places for the records.
        close_timeout_s: How long leaving may take.
    """

    def __init__(
        self,
        metrics_path: Path,
        logs_path: Path,
        config: LoggerConfig,
        *,
        resume_epoch: int | None = None,
        sinks: Sequence[Sink] = (),
        close_timeout_s: float = 10.0,
    ) -> None:
        self._metrics_path = metrics_path
        self._resume_epoch = resume_epoch
        self._truth = JsonlSink(metrics_path)
        self._views: list[Sink] = [TensorBoardSink(logs_path)] if config.tensorboard else []
        self._views.extend(sinks)
        self._close_timeout_s = close_timeout_s
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._places = asyncio.Semaphore(CAPACITY)
        self._thread = OwnedThread(self._write, name="aiorl-recorder")
        self._opened: asyncio.Future[None] | None = None
        self._is_open = False
        self._num_records = 0
        self._num_done = 0
        self._failures: dict[str, _Failures] = {}

    async def __aenter__(self) -> Self:
        self._opened = asyncio.get_running_loop().create_future()
        self._thread.start()
        try:
            await self._opened
        except BaseException:  # a cancellation too ends the writer thread; raised again
            self._orders.put(_Close())
            await self._thread.join(self._close_timeout_s)
            raise
        self._is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        self._orders.put(_Close())
        if not await self._thread.join(self._close_timeout_s):
            statistics = self.statistics()
            logger.error(
                "the writer of %s did not end within %g s; %d records may be missing",
                self._metrics_path,
                self._close_timeout_s,
                statistics.num_queued,
            )

    async def record(self, record: EpochRecord) -> None:
        """Hand over a record; waits while `CAPACITY` records are queued.

        Cancelled while it waits, the record is not taken.

        Raises:
            RuntimeError: The recorder is not open.
        """
        self._check_open()
        await self._places.acquire()
        self._num_records += 1
        self._orders.put(record)

    async def flush(self) -> None:
        """Wait until everything that was recorded before is on disk, or its failure is reported.

        Raises:
            RuntimeError: The recorder is not open.
        """
        self._check_open()
        done = asyncio.get_running_loop().create_future()
        self._orders.put(_Flush(done))
        await done

    def statistics(self) -> RecorderStatistics:
        """Counts until now; works after closing too."""
        failures = {name: failures.count for name, failures in self._failures.items()}
        return RecorderStatistics(self._num_records, self._num_records - self._num_done, failures)

    def _check_open(self) -> None:
        if not self._is_open:
            raise RuntimeError("the recorder is not open")

    def _write(self) -> None:
        """The writer thread: consumes orders, ends with `_Close`."""
        opened = self._opened
        assert opened is not None, "started by __aenter__"
        try:
            last = trim_records(self._metrics_path, self._resume_epoch)
            self._truth.open(last)
        except OSError as error:
            self._thread.call(_failing(opened, error))
            return
        self._thread.call(_finishing(opened))
        views = [view for view in self._views if self._attempt(view, partial(view.open, last))]
        sinks = [self._truth, *views]
        while not isinstance(order := self._orders.get(), _Close):
            if isinstance(order, _Flush):
                for sink in sinks:
                    self._attempt(sink, sink.flush)
                self._thread.call(_finishing(order.done))
            else:
                for sink in sinks:
                    self._attempt(sink, partial(sink.write, order))
                self._num_done += 1
                self._thread.call(self._places.release)
        for sink in [self._truth, *self._views]:
            self._attempt(sink, sink.close, is_last=True)

    def _attempt(self, sink: Sink, action: Callable[[], None], *, is_last: bool = False) -> bool:
        try:
            action()
        except Exception:  # noqa: BLE001, whatever a sink raises, training goes on
            failures = self._failures.setdefault(sink.name, _Failures(sink.name, is_truth=sink is self._truth))
            failures.count_and_report(is_last=is_last)
            return False
        return True


class _Failures:
    """The failures of one sink: all are counted; the first and the last are reported, and one a minute between them."""

    def __init__(self, name: str, *, is_truth: bool) -> None:
        self.count = 0
        self._name = name
        self._level = logging.ERROR if is_truth else logging.WARNING
        self._consequence = "its lines are tried again" if is_truth else "training goes on without it"
        self._reported_at = -math.inf

    def count_and_report(self, *, is_last: bool) -> None:
        self.count += 1
        if not is_last and time.monotonic() - self._reported_at < _REPORT_INTERVAL_S:
            return
        self._reported_at = time.monotonic()
        consequence = "what it lacks is lost" if is_last else self._consequence
        logger.log(
            self._level, "%s cannot be written (failure %d); %s", self._name, self.count, consequence, exc_info=True
        )


def _finishing(future: asyncio.Future[None]) -> Callable[[], None]:
    return lambda: None if future.done() else future.set_result(None)


def _failing(future: asyncio.Future[None], error: BaseException) -> Callable[[], None]:
    return lambda: None if future.done() else future.set_exception(error)
