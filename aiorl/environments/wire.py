"""The messages between trainer and worker, declared once, and their form on the wire.

==================  ========  =====================================================================================
message             from      meaning
==================  ========  =====================================================================================
``Hello``           worker    first of all: who it is, and the secret that shows it
``Setup``           trainer   what to build; answers ``Hello``
``Ready``           worker    built, and what the environments look like; answers ``Setup``
``Reset, Step``     trainer   one group, under that group's next sequence number
``Observed``        worker    answers ``Reset`` or ``Step`` under its sequence number
``Failed``          worker    an environment or the worker raised; it does no more, and waits for ``Stop``
``Stop``            trainer   close the environments and end
==================  ========  =====================================================================================

A message is a header (a msgpack array: kind, then the fields in their order) and, for each array above
``INLINE_BYTES``, a frame of its raw little-endian bytes. Smaller arrays ride in the header, since each frame costs
either end 1.5 µs. Observations that lie in a slab (see ``slab``) are in no message.
Dimensions: K environments of a group, E of them whose episode ended.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, get_type_hints

import msgpack
import numpy as np
from numpy.typing import NDArray  # noqa: TC002 - get_type_hints reads it

from aiorl.environments.fields import MAX_HEADER_BYTES, Array, Bytes, Field, Info, Many, Maybe, Spec, Text, Uint
from aiorl.environments.make import Tick
from aiorl.environments.spaces import EnvironmentInfo, EnvironmentSpec  # noqa: TC001 - get_type_hints reads them
from aiorl.errors import MalformedMessage

if TYPE_CHECKING:
    from collections.abc import Sequence

PROTOCOL_VERSION: Final = 2
"""Raised with every change of a message; the two ends have to agree. ``Hello`` itself never changes."""

TOKEN_BYTES: Final = 16
MAX_GROUPS: Final = 1024
MAX_GROUP_ENVS: Final = 2**20

RUNNING, TERMINATED, TRUNCATED = 0, 1, 2
"""The outcomes of a step for one environment."""

_OUTCOMES: Final = bytes((RUNNING, TERMINATED, TRUNCATED))

Uint32: TypeAlias = Annotated[int, Uint(2**32 - 1)]
Uint63: TypeAlias = Annotated[int, Uint(2**63 - 1)]
GroupIndex: TypeAlias = Annotated[int, Uint(MAX_GROUPS - 1)]


@dataclass(frozen=True, slots=True)
class Hello:
    """A worker's first message.

    Attributes:
        incarnation: Counts the processes that have been this worker; on every message, so that none outlives its own.
        protocol: The worker's ``PROTOCOL_VERSION``.
        worker: Its number.
        token: The secret that the trainer gave to this incarnation of this worker alone.
    """

    incarnation: Uint32
    protocol: Uint32
    worker: Uint32
    token: Annotated[bytes, Bytes(TOKEN_BYTES, TOKEN_BYTES)]


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker is to build.

    Attributes:
        incarnation: Of the worker.
        spec: Of every environment.
        group_sizes: K of each group.
        seeds: One for each environment, group after group; used by the first reset of each group.
        first_env: Global index of the first environment.
    """

    incarnation: Uint32
    spec: Annotated[EnvironmentSpec, Spec()]
    group_sizes: Annotated[tuple[int, ...], Many(Uint(MAX_GROUP_ENVS), MAX_GROUPS)]
    seeds: Annotated[tuple[int, ...], Many(Uint(2**63 - 1), MAX_GROUP_ENVS)]
    first_env: Uint63

    def check(self) -> None:
        """Raises ``MalformedMessage`` where the fields contradict each other."""
        if not self.group_sizes or 0 in self.group_sizes or sum(self.group_sizes) != len(self.seeds):
            raise MalformedMessage(f"{len(self.seeds)} seeds for groups of {self.group_sizes!s:.80} environments")


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has built its groups.

    Attributes:
        incarnation: Of the worker.
        info: What its environments look like.
        pid: Its process.
    """

    incarnation: Uint32
    info: Annotated[EnvironmentInfo, Info()]
    pid: Uint63


@dataclass(frozen=True, slots=True)
class Reset:
    """Start an episode in every environment of a group."""

    incarnation: Uint32
    group: GroupIndex
    sequence: Uint63


@dataclass(frozen=True, slots=True)
class Step:
    """Step every environment of a group; ``actions`` is int64 ``[K]``."""

    incarnation: Uint32
    group: GroupIndex
    sequence: Uint63
    actions: Annotated[NDArray[np.int64], Array(("int64",), ndim=1)]


@dataclass(frozen=True, slots=True)
class Observed:
    """What a reset or step brought, as ``Tick`` has it, in as few parts as can be.

    Attributes:
        incarnation: Of the worker.
        group: Within the worker.
        sequence: Of the ``Reset`` or ``Step`` that this answers.
        outcomes: K bytes of ``RUNNING``, ``TERMINATED`` and ``TRUNCATED``, so that never two flags are set.
        rewards: float32 ``[K]``; zeros after a reset.
        observations: ``[K + E, *shape]``: after the K observations, the final ones of the E that are not running; None
            where they lie in the worker's slab.
    """

    incarnation: Uint32
    group: GroupIndex
    sequence: Uint63
    outcomes: Annotated[bytes, Bytes(0, MAX_GROUP_ENVS)]
    rewards: Annotated[NDArray[np.float32], Array(("float32",), ndim=1)]
    observations: Annotated[NDArray[Any] | None, Maybe(Array())]

    def check(self) -> None:
        """Raises ``MalformedMessage`` where the fields contradict each other."""
        num_envs = len(self.outcomes)
        if self.outcomes.strip(_OUTCOMES):
            raise MalformedMessage(f"outcomes {self.outcomes!r:.80}")
        if len(self.rewards) != num_envs:
            raise MalformedMessage(f"{len(self.rewards)} rewards for {num_envs} environments")
        if self.observations is not None and self.observations.shape[:1] != (num_envs + self.num_ended,):
            raise MalformedMessage(
                f"observations of shape {self.observations.shape} for {num_envs} environments of which "
                f"{self.num_ended} ended"
            )

    @property
    def num_ended(self) -> int:
        """E."""
        return len(self.outcomes) - self.outcomes.count(RUNNING)


@dataclass(frozen=True, slots=True)
class Failed:
    """Something raised in a worker.

    Attributes:
        incarnation: Of the worker.
        where: ``"constructor"``, ``"reset"`` or ``"step"`` of an environment; ``"link"`` where a message made no sense.
        cause: The exception's own line.
        traceback: The worker's.
    """

    incarnation: Uint32
    where: Annotated[str, Text(16)]
    cause: Annotated[str, Text(4096)]
    traceback: Annotated[str, Text()]


@dataclass(frozen=True, slots=True)
class Stop:
    """Close the environments and end."""

    incarnation: Uint32


Message: TypeAlias = Hello | Setup | Ready | Reset | Step | Observed | Failed | Stop
_KINDS: Final[tuple[type[Message], ...]] = (Hello, Setup, Ready, Reset, Step, Observed, Failed, Stop)


def _layout(kind: type[Message]) -> tuple[tuple[str, Field], ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple((field.name, hints[field.name].__metadata__[0]) for field in fields(kind))


_LAYOUTS: Final = tuple(_layout(kind) for kind in _KINDS)
_NUMBERS: Final = {kind: number for number, kind in enumerate(_KINDS)}


def encode(message: Message) -> list[bytes]:
    """The frames of a message: a header, and the arrays that are too large for it.

    Raises:
        MalformedMessage: A field is beyond its limits, or of a kind that cannot be sent.
    """
    number = _NUMBERS[type(message)]
    frames = [b""]
    header: list[Any] = [number]
    for name, field in _LAYOUTS[number]:
        try:
            header.append(field.dump(getattr(message, name), frames))
        except MalformedMessage as error:
            raise MalformedMessage(f"{type(message).__name__}.{name}: {error}") from None
    frames[0] = msgpack.packb(header)
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise MalformedMessage(f"{type(message).__name__}: a header of {len(frames[0])} bytes")
    return frames


def decode(frames: Sequence[bytes]) -> Message:
    """The message that some frames are, every field of it checked.

    Raises:
        MalformedMessage: They are none, whatever they are.
    """
    if not frames or len(frames[0]) > MAX_HEADER_BYTES:
        raise MalformedMessage("no header, or one beyond its limit")
    try:
        header = msgpack.unpackb(frames[0])
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise MalformedMessage(f"the header is no msgpack: {error!s:.80}") from error
    if type(header) is not list or not header or type(header[0]) is not int or not 0 <= header[0] < len(_KINDS):
        raise MalformedMessage(f"{header!r:.80} is no header")
    kind, layout = _KINDS[header[0]], _LAYOUTS[header[0]]
    if len(header) != len(layout) + 1:
        raise MalformedMessage(f"{kind.__name__} of {len(header) - 1} fields instead of {len(layout)}")
    arrays = iter(frames)
    next(arrays)
    values = []
    for (name, field), raw in zip(layout, header[1:], strict=True):
        try:
            values.append(field.load(raw, arrays))
        except MalformedMessage as error:
            raise MalformedMessage(f"{kind.__name__}.{name}: {error}") from None
    if next(arrays, None) is not None:
        raise MalformedMessage(f"{kind.__name__} with frames that belong to no field")
    message = kind(*values)
    if isinstance(message, Setup | Observed):
        message.check()
    return message


def observed(incarnation: int, group: int, sequence: int, tick: Tick, *, in_slab: bool = False) -> Observed:
    """The message that carries a tick, or all of it but rows that lie in a slab; termination wins over truncation."""
    outcomes = tick.terminated * np.uint8(TERMINATED) + (tick.truncated & ~tick.terminated) * np.uint8(TRUNCATED)
    observations = None if in_slab else tick.observations
    if observations is not None and len(tick.final_observations):
        observations = np.concatenate((observations, tick.final_observations))
    return Observed(incarnation, group, sequence, outcomes.tobytes(), tick.rewards, observations)


def tick_of(message: Observed, observations: NDArray[Any], final_observations: NDArray[Any]) -> Tick:
    """The tick that a message tells of, with its ``[K, *shape]`` and ``[E, *shape]`` observations."""
    outcomes = np.frombuffer(message.outcomes, np.uint8)
    return Tick(
        observations=observations,
        rewards=message.rewards,
        terminated=outcomes == TERMINATED,
        truncated=outcomes == TRUNCATED,
        final_observations=final_observations,
    )
