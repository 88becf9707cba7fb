from __future__ import annotations

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from aiorl.monitoring.terminal import NameCompleter


class Inner:
    depth = 1


class Run:
    inner = Inner()
    _private = 0

    @property
    def broken(self) -> int:
        raise RuntimeError("not now")

    def statistics(self) -> None: ...

    def set(self) -> None: ...


@pytest.mark.parametrize(
    ("before_cursor", "expected"),
    [
        ("ru", ["run"]),
        ("", ["asyncio", "run"]),
        ("await run.s", ["set", "statistics"]),
        ("f(run.inner.d", ["depth"]),
        ("run._p", ["_private"]),
        ("run.broken.x", []),
        ("run.missing.x", []),
        ("nobody.x", []),
        ("1 + ", ["asyncio", "run"]),
        ("run.nothing_like_it", []),
    ],
)
def test_names_and_attributes_are_completed(before_cursor: str, expected: list[str]) -> None:
    completer = NameCompleter({"run": Run(), "asyncio": None, "_hidden": 1})
    found = list(completer.get_completions(Document(before_cursor), CompleteEvent()))
    assert [completion.text for completion in found] == expected
    for completion in found:
        assert before_cursor.endswith(completion.text[: -completion.start_position])
