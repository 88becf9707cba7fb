"""The kinds of field that messages are made of: how each is written, and everything that is checked when it is read.

``dump`` turns a value into something that msgpack takes, ``load`` turns it back, and raises ``MalformedMessage`` for
anything that ``dump`` would not have written. Arrays that are too large for the header are appended to, and taken from,
the frames that follow it.
"""
# ruff: noqa: D102 - Field says what dump and load do

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from aiorl.environments.spaces import ARRAY_DTYPES, ArraySpec, EnvironmentInfo, EnvironmentSpec
from aiorl.errors import MalformedMessage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

INLINE_BYTES: Final = 2048
"""Arrays up to this size travel inside the header."""

MAX_ARRAY_BYTES: Final = 2**28
"""Of one array; the sockets refuse larger frames too."""

MAX_HEADER_BYTES: Final = 2**20
MAX_DIMENSIONS: Final = 8
MAX_TEXT: Final = 2**16
MAX_DEPTH: Final = 16

_DTYPES: Final = {name: np.dtype(name).newbyteorder("<") for name in ARRAY_DTYPES}
_DTYPE_NAMES: Final = {np.dtype(name): name for name in ARRAY_DTYPES}  # a dtype's own `name` takes 3 µs


class Field(Protocol):
    """How one kind of value crosses the link."""

    def dump(self, value: Any, frames: list[bytes]) -> Any:
        """What msgpack is given; raises ``MalformedMessage`` for what cannot be sent."""

    def load(self, raw: Any, frames: Iterator[bytes]) -> Any:
        """The value; raises ``MalformedMessage`` for anything that ``dump`` does not write."""


@dataclass(frozen=True, slots=True)
class Uint:
    """An integer from 0 to ``maximum``."""

    maximum: int

    def dump(self, value: int, frames: list[bytes]) -> int:
        return self.load(value, iter(()))

    def load(self, raw: Any, frames: Iterator[bytes]) -> int:
        if type(raw) is not int or not 0 <= raw <= self.maximum:
            raise MalformedMessage(f"{raw!r:.80} is no integer from 0 to {self.maximum}")
        return raw


@dataclass(frozen=True, slots=True)
class Text:
    """A string of at most ``maximum`` characters; of a longer one the end is sent, where a traceback has its cause."""

    maximum: int = MAX_TEXT

    def dump(self, value: str, frames: list[bytes]) -> str:
        return value[-self.maximum :].encode("utf-8", "backslashreplace").decode("utf-8")[-self.maximum :]

    def load(self, raw: Any, frames: Iterator[bytes]) -> str:
        if type(raw) is not str or len(raw) > self.maximum:
            raise MalformedMessage(f"{raw!r:.80} is no string of at most {self.maximum} characters")
        return raw


@dataclass(frozen=True, slots=True)
class Bytes:
    """From ``minimum`` to ``maximum`` bytes."""

    minimum: int
    maximum: int

    def dump(self, value: bytes, frames: list[bytes]) -> bytes:
        return self.load(value, iter(()))

    def load(self, raw: Any, frames: Iterator[bytes]) -> bytes:
        if type(raw) is not bytes or not self.minimum <= len(raw) <= self.maximum:
            raise MalformedMessage(f"{raw!r:.80} is not {self.minimum} to {self.maximum} bytes")
        return raw


@dataclass(frozen=True, slots=True)
class Many:
    """A tuple of at most ``maximum`` values of one kind."""

    of: Field
    maximum: int

    def dump(self, value: tuple[Any, ...], frames: list[bytes]) -> list[Any]:
        if len(value) > self.maximum:
            raise MalformedMessage(f"{len(value)} values, where at most {self.maximum} can be sent")
        return [self.of.dump(item, frames) for item in value]

    def load(self, raw: Any, frames: Iterator[bytes]) -> tuple[Any, ...]:
        if type(raw) is not list or len(raw) > self.maximum:
            raise MalformedMessage(f"{raw!r:.80} is no list of at most {self.maximum} values")
        return tuple([self.of.load(item, frames) for item in raw])


@dataclass(frozen=True, slots=True)
class Array:
    """An array of one of ``dtypes`` and, unless None, of ``ndim`` dimensions. What is read is read-only."""

    dtypes: tuple[str, ...] = ARRAY_DTYPES
    ndim: int | None = None

    def dump(self, value: NDArray[Any], frames: list[bytes]) -> list[Any]:
        dtype = _DTYPE_NAMES.get(value.dtype) or value.dtype.name
        if value.nbytes > MAX_ARRAY_BYTES:
            raise MalformedMessage(f"an array of {value.nbytes} bytes, where at most {MAX_ARRAY_BYTES} can be sent")
        if dtype not in self.dtypes or not self._takes(value.ndim):
            raise MalformedMessage(f"an array of {value.ndim} dimensions of {dtype} cannot be sent here")
        data = value.astype(_DTYPES[dtype], copy=False).tobytes()
        if len(data) <= INLINE_BYTES:
            return [dtype, data, *value.shape]
        frames.append(data)
        return [dtype, None, *value.shape]

    def load(self, raw: Any, frames: Iterator[bytes]) -> NDArray[Any]:
        if type(raw) is not list or len(raw) < 2 or type(raw[0]) is not str or raw[0] not in self.dtypes:
            raise MalformedMessage(f"{raw!r:.80} is no array of {', '.join(self.dtypes)}")
        dtype, data, shape = _DTYPES[raw[0]], raw[1], raw[2:]
        if not self._takes(len(shape)):
            raise MalformedMessage(f"an array of {len(shape)} dimensions")
        for size in shape:
            if type(size) is not int or not 0 <= size <= MAX_ARRAY_BYTES:
                raise MalformedMessage(f"{size!r:.80} is no dimension of an array")
        if data is None:
            data = next(frames, None)
        elif type(data) is bytes and len(data) > INLINE_BYTES:
            raise MalformedMessage(f"{len(data)} bytes of array in the header")
        if type(data) is not bytes or len(data) > MAX_ARRAY_BYTES or len(data) != math.prod(shape) * dtype.itemsize:
            raise MalformedMessage(f"an array of shape {shape!s:.80} of {raw[0]} without its bytes")
        array: NDArray[Any] = np.ndarray(shape, np.uint8 if raw[0] == "bool" else dtype, data)
        return array != 0 if raw[0] == "bool" else array

    def _takes(self, ndim: int) -> bool:
        return ndim <= MAX_DIMENSIONS if self.ndim is None else ndim == self.ndim


