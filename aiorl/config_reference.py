"""The reference page of the configuration, written from the sections themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from aiorl.config import built_in_tables
from aiorl.models.config import MODELS
from aiorl.section import is_optional, mark_of, may_differ
from aiorl.tasks.config import TASKS
from aiorl.toml import literal
from aiorl.validation import section_of

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from aiorl.section import Section

_HEAD = """\
# Configuration

A configuration is a TOML file. Every table and every field may be left out, but for `num_epoch_samples` where
`[trainer.sampling]` is written. `--set a.b=value` overrides a field on the command line, the value in TOML syntax; a
bare word is taken as a string. Where a field may be none, write `"none"`. Times are in seconds, sizes in bytes, as
plain numbers.

`python -m aiorl check CONFIG` validates a file and prints it with every field written out; everything that is wrong
with it is reported at once. `python -m aiorl check --schema` prints a JSON schema from which editors complete.

Fields marked ↻ may have another value when a run is resumed; a difference in any other makes it another run, and
resuming is refused. Fields that are "not available yet" refuse to be set to anything but their default, or to the
values named.

`[task]` and `[model]` are chosen by their `name`. A `module:Name` names a class of your own, which is imported when the
file is read. If the class has a `Config`, a subclass of `aiorl.tasks.config.TaskConfig` or
`aiorl.models.config.ModelConfig`, that validates the table; a class derived from a built-in one so inherits its fields.
If it has none, every further key of the table (numbers, strings, booleans, lists and tables) is handed to it in
`config.options`.
"""

_NAMES = {int: "integer", float: "number", bool: "boolean", str: "string"}


def reference() -> str:
    """The page ``docs/configuration.md``, in Markdown: each table with its fields, types, defaults and meanings."""
    return "\n".join([_HEAD, *(_table(path, section) for path, section in _tables())])


def _tables() -> Iterator[tuple[str, type[Section]]]:
    """Every table with its TOML path and section; those that a name chooses, under each of their names."""
    named: dict[str, Mapping[str, type[Section]]] = {"task": TASKS, "model": MODELS}
    for path, section in built_in_tables():
        yield path, section
        yield from ((path, other) for other in named.get(path, {}).values() if other is not section)


def _table(path: str, section: type[Section]) -> str:
    name = section.model_fields.get("name")
    choice = f', `name = "{name.default}"`' if name is not None and path in {"task", "model"} else ""
    rows = [_row(key, field) for key, field in section.model_fields.items() if section_of(field) is None]
    meaning = (section.__doc__ or "").partition("\n")[0].replace("``", "`")
    head = ["| field | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([f"## `[{path}]`{choice}", "", meaning, "", *head, *rows, ""])


def _row(key: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{literal(field.get_default(call_default_factory=True))}`"
    mark = mark_of(field)
    meaning = f"{field.description}{f' *{mark}*' if mark is not None else ''}"
    cells = [f"`{key}`{' ↻' if may_differ(field) else ''}", _type(field), default, meaning]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _type(field: FieldInfo) -> str:
    text = _spell(field.annotation)
    bounds = _bounds(field.metadata)
    if is_optional(field):
        return f'{text}{bounds} or `"none"`'
    return text + bounds


def _spell(annotation: Any) -> str:
    """A type in words; None is left to the caller."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [item for mark in arguments[1:] for item in getattr(mark, "metadata", [mark])]
        return _spell(arguments[0]) + _bounds(bounds)
    if origin in {Union, UnionType}:
        return " or ".join(_spell(argument) for argument in arguments if argument is not NoneType)
    if origin is Literal:
        return " or ".join(f"`{literal(choice)}`" for choice in arguments)
    if origin is tuple:
        items = [argument for argument in arguments if argument is not ...]
        noun, _, limits = _spell(items[0]).partition(" ")
        return f"list of {'' if ... in arguments else f'{len(items)} '}{noun}s {limits}".rstrip()
    if origin is Mapping:
        return "table"
    return _NAMES[annotation]


def _bounds(metadata: list[Any]) -> str:
    signs = (("ge", Ge, "≥"), ("gt", Gt, ">"), ("le", Le, "≤"), ("lt", Lt, "<"))
    found = [
        f"{sign} {getattr(mark, attribute):g}"
        for mark in metadata
        for attribute, kind, sign in signs
        if isinstance(mark, kind) and getattr(mark, attribute) != 2**63 - 1
    ]
    return f" {', '.join(found)}" if found else ""
