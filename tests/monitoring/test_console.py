from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import CodeType
from typing import TYPE_CHECKING, TypeAlias

import pytest

from aiorl.monitoring.console import Statements, _read_script

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Screen

Started: TypeAlias = Callable[..., AbstractContextManager[subprocess.Popen[bytes]]]

PROGRAM = '''
import asyncio, itertools, logging, signal, sys
from aiorl.monitoring.console import interact

logging.basicConfig(level=logging.INFO, format="log: %(message)s")

class Run:
    """Something that goes on while the console waits."""

    def __init__(self):
        self.ticks, self.lr, self.ended = 0, 1e-3, asyncio.Event()
        self.going = asyncio.Event()
        self.going.set()

    async def train(self):
        while True:
            await self.going.wait()
            self.ticks += 1
            await asyncio.sleep(0)

    def statistics(self):
        return {"ticks": self.ticks}

    async def pause(self):
        self.going.clear()

    async def resume(self):
        self.going.set()

    async def save_checkpoint(self):
        await asyncio.sleep(0.01)
        return "saved"

    async def ticked(self):
        """Waits until training went on."""
        before = self.ticks
        while self.ticks < before + 10:
            await asyncio.sleep(0)
        return "ticked"

    def set(self, name, value):
        if name != "optimizer.lr":
            raise KeyError(name)
        self.lr = value

def checkpoint(numbers=itertools.count(1)):
    logging.getLogger("aiorl.trainer").info("checkpoint %d", next(numbers))

async def main():
    run = Run()
    loop = asyncio.get_running_loop()
    loop.slow_callback_duration = 10.0  # the machine may be busy
    loop.add_signal_handler(signal.SIGINT, print, "signalled")
    loop.add_signal_handler(signal.SIGUSR1, checkpoint)
    loop.add_signal_handler(signal.SIGUSR2, run.ended.set)
    async with asyncio.TaskGroup() as tasks:
        training = tasks.create_task(run.train())
        console = tasks.create_task(interact({"run": run}, banner="a console"))
        console.add_done_callback(lambda _: run.ended.set())
        await run.ended.wait()
        console.cancel()
        training.cancel()
    print("cancelled" if console.cancelled() else "left", "at", run.lr, flush=True)

if sys.argv[1] == "uvloop":
    import uvloop
    uvloop.run(main(), debug=True)
else:
    asyncio.run(main(), debug=True)
'''


def _command(loop: str) -> list[str]:
    return [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM, loop]


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def on_terminal(screen: Screen, loop: str) -> Started:
    """Starts the program with the terminal as its own: what is typed as Ctrl-C would reach it as a signal."""

    @contextmanager
    def start() -> Iterator[subprocess.Popen[bytes]]:
        with subprocess.Popen(
            _command(loop),
            stdin=screen.near,
            stdout=screen.near,
            stderr=screen.near,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        ) as process:
            try:
                screen.expect("a console")
                screen.expect(">>>")
                yield process
                process.wait(timeout=20)
            finally:
                process.kill()

    return start


def test_a_conversation_with_a_run_that_goes_on(screen: Screen, on_terminal: Started) -> None:
    before = screen.attributes
    with on_terminal() as process:
        screen.type("run.statistics()\r")
        screen.expect(r"\{'ticks': \d+\}")
        screen.type("await run.ticked()\r")
        screen.expect("'ticked'")
        screen.type("await run.pause()\r")
        screen.type("ticks = run.ticks; await asyncio.sleep(0.02); run.ticks - ticks\r")
        screen.expect(r"[01]")
        screen.type("await run.resume()\r")
        screen.type("await run.ticked()\r")
        screen.expect("'ticked'")
        screen.type("await run.save_checkpoint()\r")
        screen.expect("'saved'")
        screen.type('run.set("optimizer.lr", 1e-4)\r')
        screen.type("for number in range(3):\r")
        screen.expect(r"\.\.\.")
        screen.type("    print('number', number)\r\r")
        screen.expect("number 2")
        screen.type("exit\r")
        screen.expect(".* leaves the console")
        screen.type("exit()\r")
        screen.expect("left at 0.0001")
    assert process.returncode == 0
    assert screen.attributes == before


def test_what_is_raised_is_printed_and_harms_nobody(screen: Screen, on_terminal: Started) -> None:
    with on_terminal() as process:
        screen.type("run.set('nonsense', 1)\r")
        screen.expect(r"Traceback \(most recent call last\):")
        screen.expect(r"  File \"<console>\", line 1, in <module>")
        screen.expect("KeyError: 'nonsense'")
        screen.type("1 +\r")
        screen.expect("SyntaxError: invalid syntax")
        screen.type("asyncio.current_task().cancel(); await asyncio.sleep(1)\r")
        screen.expect("cancelled")
        screen.type("raise BaseException('worst')\r")
        screen.expect("BaseException: worst")
        screen.type("future = asyncio.Future(); future.cancel(); await future\r")
        screen.expect("asyncio.exceptions.CancelledError")
        screen.type("await run.ticked()\r")
        screen.expect("'ticked'")
        screen.type("\x04")
        screen.expect("left at .*")
    assert process.returncode == 0


