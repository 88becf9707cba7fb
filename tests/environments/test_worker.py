"""The worker's process by itself, and what becomes of it when its trainer is gone."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from aiorl.environments.spaces import EnvironmentSpec
from aiorl.environments.wire import (
    PROTOCOL_VERSION,
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
)
from aiorl.environments.worker import EXIT_ORPHANED, TERMINATE, serve

TOKEN = b"0123456789abcdef"
TRAINER = """
import asyncio, os, sys
sys.path.insert(0, {folder!r})
import numpy as np
from aiorl.environments.config import EnvironmentConfig, LinkConfig
from aiorl.environments.spaces import EnvironmentSpec
from aiorl.environments.supervisor import open_workers

async def main():
    spec = EnvironmentSpec("walks:Walk", {{"misbehave": {misbehave!r}, "at_step": 1}})
    config = EnvironmentConfig(num_env_workers=2, envs_per_worker=1)
    async with open_workers(spec, config, LinkConfig(), env_seed=1, incarnation=0, force_sync=False) as workers:
        for group in workers.groups:
            await group.reset()
        steps = [group.step(np.zeros(1, np.int64)) for group in workers.groups]
        async with asyncio.TaskGroup() as tasks:
            for step in steps:
                tasks.create_task(step)
            print("stepping", flush=True)
            await asyncio.sleep(600)  # hangs on purpose: it is to be interrupted

asyncio.run(main())
"""


def wait_for_end(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(5000), "the process still runs"
    os.close(pidfd)


@pytest.mark.parametrize("misbehave", ["spin", "sleep"])
def test_a_killed_trainer_leaves_no_worker(misbehave: str, tmp_path: Path) -> None:
    source = TRAINER.format(folder=str(Path(__file__).parent), misbehave=misbehave)
    command, root = [sys.executable, "-c", source], Path(__file__).parents[2]
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # its socket's folder is all that stays behind
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, env=environment) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"stepping\n"
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        pidfds = [os.pidfd_open(int(child)) for child in children]
        assert len(pidfds) == 2
        run.kill()
        for pidfd in pidfds:
            wait_for_end(pidfd)


class Trainer:
    """A ROUTER, and a worker's process that was started by hand."""

    def __init__(self, *, parent: int | None = None, boot: bool = True) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.RCVTIMEO, 10_000)
        self.router.bind("tcp://127.0.0.1:*")
        endpoint = self.router.get_string(zmq.LAST_ENDPOINT)
        lifeline, self.lifeline = os.pipe()
        options = {"connect": endpoint, "worker": 3, "incarnation": 2, "lifeline": lifeline}
        options |= {"parent": os.getpid() if parent is None else parent}
        command = [sys.executable, "-m", "aiorl.environments.worker"]
        command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        self.process = subprocess.Popen(command, pass_fds=[lifeline], env=environment, stderr=subprocess.PIPE)
        os.close(lifeline)
        if boot:
            packed = msgpack.packb({"identity": b"w3", "token": TOKEN, "path": sys.path})
            os.write(self.lifeline, len(packed).to_bytes(4, "big") + packed)

    def send(self, message: Message) -> None:
        self.router.send_multipart([b"w3", *encode(message)])

    def receive(self) -> Message:
        return decode(self.router.recv_multipart()[1:])

    def build(self, **kwargs: Any) -> None:
        assert self.receive() == Hello(2, PROTOCOL_VERSION, 3, TOKEN)
        self.send(Setup(2, EnvironmentSpec("walks:Walk", kwargs), (1,), (7,), 0))
        assert isinstance(self.receive(), Ready)

    def drop_lifeline(self) -> None:
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1

    def close(self) -> None:
        self.drop_lifeline()
        self.process.kill()
        self.process.communicate()
        self.router.close(linger=0)
        self.context.term()


def test_a_conversation() -> None:
    with closing(Trainer()) as trainer:
        trainer.build()
        trainer.send(Step(1, 0, 1, np.zeros(1, np.int64)))  # of another incarnation: not listened to
        trainer.send(Reset(2, 0, 1))
        first = trainer.receive()
        assert isinstance(first, Observed)
        assert first.observations is not None
        assert first.observations.tolist()[0][:3] == [7, 1, 0]
        trainer.send(Step(2, 0, 2, np.zeros(1, np.int64)))
        assert isinstance(trainer.receive(), Observed)
        trainer.send(Stop(2))
        assert trainer.process.wait(10) == 0


@pytest.mark.parametrize("message", [Reset(2, 0, 2), Stop(1), Hello(2, PROTOCOL_VERSION, 3, TOKEN)])
def test_messages_that_make_no_sense_are_reported(message: Message) -> None:
    with closing(Trainer()) as trainer:
        trainer.build()
        trainer.send(message)
        if isinstance(message, Stop):  # of another incarnation
            trainer.send(Reset(2, 0, 9))
        failed = trainer.receive()
        assert isinstance(failed, Failed)
        assert (failed.where, failed.cause.partition(":")[0]) == ("link", "aiorl.errors.MalformedMessage")
        trainer.send(Stop(2))
        assert trainer.process.wait(10) == 0


@pytest.mark.parametrize("misbehave", ["", "sleep"])
def test_the_end_of_the_lifeline_ends_the_worker(misbehave: str) -> None:
    with closing(Trainer()) as trainer:
        trainer.build(misbehave=misbehave, at_step=1)
        trainer.send(Reset(2, 0, 1))
        trainer.receive()
        trainer.send(Step(2, 0, 2, np.zeros(1, np.int64)))
        trainer.drop_lifeline()
        assert trainer.process.wait(10) == EXIT_ORPHANED


def test_a_worker_without_a_trainer_ends_at_once() -> None:
    with closing(Trainer(parent=1)) as trainer:
        assert trainer.process.wait(10) == EXIT_ORPHANED
    with closing(Trainer(boot=False)) as trainer:
        trainer.drop_lifeline()
        assert trainer.process.wait(10) == EXIT_ORPHANED


def test_an_impatient_trainer_lets_environments_clean_up() -> None:
    with closing(Trainer()) as trainer:
        trainer.build(misbehave="sleep", at_step=1, say_closed=True)
        trainer.send(Reset(2, 0, 1))
        trainer.receive()
        trainer.send(Step(2, 0, 2, np.zeros(1, np.int64)))
        trainer.process.send_signal(signal.SIGTERM)  # from elsewhere: the trainer's business
        os.write(trainer.lifeline, TERMINATE)
        _, stderr = trainer.process.communicate(timeout=10)
        assert (trainer.process.returncode, stderr.decode().strip()) == (128 + signal.SIGTERM, "closed")


def test_what_environments_raise_in_close_is_printed_and_goes_no_further(capsys: pytest.CaptureFixture[str]) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind("inproc://trainer")
        options: Any = {"worker": 0, "incarnation": 0, "identity": b"w", "token": TOKEN}
        thread = threading.Thread(target=serve, args=(context, "inproc://trainer"), kwargs=options)
        thread.start()
        spec = EnvironmentSpec("walks:Walk", {"misbehave": "raise", "where": "close"})
        for message in (Setup(0, spec, (1, 1), (1, 2), 0), Stop(0)):
            router.recv_multipart()
            router.send_multipart([b"w", *encode(message)])
        thread.join()
    assert capsys.readouterr().err.count("ValueError: the bridge is out") == 2
