"""Everything that aiorl raises on purpose, in one tree.

AiorlError
├── ConfigError            one or more faults in the configuration, found before anything starts (exit status 2)
├── UnsupportedSpace       an observation or action space that no model here can take
├── WorkerError
│   ├── WorkerDied         a worker's process ended although nobody asked it to
│   ├── EnvironmentRaised  an environment raised in its constructor, reset or step
│   └── GroupLost          a group's worker is gone; its step will never be answered
├── LinkError
│   ├── LinkClosed         the link was closed while something waited on it
│   ├── ProtocolMismatch   the two ends speak different versions, or describe different environments
│   └── MalformedMessage   a message that breaks the wire format or its limits
├── BatcherError
│   ├── BatcherClosed      submitted after closing, or refused by a close that does not drain
│   └── MalformedRows      rows whose shape or dtype is not that of the first request
├── ChannelClosed          a put or get on a closed channel
├── EpisodesTooShort       no episode reaches min_trajectory_length, so that no epoch would ever end
├── NonFiniteError         too many steps in a row had a non-finite loss or gradient
│   └── NaNError           a parameter itself is not finite
├── CheckpointError
│   ├── CheckpointMissing  nothing to load where something was asked for
│   └── CheckpointCorrupt  a file whose hash or content is not what was written
└── RunFolderError
    ├── RunFolderBusy      another live trainer owns the folder
    └── RunMismatch        the folder's run has another configuration
"""

from __future__ import annotations

from asyncio import CancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class AiorlError(Exception):
    """The root of every error that aiorl raises on purpose."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a configuration.

    Attributes:
        path: TOML path of the field, for example ``trainer.sampling.min_batch_size``.
        message: What is wrong, without the value.
        value: The offending value as it would stand in TOML, or None where there is none.
        remedy: What to do about it.
        source: The file, ``--set`` or the call that the value came from; empty where unknown.
    """

    path: str
    message: str
    value: str | None = None
    remedy: str = ""
    source: str = ""

    def __str__(self) -> str:
        """The fault on one line: where, path, value, what, remedy."""
        where = f"{self.source}: " if self.source else ""
        value = f" = {self.value}" if self.value is not None else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{where}{self.path}{value}: {self.message}{remedy}"


class ConfigError(AiorlError):
    """One or more faults in a configuration, reported together.

    Attributes:
        faults: Every fault found, in the order of the configuration.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        lines = "\n".join(f"  {fault}" for fault in self.faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"the configuration has {count}:\n{lines}")


class UnsupportedSpace(AiorlError):
    """An observation or action space that cannot be used."""


class WorkerError(AiorlError):
    """Something happened to a worker; ``worker`` is its number."""

    def __init__(self, message: str, *, worker: int) -> None:
        self.worker = worker
        super().__init__(message)


class WorkerDied(WorkerError):
    """A worker's process ended although nobody asked it to.

    Attributes:
        returncode: As in ``subprocess``: negative for a signal.
        stderr_tail: The last lines that it wrote to its standard error.
    """

    def __init__(self, *, worker: int, returncode: int, how: str, stderr_tail: str = "") -> None:
        self.returncode = returncode
        self.stderr_tail = stderr_tail
        tail = f"\n--- the end of its standard error ---\n{stderr_tail.rstrip()}" if stderr_tail.strip() else ""
        super().__init__(f"worker {worker} died: {how}{tail}", worker=worker)


class EnvironmentRaised(WorkerError):
    """An environment raised.

    Attributes:
        where: ``"constructor"``, ``"reset"``, ``"step"`` or ``"close"``.
        cause: The exception's own line, for example ``ValueError: bad action``.
        traceback_text: The worker's own traceback.
        stderr_tail: The last lines that the worker wrote to its standard error.
    """

    def __init__(self, *, worker: int, where: str, cause: str, traceback_text: str, stderr_tail: str = "") -> None:
        self.where = where
        self.cause = cause
        self.traceback_text = traceback_text
        self.stderr_tail = stderr_tail
        text = f"the environment of worker {worker} raised in {where}: {cause}"
        if traceback_text.strip():
            text += f"\n--- the worker's traceback ---\n{traceback_text.rstrip()}"
        if stderr_tail.strip():
            text += f"\n--- the end of its standard error ---\n{stderr_tail.rstrip()}"
        super().__init__(text, worker=worker)


class GroupLost(WorkerError):
    """A group's worker is gone; what it was asked will never be answered."""


class LinkError(AiorlError):
    """Something is wrong on the link between trainer and workers."""


class LinkClosed(LinkError):
    """The link was closed while something waited on it."""


class ProtocolMismatch(LinkError):
    """The two ends of the link do not fit each other."""


class MalformedMessage(LinkError):
    """A message breaks the wire format or its limits."""


class BatcherError(AiorlError):
    """Something is wrong with a request to a micro-batcher."""


class BatcherClosed(BatcherError):
    """The batcher is closed, or closing without draining."""


class MalformedRows(BatcherError):
    """A request's rows have another shape or dtype than the first request's."""


class ChannelClosed(AiorlError):
    """The channel is closed and, for a reader, empty."""


class EpisodesTooShort(AiorlError):
    """No episode reaches ``min_trajectory_length``."""


class NonFiniteError(AiorlError):
    """More than ``max_consecutive_skips`` steps in a row had a non-finite loss or gradient."""


class NaNError(NonFiniteError):
    """A parameter is not finite.

    Attributes:
        names: The offending parameters, five at most.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__(f"parameters are not finite: {', '.join(self.names)}")


class CheckpointError(AiorlError):
    """A checkpoint cannot be written or read."""


class CheckpointMissing(CheckpointError):
    """There is no checkpoint where one was asked for."""


class CheckpointCorrupt(CheckpointError):
    """A checkpoint's files are not what was written."""


class RunFolderError(AiorlError):
    """A run's folder cannot be used.

    Attributes:
        folder: The folder.
    """

    def __init__(self, message: str, *, folder: Path) -> None:
        self.folder = folder
        super().__init__(message)


class RunFolderBusy(RunFolderError):
    """Another live trainer owns the folder."""


class RunMismatch(RunFolderError):
    """The folder's run was made with another configuration."""


def first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What a user should see of a group of failures: a worker's own failure before what follows from it, else the first."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending = [*error.exceptions, *pending]
        else:
            leaves.append(error)
    ranks: list[type[BaseException]] = [EnvironmentRaised, WorkerDied]
    for kind in ranks:
        for error in leaves:
            if isinstance(error, kind):
                return error
    own = [error for error in leaves if not isinstance(error, GroupLost | LinkError | CancelledError)]
    return (own or leaves)[0]
