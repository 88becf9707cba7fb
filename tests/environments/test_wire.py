from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiorl.environments.fields import INLINE_BYTES, MAX_HEADER_BYTES
from aiorl.environments.make import Tick
from aiorl.environments.spaces import ARRAY_DTYPES, ArraySpec, EnvironmentInfo, EnvironmentSpec
from aiorl.environments.wire import (
    Failed,
    Hello,
    Message,
    Observed,
    Ready,
    Reset,
    Setup,
    Step,
    Stop,
    decode,
    encode,
    observed,
    tick_of,
)
from aiorl.errors import MalformedMessage

SPEC = EnvironmentSpec(
    "walks:Walk", {"a": [1, 2.5, None, {"b": True}], "c": "ü"}, ("walks:Doubled",), ("json",), "sync"
)
INFO = EnvironmentInfo(ArraySpec((84, 84, 4), "uint8"), ArraySpec((), "int64"), 6, "next_step", None)
TICK = Tick(
    observations=np.arange(12, dtype=np.float32).reshape(3, 4),
    rewards=np.array([1, -2, 0.5], np.float32),
    terminated=np.array([False, True, True]),
    truncated=np.array([False, False, True]),
    final_observations=np.arange(8, dtype=np.float32).reshape(2, 4) + 100,
)
MESSAGES: list[Message] = [
    Hello(3, 1, 2, b"0123456789abcdef"),
    Setup(0, SPEC, (2, 1), (5, 6, 7), 3),
    Ready(1, INFO, 4711),
    Ready(1, replace(INFO, max_episode_steps=500, autoreset="same_step", is_awaitable=True), 1),
    Reset(0, 1, 17),
    Step(0, 1, 2**40, np.array([0, 1, 0])),
    Step(0, 0, 1, np.arange(10_000)),
    observed(0, 1, 18, TICK),
    observed(0, 1, 18, TICK, in_slab=True),
    Failed(0, "step", "ValueError: no", "Traceback ..."),
    Stop(9),
]


def same(one: Any, other: Any) -> bool:
    for field in fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray):
            if mine.dtype != theirs.dtype or mine.shape != theirs.shape or not (mine == theirs).all():
                return False
        elif mine != theirs:
            return False
    return type(one) is type(other)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_survives_the_wire(message: Message) -> None:
    assert same(decode(encode(message)), message)


@pytest.mark.parametrize("dtype", ARRAY_DTYPES)
@pytest.mark.parametrize("shape", [(0, 2), (3,), (2, 0, 4), (40, 30, 3)])
def test_observations_of_every_type_and_size(dtype: str, shape: tuple[int, ...]) -> None:
    rows = (np.arange(np.prod(shape)) % 2).astype(dtype).reshape(shape)
    message = Observed(0, 0, 1, bytes(shape[0]), np.zeros(shape[0], np.float32), rows)
    frames = encode(message)
    assert len(frames) == (2 if rows.nbytes > INLINE_BYTES else 1)
    assert same(decode(frames), message)


def test_a_tick_survives_and_termination_wins() -> None:
    message = decode(encode(observed(0, 1, 18, TICK)))
    assert isinstance(message, Observed)
    assert message.observations is not None
    tick = tick_of(message, message.observations[:3], message.observations[3:])
    assert tick.terminated.tolist() == [False, True, True]
    assert tick.truncated.tolist() == [False, False, False]
    assert (tick.observations == TICK.observations).all()
    assert (tick.final_observations == TICK.final_observations).all()
    assert tick.rewards.tolist() == [1, -2, 0.5]


