"""The interactive console: Python statements, with top-level ``await``, executed on the loop that trains.

A statement runs in a task of its own. While it awaits, everything else on the loop goes on; while it computes,
nothing does: a blocking statement (``time.sleep``, a long loop) stops training until it is done. What it raises is
printed and harms nobody.

| key            | at the prompt      | while a statement runs                                                   |
|----------------|--------------------|--------------------------------------------------------------------------|
| Ctrl-C         | clears the line    | cancels its await, and what was typed meanwhile; no blocking statement   |
| Ctrl-D         | leaves the console | is kept for the prompt, as is whatever is typed                          |
| Ctrl-backslash | nothing            | ends the process: the way out of a blocking statement                    |

A typed Ctrl-C is never a signal, so that it cannot end the run. Where standard input is no terminal, statements are
read from it as from a file, to its end; then SIGINT means what it means to the process.
"""

from __future__ import annotations

import ast
import asyncio
import codecs
import codeop
import contextvars
import importlib
import inspect
import os
import re
import sys
import traceback
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol

from aiorl.monitoring.threads import OwnedThread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from contextlib import AbstractContextManager
    from types import CodeType

_CONTINUES: Final = re.compile(r"[\s#]|(else|elif|except|finally)\b|$")
_IMPORT_TIMEOUT_S: Final = 60.0


async def interact(namespace: Mapping[str, Any], *, banner: str) -> None:
    """Read statements from standard input and execute them, until its end or ``exit()``.

    On a terminal there are line editing, history, completion of names and attributes (Tab), and what is written
    meanwhile appears above the prompt. From anything else (a pipe, a file) statements are read as from a script,
    without prompts; an exception does not end it.

    Args:
        namespace: Names that statements see, beside ``asyncio`` and ``exit``. It is copied.
        banner: What to say first, on a terminal.

    Cancelling leaves at once, in the midst of a line or of an await, with the terminal as it was before.
    """
    statements = Statements(namespace)
    if sys.stdin is None:
        return
    if sys.stdin.isatty() and sys.stdout.isatty():
        # The line editor takes 0.1 s to import.
        importing = OwnedThread(lambda: importlib.import_module("aiorl.monitoring.terminal"), name="aiorl-import")
        importing.start()
        await importing.join(_IMPORT_TIMEOUT_S)
        from aiorl.monitoring.terminal import Terminal

        await _converse(statements, Terminal(statements.scope), banner)
    else:
        await _read_script(statements, sys.stdin.fileno())


class Keyboard(Protocol):
    """The terminal, as a console sees it."""

    def opened(self) -> AbstractContextManager[None]:
        """Take the terminal over; it is given back as it was."""
        ...

    async def read(self, prompt: str) -> str | None:
        """What was typed or pasted, without the last newline; None at the end of input.

        Raises:
            Interrupted: Ctrl-C was typed.
        """
        ...

    def watched(self, interrupt: Callable[[], object]) -> AbstractContextManager[None]:
        """Call `interrupt` whenever Ctrl-C is typed in the body."""
        ...


class Interrupted(Exception):
    """Ctrl-C was typed at the prompt."""


class Exit:
    """What ``exit`` and ``quit`` are in a console: they leave it, and only it."""

    def __call__(self) -> NoReturn:
        """Leave the console."""
        raise SystemExit

    def __repr__(self) -> str:
        return "exit() or Ctrl-D leaves the console"