def test_ctrl_c_clears_the_line_or_cancels_the_await_and_is_no_signal(screen: Screen, on_terminal: Started) -> None:
    with on_terminal() as process:
        screen.type("half a statement")
        screen.expect(">>> half a statement", anywhere=True)
        screen.type("\x03")
        screen.expect(">>>")
        screen.type("if True:\r")
        screen.expect(r"\.\.\.")
        screen.type("\x03")
        screen.expect(">>>")
        screen.type("print('begun'); await asyncio.Event().wait()\r")
        screen.expect("begun")
        screen.type("'taken back'\r\x03await run.ticked()\r")
        screen.expect("cancelled")
        screen.expect("'ticked'")
        screen.expect(">>>")
        screen.type("await asyncio.Event().wait()\r\x03'typed ahead'\r")  # all at once
        screen.expect("cancelled")
        screen.expect("'typed ahead'")
        assert "taken back" not in "".join(screen.lines())
        assert "signalled" not in screen.sent
        process.send_signal(signal.SIGINT)  # a real one is the program's own affair
        screen.expect("signalled")
        screen.type("\x04")
        screen.expect("left at .*")
    assert process.returncode == 0


def test_tab_completes_and_the_arrows_go_through_history(screen: Screen, on_terminal: Started) -> None:
    with on_terminal():
        screen.type("run.stat\t()\r")
        screen.expect(r"\{'ticks': \d+\}")
        screen.type("run.s\t")
        screen.expect(r"save_checkpoint\s+set\s+statistics")
        screen.type("\x15'first'\r")
        screen.expect("'first'")
        screen.type("'second'\r")
        screen.expect("'second'")
        screen.type("_")
        screen.expect(">>> _")
        screen.type("\x1b[D_")  # history is there once the first keys are answered
        screen.expect(">>> __", anywhere=True)
        screen.type("\x15\x0b\x1b[A\x1b[A\r")
        screen.expect("'first'")
        screen.type("\x04")
        screen.expect("left at .*")


def test_pasted_statements_are_executed_one_after_the_other(screen: Screen, on_terminal: Started) -> None:
    with on_terminal():
        screen.type("\x1b[200~def double(x):\n\n    return 2 * x\n\ndouble(21)\n'end'\x1b[201~\r")
        screen.expect("42")
        screen.expect("'end'")
        screen.type("\x04")
        screen.expect("left at .*")


def test_log_lines_appear_whole_above_the_line_that_is_typed(screen: Screen, on_terminal: Started) -> None:
    with on_terminal() as process:
        screen.type("'half a ")
        screen.expect(">>> 'half a", anywhere=True)
        for number in (1, 2):
            process.send_signal(signal.SIGUSR1)
            screen.expect(f"log: checkpoint {number}", anywhere=True)
            screen.expect(">>> 'half a")
        screen.type("line'\r")
        screen.expect("'half a line'")
        screen.type("\x04")
        screen.expect("left at .*")
    assert [line for line in screen.lines() if line] == [
        "a console",
        "log: checkpoint 1",
        "log: checkpoint 2",
        ">>> 'half a line'",
        "'half a line'",
        ">>>",
        "left at 0.001",
    ]


@pytest.mark.parametrize("typed", ["half a statement", "print('begun'); await asyncio.Event().wait()\r"])
def test_when_the_run_ends_first_the_console_ends_with_it(screen: Screen, on_terminal: Started, typed: str) -> None:
    before = screen.attributes
    with on_terminal() as process:
        screen.type(typed)
        screen.expect(">>> half a statement|begun", anywhere=True)
        process.send_signal(signal.SIGUSR2)
        screen.expect("cancelled at .*")
    assert process.returncode == 0
    assert screen.attributes == before


def test_a_terminal_that_hangs_up_leaves_the_console(screen: Screen, on_terminal: Started) -> None:
    with on_terminal() as process:
        screen.type("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\r'ignored'\r")
        screen.expect("'ignored'")
        screen.hang_up()
    assert process.returncode is not None


def test_printing_much_does_not_fail(screen: Screen, on_terminal: Started) -> None:
    with on_terminal():
        screen.type("print('x' * 300_000)\r")
        screen.expect("x{300000}")
        screen.type("import os; os.get_blocking(0), os.get_blocking(1)\r")
        screen.expect(r"\(True, True\)")
        screen.type("\x04")
        screen.expect("left at .*")


