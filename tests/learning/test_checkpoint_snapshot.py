"""The copy of a run's state that stands still while training goes on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aiorl.errors import CheckpointError
from aiorl.learning.snapshot import Buffers, Contents, Snapshot

pytestmark = pytest.mark.anyio


def contents(model: dict[str, Tensor] | None = None, **extra: Any) -> Contents:
    return Contents(model=model or {}, optimizer={}, scheduler={}, state={"num_steps": 1}, extra=extra)


def trained(num_steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(num_steps):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return model, optimizer


def test_a_snapshot_stands_still_while_training_goes_on() -> None:
    model, optimizer = trained(2)
    buffers = Buffers.like(model.state_dict(), optimizer.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moment = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    snapshot = buffers.copy(
        Contents(model.state_dict(), optimizer.state_dict(), {}, {"num_steps": 2}, {"rng": torch.get_rng_state()})
    )
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.rand(1)
    copied = snapshot.contents
    assert copied.model.keys() == before.keys()
    assert all(torch.equal(copied.model[name], before[name]) for name in before)
    assert not torch.equal(copied.model["weight"], model.state_dict()["weight"])
    assert torch.equal(copied.optimizer["state"][0]["exp_avg"], moment)
    assert copied.optimizer["param_groups"] == optimizer.state_dict()["param_groups"]
    assert not torch.equal(copied.extra["rng"], torch.get_rng_state())


def test_memory_is_made_once_and_used_again() -> None:
    model, optimizer = trained(0)
    buffers = Buffers.like(model.state_dict(), optimizer.state_dict())
    assert buffers.num_bytes == 4 * (3 * 2 + 2)
    model, optimizer = trained(1)  # Adam's state has appeared: two moments and a float32 counter for each parameter
    buffers.reserve(model.state_dict(), optimizer.state_dict())
    assert buffers.num_bytes == 3 * 4 * (3 * 2 + 2) + 2 * 4
    full = Contents(model.state_dict(), optimizer.state_dict(), {}, {"num_steps": 1})
    places = []
    for _ in range(2):
        snapshot = buffers.copy(full)
        places.append([tensor.data_ptr() for tensor in snapshot.contents.model.values()])
        snapshot.release()
    assert places[0] == places[1]
    assert buffers.num_bytes == 3 * 4 * (3 * 2 + 2) + 2 * 4
    buffers.copy(contents({"weight": torch.zeros(5, dtype=torch.float64)}))
    assert buffers.num_bytes == 5 * 8  # what is no longer there is not kept


def test_tensors_of_every_kind_are_copied_apart() -> None:
    base = torch.arange(6.0).reshape(2, 3)
    shared = {"a": base, "tied": base, "transposed": base.T, "scalar": torch.tensor(3), "empty": torch.zeros(0, 4)}
    copied = Buffers().copy(contents(shared)).contents.model
    base.zero_()
    assert copied["a"].tolist() == copied["tied"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copied["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copied["transposed"].is_contiguous()
    assert copied["a"].data_ptr() != copied["tied"].data_ptr()
    assert copied["scalar"].item() == 3
    assert copied["empty"].shape == (0, 4)


def test_plain_data_comes_out_plain() -> None:
    given: dict[str, Any] = {
        "float": np.float64(0.1),
        "int": np.int64(3),
        "bool": np.True_,
        "big": 1 << 127,
        "list": [1, (2.5, None), "x"],
        "mapping": OrderedDict(a={1: True}),
    }
    taken = Buffers().copy(contents(**given)).contents.extra
    assert taken == {
        "float": 0.1,
        "int": 3,
        "bool": True,
        "big": 1 << 127,
        "list": [1, (2.5, None), "x"],
        "mapping": {"a": {1: True}},
    }
    assert [type(taken[name]) for name in ("float", "int", "bool", "mapping")] == [float, int, bool, dict]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.zeros(2), r"extra\.deep\.0 is a numpy\.ndarray"),
        ({1, 2}, r"extra\.deep\.0 is a builtins\.set"),
        (b"x", r"extra\.deep\.0 is a builtins\.bytes"),
        (np.longdouble(1), r"extra\.deep\.0 is a numpy\.longdouble"),
        ({(1, 2): 3}, r"extra\.deep\.0 is a builtins\.dict"),
        (print, r"extra\.deep\.0 is a builtins\.builtin_function"),
        (torch.zeros(2, 2).to_sparse(), r"extra\.deep\.0 is a torch\.Tensor"),
    ],
)
def test_what_could_not_be_read_back_is_refused_and_named(value: object, named: str) -> None:
    buffers = Buffers()
    with pytest.raises(CheckpointError, match=named):
        buffers.copy(contents(deep=[value]))
    buffers.copy(contents(deep=[1]))  # they are free again


def test_the_counter_that_names_it_must_be_there() -> None:
    with pytest.raises(CheckpointError, match="num_steps"):
        Buffers().copy(Contents({}, {}, {}, {"num_epochs": 1}))


def test_one_snapshot_at_a_time() -> None:
    buffers = Buffers()
    snapshot = buffers.copy(contents())
    with pytest.raises(CheckpointError, match="still being written"):
        buffers.copy(contents())
    snapshot.release()
    with pytest.raises(CheckpointError, match="released"):
        _ = snapshot.contents
    second = buffers.copy(contents())
    snapshot.release()  # a second time is no harm to whom they belong now
    with pytest.raises(CheckpointError, match="still being written"):
        buffers.copy(contents())
    second.release()


async def test_a_second_snapshot_waits_for_the_first() -> None:
    buffers = Buffers()
    order: list[str] = []

    async def take(name: str) -> None:
        await buffers.acquire()
        order.append(name)
        buffers.copy(contents()).release()

    first = buffers.copy(contents())
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(take("second"))
        tasks.create_task(take("third"))
        for _ in range(3):
            await asyncio.sleep(0)
        assert order == []
        first.release()
    assert order == ["second", "third"]


async def test_a_cancelled_waiter_takes_nothing() -> None:
    buffers = Buffers()
    first = buffers.copy(contents())
    async with asyncio.TaskGroup() as tasks:
        before_release = tasks.create_task(buffers.acquire())
        at_release = tasks.create_task(buffers.acquire())
        await asyncio.sleep(0)
        before_release.cancel()
        await asyncio.sleep(0)
        first.release()
        at_release.cancel()  # while it is being woken
    assert before_release.cancelled()
    assert at_release.cancelled()
    await buffers.acquire()
    buffers.give_up()
    buffers.give_up()
    await buffers.acquire()
    buffers.copy(contents())
    buffers.give_up()  # not acquired any more: they belong to the snapshot
    with pytest.raises(CheckpointError, match="still being written"):
        buffers.copy(contents())


async def test_a_release_in_another_thread_wakes_the_waiter() -> None:
    buffers = Buffers()
    first = buffers.copy(contents())
    other = threading.Thread(target=first.release)
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        tasks.create_task(buffers.acquire())
        await asyncio.sleep(0)
        other.start()
    other.join()
    buffers.give_up()


def test_copying_into_touched_memory_is_fast() -> None:
    """300 MB, in tens of milliseconds; ten times that is allowed here, where others use the cores too."""
    model = {f"layer{index}": torch.ones(25 * 250_000) for index in range(12)}
    buffers = Buffers.like(model, {})
    assert buffers.num_bytes == 300_000_000

    def timed() -> float:
        start = time.perf_counter()
        snapshot: Snapshot = buffers.copy(contents(model))
        duration = time.perf_counter() - start
        snapshot.release()
        return duration

    assert min(timed() for _ in range(3)) < 0.4