class Statements:
    """Puts lines together to statements, and executes them.

    Args:
        namespace: Names that statements see.

    Attributes:
        scope: These names, and what statements bind.
        has_left: Whether a statement asked to leave the console.
    """

    def __init__(self, namespace: Mapping[str, Any]) -> None:
        self.scope: dict[str, Any] = {"__name__": "__console__", "__doc__": None, "asyncio": asyncio}
        self.scope.update(exit=Exit(), quit=Exit(), **namespace)
        self.has_left = False
        self._lines: list[str] = []
        self._compile = codeop.CommandCompiler()
        self._compile.compiler.flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        self._context = contextvars.copy_context()  # shared, so that a context variable that is set stays set

    @property
    def is_incomplete(self) -> bool:
        """Whether the statement that was begun wants more lines."""
        return bool(self._lines)

    def clear(self) -> None:
        """Forget the statement that was begun."""
        self._lines.clear()

    def push(self, line: str, *, blank_ends_block: bool) -> list[CodeType | Exception]:
        """Take a line.

        Args:
            line: The line, without its newline.
            blank_ends_block: Whether a blank line ends a compound statement, as for one who types. In a script it
                does not: there the next line that is not indented does.

        Returns:
            What can be executed now; an exception (``SyntaxError``) in place of what cannot be compiled.
        """
        ready: list[CodeType | Exception] = []
        if self._lines and not _CONTINUES.match(line):
            self._take(ready, is_whole=True)
        is_blank = not line.strip()
        if is_blank and not self._lines:
            return ready
        self._lines.append(line)
        if not is_blank or blank_ends_block:
            self._take(ready, is_whole=False)
        return ready

    def end(self) -> list[CodeType | Exception]:
        """Take the end of input; gives what can be executed still."""
        ready: list[CodeType | Exception] = []
        if self._lines:
            self._take(ready, is_whole=True)
            if self._lines:
                self._lines.clear()
                ready.append(SyntaxError("the input ends in the midst of a statement"))
        return ready

    def _take(self, ready: list[CodeType | Exception], *, is_whole: bool) -> None:
        try:
            code = self._compile("\n".join(self._lines) + "\n" * is_whole, "<console>", "single")
        except (SyntaxError, ValueError, OverflowError, RecursionError) as error:
            ready.append(error.with_traceback(None))
        else:
            if code is None:
                return
            ready.append(code)
        self._lines.clear()

    async def execute(self, statement: CodeType | Exception, keyboard: Keyboard | None = None) -> None:
        """Execute a statement in a task of its own, until it is done; Ctrl-C at the keyboard cancels it.

        Whatever it raises is printed, to standard error. Cancelling cancels it.
        """
        if isinstance(statement, Exception):
            _print_traceback(statement)
            return
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._run(statement), name="console statement", context=self._context)
            if keyboard is not None:
                with keyboard.watched(task.cancel):
                    await asyncio.wait([task])
        if task.cancelled():
            sys.stderr.write("cancelled\n")

    async def _run(self, code: CodeType) -> None:
        try:
            value = FunctionType(code, self.scope)()
            if inspect.iscoroutine(value):
                await value
        except SystemExit:
            self.has_left = True
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            trace = error.__traceback__
            _print_traceback(error.with_traceback(trace.tb_next if trace is not None else None))


def _print_traceback(error: BaseException) -> None:
    sys.stderr.write("".join(traceback.format_exception(error)))
    sys.stderr.flush()


async def _converse(statements: Statements, keyboard: Keyboard, banner: str) -> None:
    with keyboard.opened():
        sys.stdout.write(banner.rstrip("\n") + "\n")
        while not statements.has_left:
            try:
                typed = await keyboard.read("... " if statements.is_incomplete else ">>> ")
            except Interrupted:
                statements.clear()
                continue
            if typed is None:
                return
            lines = typed.split("\n")  # several where they were pasted
            for number, line in enumerate(lines, start=1):
                for statement in statements.push(line, blank_ends_block=number == len(lines)):
                    if not statements.has_left:
                        await statements.execute(statement, keyboard)


async def _read_script(statements: Statements, file: int) -> None:
    async for line in _lines(file):
        for statement in statements.end() if line is None else statements.push(line, blank_ends_block=False):
            await statements.execute(statement)
            sys.stdout.flush()
            if statements.has_left:
                return


async def _lines(file: int) -> AsyncIterator[str | None]:
    """The lines of a descriptor, as they arrive; None at the end."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = ""
    while True:
        await _readable(file)
        data = os.read(file, 65536)
        *lines, text = (text + decoder.decode(data, final=not data)).split("\n")
        for line in lines:
            yield line.rstrip("\r")
        if not data:
            if text:
                yield text
            yield None
            return


async def _readable(file: int) -> None:
    """Wait until reading from a descriptor would not block."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    was_blocking = os.get_blocking(file)
    try:
        loop.add_reader(file, ready.set)
    except PermissionError:  # a regular file: always
        return
    os.set_blocking(file, was_blocking)  # uvloop changes it for every process that shares the file
    try:
        await ready.wait()
    finally:
        loop.remove_reader(file)