@dataclass(frozen=True, slots=True)
class Maybe:
    """A value of one kind, or None."""

    of: Field

    def dump(self, value: Any, frames: list[bytes]) -> Any:
        return None if value is None else self.of.dump(value, frames)

    def load(self, raw: Any, frames: Iterator[bytes]) -> Any:
        return None if raw is None else self.of.load(raw, frames)


@dataclass(frozen=True, slots=True)
class Shape:
    """An ``ArraySpec``."""

    def dump(self, value: ArraySpec, frames: list[bytes]) -> list[Any]:
        return [value.dtype, *value.shape]

    def load(self, raw: Any, frames: Iterator[bytes]) -> ArraySpec:
        if type(raw) is not list or not raw or type(raw[0]) is not str or raw[0] not in _DTYPES:
            raise MalformedMessage(f"{raw!r:.80} describes no array")
        return ArraySpec(_DIMENSIONS.load(raw[1:], frames), raw[0])


@dataclass(frozen=True, slots=True)
class Info:
    """An ``EnvironmentInfo``."""

    def dump(self, value: EnvironmentInfo, frames: list[bytes]) -> list[Any]:
        arrays = [Shape().dump(value.observation, frames), Shape().dump(value.action, frames)]
        return [*arrays, value.num_actions, value.autoreset, value.max_episode_steps, value.is_awaitable]

    def load(self, raw: Any, frames: Iterator[bytes]) -> EnvironmentInfo:
        if type(raw) is not list or len(raw) != 6:
            raise MalformedMessage(f"{raw!r:.80} describes no environment")
        observation, action, num_actions, autoreset, max_episode_steps, is_awaitable = raw
        if autoreset not in ("same_step", "next_step") or type(is_awaitable) is not bool:
            raise MalformedMessage(f"{raw!r:.80} describes no environment")
        return EnvironmentInfo(
            observation=Shape().load(observation, frames),
            action=Shape().load(action, frames),
            num_actions=_COUNT.load(num_actions, frames),
            autoreset=autoreset,
            max_episode_steps=None if max_episode_steps is None else _COUNT.load(max_episode_steps, frames),
            is_awaitable=is_awaitable,
        )


@dataclass(frozen=True, slots=True)
class Spec:
    """An ``EnvironmentSpec``, its keyword arguments made of None, booleans, numbers, strings, lists and tables."""

    def dump(self, value: EnvironmentSpec, frames: list[bytes]) -> list[Any]:
        return [
            _NAME.dump(value.id, frames),
            _plain(value.kwargs, "kwargs", MAX_DEPTH),
            _NAMES.dump(value.wrappers, frames),
            _NAMES.dump(value.register, frames),
            _NAME.dump(value.vectorization_mode, frames),
        ]

    def load(self, raw: Any, frames: Iterator[bytes]) -> EnvironmentSpec:
        if type(raw) is not list or len(raw) != 5 or type(raw[1]) is not dict:
            raise MalformedMessage(f"{raw!r:.80} specifies no environment")
        identifier, kwargs, wrappers, register, vectorization_mode = raw
        return EnvironmentSpec(
            id=_NAME.load(identifier, frames),
            kwargs=_plain(kwargs, "kwargs", MAX_DEPTH),
            wrappers=_NAMES.load(wrappers, frames),
            register=_NAMES.load(register, frames),
            vectorization_mode=_NAME.load(vectorization_mode, frames),
        )


_COUNT: Final = Uint(2**63 - 1)
_DIMENSIONS: Final = Many(Uint(MAX_ARRAY_BYTES), MAX_DIMENSIONS)
_NAME: Final = Text(1024)
_NAMES: Final = Many(_NAME, 64)


def _plain(value: Any, path: str, depth: int) -> Any:
    """A value as TOML and msgpack know it, tuples and mappings of any kind as lists and dictionaries."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return value
    if depth and isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{index}]", depth - 1) for index, item in enumerate(value)]
    if depth and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{path}.{key}", depth - 1) for key, item in value.items()}
    raise MalformedMessage(f"{path} = {value!r:.80} is none of what can be sent: numbers, strings, lists and tables")
