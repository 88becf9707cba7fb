"""Two hundred clients share one model: each asks for itself, and the batcher asks the model for all of them at once.

Run it: python examples/microbatcher.py

It needs nothing of aiorl but `aiorl.MicroBatcher`, and so it is what a service would do that answers web requests with
a model whose cost hardly depends on the number of rows. Both ways of giving it the model are shown: a plain function,
which is right where it takes well under a millisecond, and an awaitable that runs elsewhere (a thread, another machine).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from aiorl import MicroBatcher
from aiorl.errors import MalformedRows

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from numpy.typing import NDArray

NUM_CLIENTS = 200
NUM_QUESTIONS = 20  # of each client, one after another
NUM_FEATURES = 32

_random = np.random.default_rng(0)
_hidden = _random.normal(size=(NUM_FEATURES, 128))
_output = _random.normal(size=(128, 4))


def model(questions: NDArray[Any]) -> NDArray[Any]:
    """A small network: float64 ``[B, 32]`` in, float64 ``[B, 4]`` out."""
    answers: NDArray[Any] = np.tanh(questions @ _hidden) @ _output
    return answers


async def model_in_a_thread(questions: NDArray[Any]) -> NDArray[Any]:
    """The same, off the loop: while one batch computes, the next one gathers by itself."""
    return await asyncio.to_thread(model, questions)


async def client(batcher: MicroBatcher, seed: int) -> int:
    """Asks one question after another, each about one row, and checks that the answer is its own."""
    random = np.random.default_rng(seed)
    for _ in range(NUM_QUESTIONS):
        question = random.normal(size=(1, NUM_FEATURES))
        answer = await batcher.submit(question)
        assert np.allclose(answer, model(question)), "somebody else's answer"
    return NUM_QUESTIONS


async def serve(name: str, infer: Callable[[NDArray[Any]], NDArray[Any] | Awaitable[NDArray[Any]]]) -> int:
    """Lets all clients ask, prints what the batcher made of it, and returns the number of answers."""
    started = time.perf_counter()
    async with MicroBatcher(infer, max_batch_size=64, max_wait_time=0.002) as batcher:
        async with asyncio.TaskGroup() as tasks:
            clients = [tasks.create_task(client(batcher, seed)) for seed in range(NUM_CLIENTS)]
        try:
            await batcher.submit(np.zeros((1, NUM_FEATURES + 1)))
        except MalformedRows as error:  # one bad request fails alone
            print(f"{name}: refused: {error}")
    elapsed_s = time.perf_counter() - started

    statistics = batcher.statistics()  # it works after closing, too
    flushes = ", ".join(f"{count} by {reason}" for reason, count in statistics.flushes.items() if count)
    print(
        f"{name}: {statistics.num_requests} requests in {statistics.num_batches} batches ({flushes}) in {elapsed_s:.2f} s"
    )
    print(f"{name}: rows of a batch: mean {statistics.batch_rows.mean:.1f}, largest {statistics.batch_rows.max:.0f}")
    wait = statistics.wait_s
    print(f"{name}: waited: median {wait.p50 * 1e3:.2f} ms, 99 % within {wait.p99 * 1e3:.2f} ms")
    return sum(task.result() for task in clients)


async def main() -> int:
    """Serves twice, and returns the number of answers."""
    return await serve("on the loop", model) + await serve("in a thread", model_in_a_thread)


if __name__ == "__main__":
    asyncio.run(main())
