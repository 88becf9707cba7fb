"""A run inside an application's own loop: a small HTTP server answers questions about it while it trains.

    python examples/embed.py

The application owns the loop, the signals and the logging; the run is one more thing that goes on in it. While the
server is up, ``curl http://127.0.0.1:PORT/`` asks the same as this script does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json

from aiorl import Run, load_config, load_policy, open_run  # up here: importing torch would hold the loop for a second

SETTINGS = (
    "trainer.exp_name=embed",
    "trainer.max_samples=20_000",
    "trainer.sampling.num_epoch_samples=2048",
    "trainer.sampling.max_wait_time=0.0",
    "task.environment.num_env_workers=1",
)


class StatusPage:
    """Answers every request with the figures of a run, as JSON."""

    def __init__(self, run: Run) -> None:
        """Shows `run`."""
        self._run = run

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one answer; `run.statistics()` only reads, so it may be called at any time."""
        statistics = self._run.statistics()
        figures = {
            "status": statistics.status,
            "num_samples": statistics.counters["num_samples"],
            "num_epochs": statistics.counters["num_epochs"],
            "episodes": statistics.counters["num_episodes"],
        }
        body = json.dumps(figures).encode()
        with contextlib.suppress(ConnectionError):  # whoever asked may be gone
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            await writer.drain()
        writer.close()


async def watch(port: int, every_s: float) -> None:
    """A client of the server, as a dashboard would be; goes on until it is cancelled."""
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            _, _, answer = (await reader.read()).decode().rpartition("\r\n\r\n")
        finally:
            writer.close()
        print(f"GET / -> {answer}")
        await asyncio.sleep(every_s)


async def main() -> None:
    """The application: it trains, serves and watches at once, and goes on when training is over."""
    config = load_config(None, SETTINGS)
    async with open_run(config) as run:
        server = await asyncio.start_server(StatusPage(run).answer, "127.0.0.1", 0)
        async with server, asyncio.TaskGroup() as tasks:
            watcher = tasks.create_task(watch(server.sockets[0].getsockname()[1], every_s=0.5), name="watcher")
            async for epoch in run:
                print(
                    f"epoch {epoch.epoch}: {epoch.num_samples} samples, {epoch.samples_per_s:.0f} per second, "
                    f"mean return {epoch.episode_return_mean:.1f}"
                )
            watcher.cancel()
    policy = await asyncio.to_thread(load_policy, run.folder)
    print(f"the cart leans right, so it is pushed {('left', 'right')[policy([0.0, 0.0, 0.1, 0.5])]}")


if __name__ == "__main__":
    asyncio.run(main())
