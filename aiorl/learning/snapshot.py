"""What a checkpoint holds, and the copy of it that stands still while training goes on.

| hand-off                    | bound                          | when it is full                              |
|-----------------------------|--------------------------------|----------------------------------------------|
| buffers → snapshot → store  | one snapshot of a ``Buffers``  | ``acquire`` waits until the store is done    |

Copying 300 MB into memory that was touched before takes some tens of milliseconds, into fresh memory more than a
second (the kernel hands out every page on its first write). So the buffers are made at the start, and stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from aiorl.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    Place = tuple[str | int, ...]  # where a value stands: ("optimizer", "state", 0, "exp_avg")

# Exactly these, and not their subclasses: a numpy float is a float to Python, and refused by a load that runs no code.
_PLAIN = (type(None), bool, int, float, complex, str)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Everything below the fields is plain data and tensors: None, bool, int, float, str, lists, tuples, mappings with
    keys that are str or int, and dense tensors on any device. That is what can be read back without running code.
    NumPy scalars are taken and come back as Python's; arrays are not (give ``torch.from_numpy`` of them); named tuples
    come back as tuples.

    Attributes:
        model: The model's ``state_dict``.
        optimizer: The optimizer's ``state_dict``.
        scheduler: The learning-rate scheduler's ``state_dict``.
        state: The counters of the run; ``num_steps`` must be among them and names the checkpoint.
        extra: Whatever else a run needs to go on: generator states, incarnation, last returns, noise counters.
        exact: Whether it was cut between two epochs; one forced inside an update resumes at the next epoch.
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    state: Mapping[str, int | float]
    extra: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = True


class Snapshot:
    """A copy of ``Contents`` that training does not touch. It owns its buffers until it is released.

    ``CheckpointStore.save`` takes a snapshot over and releases it in every case.
    """

    def __init__(self, contents: Contents, release: Callable[[], None]) -> None:
        self._contents = contents
        self._release = release
        self._released = False

    @property
    def contents(self) -> Contents:
        """The copy; tensors are contiguous, on the CPU, and share no memory with each other.

        Raises:
            CheckpointError: It was released; by now the buffers may hold something else.
        """
        if self._released:
            raise CheckpointError("this snapshot was released: it has been saved, or given up")
        return self._contents

    def release(self) -> None:
        """Give the buffers back, so that the next snapshot can be taken. More than once is no harm."""
        if not self._released:
            self._released = True
            self._release()


class _Use(enum.Enum):
    """Who has the buffers: free → acquired → owned → free, or free → owned when nobody waited."""

    FREE = enum.auto()
    ACQUIRED = enum.auto()  # by a caller of acquire() that has not copied yet
    OWNED = enum.auto()  # by a snapshot


class Buffers:
    """Memory for one snapshot at a time, allocated and touched before it is needed.

    A tensor's buffer is kept as long as shape and dtype stay; for a tensor on a GPU it is pinned. Tensors that appear
    later (an optimizer has no state before its first step) get theirs at the next ``reserve`` or ``copy``.

    ``copy`` and ``reserve`` may be called in any thread, ``acquire`` on any loop.
    """

    def __init__(self) -> None:
        self._tensors: dict[Place, Tensor] = {}
        self._use = _Use.FREE
        self._waiters: list[asyncio.Future[None]] = []
        self._lock = threading.Lock()

    @classmethod
    def like(cls, model_state: Mapping[str, Tensor], optimizer_state: Mapping[str, Any]) -> Buffers:
        """Buffers for these two ``state_dict``s, allocated and touched now."""
        buffers = cls()
        buffers.reserve(model_state, optimizer_state)
        return buffers

    @property
    def num_bytes(self) -> int:
        """Size of all buffers, in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def reserve(self, model_state: Mapping[str, Tensor], optimizer_state: Mapping[str, Any]) -> None:
        """Allocate and touch what these two ``state_dict``s need and do not have yet; copies nothing.

        To be called once more after the first optimizer step, so that the first ``copy`` finds all its memory.
        """
        _walk(model_state, ("model",), self._buffer)
        _walk(optimizer_state, ("optimizer",), self._buffer)

    async def acquire(self) -> None:
        """Wait until no snapshot holds the buffers and take them for the ``copy`` that follows.

        Whoever does not copy after all calls ``give_up``. Cancelled while waiting, nothing is taken.
        """
        while True:
            with self._lock:
                if self._use is _Use.FREE:
                    self._use = _Use.ACQUIRED
                    return
                waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiters.append(waiter)
            try:
                await waiter
            finally:
                with self._lock, contextlib.suppress(ValueError):
                    self._waiters.remove(waiter)

    def copy(self, contents: Contents) -> Snapshot:
        """Copy everything into the buffers, now, in the caller's thread; training may go on afterwards.

        Returns:
            A snapshot that owns the buffers until it is released.

        Raises:
            CheckpointError: An earlier snapshot still owns the buffers (``acquire`` waits for it), or the contents
                hold something that could not be read back. In the second case the buffers are free again.
        """
        with self._lock:
            if self._use is _Use.OWNED:
                raise CheckpointError("the buffers belong to a snapshot that is still being written")
            self._use = _Use.OWNED
        used: dict[Place, Tensor] = {}

        def take(place: Place, tensor: Tensor) -> Tensor:
            used[place] = self._buffer(place, tensor).copy_(tensor)
            return used[place]

        try:
            if type(contents.state.get("num_steps")) is not int:
                raise CheckpointError("state.num_steps, which names the checkpoint, must be an int")
            with torch.no_grad():
                copied = Contents(
                    model=_walk(contents.model, ("model",), take),
                    optimizer=_walk(contents.optimizer, ("optimizer",), take),
                    scheduler=_walk(contents.scheduler, ("scheduler",), take),
                    state=_walk(contents.state, ("state",), take),
                    extra=_walk(contents.extra, ("extra",), take),
                    exact=contents.exact,
                )
        except BaseException:  # the buffers are free again, whatever happened; raised again
            self._free()
            raise
        self._tensors = used
        return Snapshot(copied, self._free)

    def give_up(self) -> None:
        """Give back buffers that were acquired and not copied into; otherwise nothing happens."""
        if self._use is _Use.ACQUIRED:
            self._free()

    def _buffer(self, place: Place, tensor: Tensor) -> Tensor:
        buffer = self._tensors.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # torch.zeros would leave the touching of large blocks to the first write.
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).zero_()
            self._tensors[place] = buffer
        return buffer

    def _free(self) -> None:
        # All are woken and look again, in their order: nothing is handed over, so a waiter that is cancelled at this
        # very moment takes nothing with it.
        with self._lock:
            self._use = _Use.FREE
            for waiter in self._waiters:
                waiter.get_loop().call_soon_threadsafe(_wake, waiter)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _walk(value: Any, place: Place, tensor: Callable[[Place, Tensor], Tensor]) -> Any:
    """A copy of plain data, with ``tensor(place, value)`` in the place of each tensor."""
    if isinstance(value, Tensor) and value.layout is torch.strided:
        return tensor(place, value)
    if type(value) in _PLAIN:
        return value
    if isinstance(value, np.bool_ | np.integer | np.floating):
        plain = value.item()  # a NumPy scalar: on the host
        if type(plain) in _PLAIN:
            return plain
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        return {key: _walk(item, (*place, key), tensor) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_walk(item, (*place, index), tensor) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    name = ".".join(str(part) for part in place)
    raise CheckpointError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}: a checkpoint holds dense tensors, None,"
        " bool, int, float, str, and lists, tuples and mappings (by str or int) of these"
    )
