"""The terminal under the interactive console: line editing, history and completion, by prompt_toolkit, on the loop itself.

From opening to closing, the keyboard belongs to the console: Ctrl-C arrives as a key, never as a signal.
"""

from __future__ import annotations

import os
import re
import sys
import termios
import tty
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any, Final, TextIO, cast

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.keys import Keys
from prompt_toolkit.output.defaults import create_output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.patch_stdout import StdoutProxy
from prompt_toolkit.shortcuts import CompleteStyle

from aiorl.monitoring.console import Interrupted
from aiorl.monitoring.progress import terminal_handlers_writing_to

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document
    from prompt_toolkit.key_binding import KeyPress

_ENDING_OF_NAME: Final = re.compile(r"(?:([A-Za-z_][\w.]*)\.)?(\w*)$")
_NO_CHARACTER: Final = b"\0"


class _EndOfInput(Exception):
    pass


class Terminal:
    """The terminal of this process; see `aiorl.monitoring.console.Keyboard`.

    Args:
        scope: Names to complete; looked at when Tab is pressed.
    """

    def __init__(self, scope: Mapping[str, Any]) -> None:
        self._scope = scope
        self._input: Vt100Input | None = None
        self._prompts: PromptSession[str] | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Take the terminal over; it is given back as it was."""
        with ExitStack() as stack:
            self._input = _Keyboard(stack.enter_context(_own_stdin()))
            output = create_output(sys.stdout)
            if isinstance(output, Vt100_Output):
                output.enable_cpr = False  # asks the terminal, which may be too slow or too simple to answer
            stack.enter_context(_keys_instead_of_signals(self._input))
            self._prompts = PromptSession(
                history=InMemoryHistory(),
                completer=NameCompleter(self._scope),
                complete_while_typing=False,
                complete_style=CompleteStyle.READLINE_LIKE,
                interrupt_exception=Interrupted,
                eof_exception=_EndOfInput,
                input=self._input,
                output=output,
            )
            yield

    async def read(self, prompt: str) -> str | None:
        """What was typed or pasted, without the last newline; None at the end of input.

        Raises:
            Interrupted: Ctrl-C was typed.
        """
        assert self._prompts is not None, "the terminal is not open"
        with StdoutProxy(sleep_between_writes=0.0, raw=True) as proxy:
            above = cast("TextIO", proxy)
            with redirect_stdout(above), redirect_stderr(above), terminal_handlers_writing_to(above):
                try:
                    # Signals and the loop's exception handler are the host's.
                    return await self._prompts.prompt_async(prompt, set_exception_handler=False, handle_sigint=False)
                except (_EndOfInput, EOFError):  # typed, or the terminal hung up
                    return None

    @contextmanager
    def watched(self, interrupt: Callable[[], object]) -> Iterator[None]:
        """Call `interrupt` whenever Ctrl-C is typed in the body; keys behind it are kept for the prompt."""
        keyboard = self._input
        assert keyboard is not None, "the terminal is not open"
        kept: list[KeyPress] = []

        def take(presses: Iterable[KeyPress]) -> None:
            for press in presses:
                if press.key == Keys.ControlC:
                    kept.clear()  # as a terminal does, so that no statement begins after it was taken back
                    interrupt()
                else:
                    kept.append(press)

        with keyboard.attach(lambda: take(keyboard.read_keys())):
            take(get_typeahead(keyboard))
            try:
                yield
            finally:
                store_typeahead(keyboard, kept)


class _Keyboard(Vt100Input):
    def cooked_mode(self) -> AbstractContextManager[None]:
        """Nothing: while something is written above the prompt, keys would be taken by the terminal's own line editing."""
        return nullcontext()


class NameCompleter(Completer):
    """Completes names of a scope, and attributes of what they stand for.

    Args:
        scope: The names; looked at when a completion is asked for.
    """

    def __init__(self, scope: Mapping[str, Any]) -> None:
        self._scope = scope

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """The names that what stands before the cursor may become; private ones only after an underscore."""
        del complete_event
        match = _ENDING_OF_NAME.search(document.text_before_cursor)
        assert match is not None, "it matches nothing too"
        path, beginning = match.groups()
        for name in sorted(self._names(path)):
            if name.startswith(beginning) and (beginning.startswith("_") or not name.startswith("_")):
                yield Completion(name, start_position=-len(beginning))

    def _names(self, path: str | None) -> Iterable[str]:
        if path is None:
            return list(self._scope)
        first, *attributes = path.split(".")
        try:
            value = self._scope[first]
            for attribute in attributes:
                value = getattr(value, attribute)
            return dir(value)
        except Exception:  # noqa: BLE001, whatever a property raises, there is nothing to complete
            return []


@contextmanager
def _own_stdin() -> Iterator[TextIO]:
    """The terminal of standard input, opened anew where that is allowed.

    uvloop makes what it watches non-blocking, and a terminal's input and output commonly share that state: a long
    `print` would fail.
    """
    try:
        descriptor = os.open(os.ttyname(sys.stdin.fileno()), os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # somebody else's terminal, after su
        yield sys.stdin
        return
    with os.fdopen(descriptor, encoding=sys.stdin.encoding) as stdin:
        yield stdin


@contextmanager
def _keys_instead_of_signals(keyboard: Vt100Input) -> Iterator[None]:
    """Read key by key without echo; Ctrl-C and Ctrl-Z are keys, Ctrl-backslash stays the way out of everything."""
    with keyboard.raw_mode():
        attributes = termios.tcgetattr(keyboard.fileno())
        attributes[tty.LFLAG] |= termios.ISIG
        attributes[tty.CC][termios.VINTR] = _NO_CHARACTER
        attributes[tty.CC][termios.VSUSP] = _NO_CHARACTER
        termios.tcsetattr(keyboard.fileno(), termios.TCSANOW, attributes)
        yield