SCRIPT = """
run.ticks >= 0
def double(x):

    return 2 * x
double(21)
for number in range(2):
    # a comment
    print("number", number)
else:
    print("done")
await run.ticked()
1 / 0
text = '''two

lines'''
len(text)
run.set("optimizer.lr", 0.5); await run.save_checkpoint()
import os; os.get_blocking(0)"""

ANSWER = """True
42
number 0
number 1
done
'ticked'
10
'saved'
True
left at 0.5
"""


def test_a_script_on_standard_input(loop: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    piped = subprocess.run(_command(loop), input=SCRIPT.encode(), capture_output=True, timeout=30, check=True)
    with script.open("rb") as file:
        read = subprocess.run(_command(loop), stdin=file, capture_output=True, timeout=30, check=True)
    for finished in (piped, read):
        assert finished.stdout.decode() == ANSWER
        assert finished.stderr.decode().splitlines()[-1] == "ZeroDivisionError: division by zero"
        assert finished.stderr.decode().count("Traceback") == 1


def test_no_standard_input_is_the_end_of_it(loop: str) -> None:
    finished = subprocess.run(_command(loop), stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=True)
    assert finished.stdout.decode() == "left at 0.001\n"
    assert finished.stderr == b""


def test_a_program_can_converse_through_pipes(loop: str) -> None:
    with subprocess.Popen(_command(loop), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(3):
            process.stdin.write(f"{number} * 10\n".encode())
            process.stdin.flush()
            assert process.stdout.readline() == f"{number * 10}\n".encode()
        process.stdin.write(b"exit()\nprint('not reached')\n")
        process.stdin.flush()
        assert process.stdout.read() == b"left at 0.001\n"
        assert process.wait(timeout=20) == 0


@pytest.mark.anyio
async def test_cancelled_while_it_waits_for_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    statements = Statements({})
    with os.fdopen(reading), os.fdopen(writing, "wb", buffering=0) as pipe:
        done = asyncio.Event()
        statements.scope["done"] = done
        async with asyncio.TaskGroup() as group:
            task = group.create_task(_read_script(statements, reading))
            pipe.write("'ü'; done.set()\nhalf a ".encode())
            await done.wait()
            task.cancel()
        assert os.get_blocking(reading)
    assert task.cancelled()
    assert "'ü'" in capsys.readouterr().out


@pytest.mark.anyio
async def test_a_context_variable_that_is_set_stays_set(capsys: pytest.CaptureFixture[str]) -> None:
    statements = Statements({})
    for line in ("import contextvars", "v = contextvars.ContextVar('v')", "_ = v.set(5)", "v.get()"):
        for statement in statements.push(line, blank_ends_block=True):
            await statements.execute(statement)
    assert capsys.readouterr().out == "5\n"


@pytest.mark.anyio
async def test_cancelling_cancels_the_statement() -> None:
    log: list[str] = []
    begun = asyncio.Event()

    async def wait() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            log.append("cleaned up")

    statements = Statements({"wait": wait})
    [statement] = statements.push("await wait()", blank_ends_block=True)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(statements.execute(statement))
        await begun.wait()
        task.cancel()
    assert task.cancelled()
    assert log == ["cleaned up"]


def _kinds(lines: list[str], *, blank_ends_block: bool) -> list[str]:
    """What each line, and then the end of input, makes ready: c for code, e for an error."""
    statements = Statements({})
    ready = [statements.push(line, blank_ends_block=blank_ends_block) for line in lines]
    ready.append(statements.end())
    return ["".join("c" if isinstance(one, CodeType) else "e" for one in each) for each in ready]


@pytest.mark.parametrize(
    ("lines", "typed", "in_script"),
    [
        (["x = 1"], ["c", ""], ["c", ""]),
        (["", "  "], ["", "", ""], ["", "", ""]),
        (["if x:", "    y", ""], ["", "", "c", ""], ["", "", "", "c"]),
        (["if x:", "    y", "z"], ["", "", "cc", ""], ["", "", "cc", ""]),
        (["if x:", "    y", "else:", "    z", "w"], ["", "", "", "", "cc", ""], ["", "", "", "", "cc", ""]),
        (["(1,", "2)"], ["", "c", ""], ["", "c", ""]),
        (["'''a", "", "b'''"], ["", "", "c", ""], ["", "", "c", ""]),
        (["@f", "def g(): pass", ""], ["", "", "c", ""], ["", "", "", "c"]),
        (["1 +", "2"], ["e", "c", ""], ["e", "c", ""]),
        (["x = (1,"], ["", "e"], ["", "e"]),
        (["if x:", "1"], ["", "e", ""], ["", "e", ""]),
    ],
)
def test_lines_make_statements(lines: list[str], typed: list[str], in_script: list[str]) -> None:
    assert _kinds(lines, blank_ends_block=True) == typed
    assert _kinds(lines, blank_ends_block=False) == in_script