def test_of_a_long_text_the_end_is_sent() -> None:
    message = decode(encode(Failed(0, "step", "x" * 10_000 + "the cause", "\ud800" * 100_000 + "last line")))
    assert isinstance(message, Failed)
    assert len(message.cause) == 4096
    assert message.cause.endswith("the cause")
    assert message.traceback.endswith("last line")


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (replace(SPEC, kwargs={"a": {"b": [object()]}}), r"kwargs\.a\.b\[0\]"),
        (replace(SPEC, kwargs={"a": 2**70}), r"kwargs\.a"),
        (replace(SPEC, kwargs={"a": {1: 2}}), r"kwargs\.a"),
        (replace(SPEC, kwargs={"a": "x" * MAX_HEADER_BYTES}), "header"),
        (replace(SPEC, wrappers=("a:b",) * 65), "at most 64"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_its_path(message: EnvironmentSpec, match: str) -> None:
    with pytest.raises(MalformedMessage, match=match):
        encode(Setup(0, message, (1,), (1,), 0))


def test_negative_and_boolean_integers_are_refused() -> None:
    with pytest.raises(MalformedMessage, match=r"Reset\.sequence"):
        encode(Reset(0, 0, -1))
    with pytest.raises(MalformedMessage, match=r"Stop\.incarnation"):
        encode(Stop(True))


F32 = ["float32", b"\0" * 8, 2]


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"\xc1"],
        [msgpack.packb({"a": 1})],
        [msgpack.packb([])],
        [msgpack.packb([99, 0])],
        [msgpack.packb([True, 0])],
        [msgpack.packb([7])],
        [msgpack.packb([7, 0, 0])],
        [msgpack.packb([7, 0]), b"more"],
        [msgpack.packb([7, 0]) + b"\0"],
        [b"\x91" * 5000],
        [b"\0" * (MAX_HEADER_BYTES + 1)],
        [msgpack.packb([0, 0, 1, 0, b"short"])],
        [msgpack.packb([1, 0, ["a", {}, [], [], "sync"], [2], [1]])],  # one seed for two environments
        [msgpack.packb([1, 0, ["a", {}, [], [], "sync"], [], []])],
        [msgpack.packb([1, 0, ["a", {"b": b"bytes"}, [], [], "sync"], [1], [1]])],
        [msgpack.packb([2, 0, [["uint8", 2], ["int64"], 2, "never", None, False], 1])],
        [msgpack.packb([2, 0, [["object", 2], ["int64"], 2, "same_step", None, False], 1])],
        [msgpack.packb([4, 0, 0, 1, ["int64", None, 2]])],  # without its frame
        [msgpack.packb([4, 0, 0, 1, ["int64", b"\0" * 15, 2]])],
        [msgpack.packb([4, 0, 0, 1, ["int64", b"\0" * 16, 2, 1]])],
        [msgpack.packb([4, 0, 0, 1, ["float32", b"\0" * 8, 2]])],
        [msgpack.packb([4, 0, 0, 1, ["int64", b"\0" * 4096, 512]])],  # too large for the header
        [msgpack.packb([4, 0, 0, 1, ["int64", None, 2**40]]), b"\0" * 16],
        [msgpack.packb([5, 0, 0, 1, b"\0\3", F32, F32])],  # an outcome that does not exist
        [msgpack.packb([5, 0, 0, 1, b"\0\1", F32, F32])],  # an end without its final observation
        [msgpack.packb([5, 0, 0, 1, b"\0", F32, F32])],
        [msgpack.packb([5, 0, 0, 1, b"", ["float32", b"", 0], ["float32", b"\0" * 4]])],  # no dimensions
    ],
)
def test_malformed_messages_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(MalformedMessage):
        decode(frames)


def check(frames: list[bytes]) -> None:
    try:
        message = decode(frames)
    except MalformedMessage:
        return
    assert same(decode(encode(message)), message)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.sampled_from(["float32", "int64", "bool", "same_step", "sync"]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=3),
    max_leaves=20,
)  # fmt: skip


@given(st.lists(st.binary(max_size=200), max_size=4))
@example([b"\xc7\x00\xff"])  # a timestamp without a time
@example([b"\xd6\xff\xff\xff\xff\xff"])
def test_no_bytes_raise_anything_else(frames: list[bytes]) -> None:
    check(frames)


@given(st.integers(0, 8), st.lists(plain, max_size=7), st.lists(st.binary(max_size=64), max_size=3))
@settings(max_examples=150)
def test_no_structure_raises_anything_else(kind: int, values: list[Any], frames: list[bytes]) -> None:
    check([msgpack.packb([kind, *values]), *frames])


@given(st.sampled_from(MESSAGES), st.data())
@settings(max_examples=150)
def test_no_damaged_message_raises_anything_else(message: Message, data: st.DataObject) -> None:
    frames = encode(message)
    header: Any = msgpack.unpackb(frames[0])
    index = data.draw(st.integers(0, len(header) - 1))
    if isinstance(header[index], list) and header[index] and data.draw(st.booleans()):
        header[index][data.draw(st.integers(0, len(header[index]) - 1))] = data.draw(plain)
    else:
        header[index] = data.draw(plain)
    check([msgpack.packb(header), *frames[1:]])
    position = data.draw(st.integers(0, len(frames[0]) - 1))
    damaged = bytearray(frames[0])
    damaged[position] ^= data.draw(st.integers(1, 255))
    check([bytes(damaged), *frames[1:]])
    check([frames[0][:position], *frames[1:]])
