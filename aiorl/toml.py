"""TOML in and out: files and overrides to nested tables, values to the text that would stand in a file."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import tomlkit

from aiorl.errors import ConfigError, Fault

OVERRIDE: Final = "--set"
"""The source of a fault in an override."""


def join(path: str, name: str) -> str:
    """The TOML path of ``name`` below ``path``."""
    return f"{path}.{name}" if path else name


def literal(value: object) -> str:
    """``value`` as it would stand in a TOML file, on one line; None is ``"none"``."""
    if value is None:
        return '"none"'
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{key_literal(key)} = {literal(item)}" for key, item in value.items()) + " }"
            if value
            else "{}"
        )
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(literal(item) for item in value)}]"
    try:
        return str(tomlkit.item(value).as_string())
    except ValueError:
        return repr(value)


def key_literal(key: str) -> str:
    """``key`` as it would stand in a TOML file, quoted where it must be."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else literal(key)


def parse_file(path: str | Path) -> dict[str, Any]:
    """Reads a TOML file on the calling thread.

    Raises:
        ConfigError: If it cannot be read, is not UTF-8 or is not TOML.
    """
    path = Path(path)
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        siblings = sorted(file.name for file in path.parent.glob("*.toml"))
        nearest = difflib.get_close_matches(path.name, siblings, n=1)
        raise _file_error(path, "does not exist", f'did you mean "{nearest[0]}"?' if nearest else "") from error
    except IsADirectoryError as error:
        raise _file_error(path, "is a folder", "name the TOML file in it") from error
    except OSError as error:
        raise _file_error(path, f"cannot be read: {error.strerror}", "") from error
    except UnicodeDecodeError as error:
        raise _file_error(path, f"is not UTF-8 (byte {error.start})", "save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise _file_error(path, f"is not valid TOML: {error}", "correct it there") from error


def _file_error(path: Path, message: str, remedy: str) -> ConfigError:
    return ConfigError([Fault(str(path), message, remedy=remedy)])


def parse_override(text: str) -> tuple[list[str], Any]:
    """Splits ``a.b=value`` into the steps of its path and its value.

    The value is in TOML syntax; a bare word that is none, as in ``trainer.exp_name=fast``, is taken as a string.

    Raises:
        ConfigError: If there is no path, or the value is a list, table or quoted string that does not end.
    """
    key, equals, value = text.partition("=")
    steps: list[str] = []
    try:
        nested: Any = tomllib.loads(f"{key} = 0") if equals and "\n" not in key else {}
    except tomllib.TOMLDecodeError:
        nested = {}
    while isinstance(nested, dict) and len(nested) == 1:
        ((step, nested),) = nested.items()
        steps.append(step)
    if not steps:
        remedy = "write KEY=VALUE, as in trainer.seed=1"
        raise ConfigError([Fault(text, "is no override", remedy=remedy, source=OVERRIDE)])
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError as error:
        if value.strip()[:1] in {"", "[", "{", '"', "'"}:
            remedy = 'write a number, true, "text", [1, 2], ...'
            raise ConfigError([Fault(".".join(steps), "is no TOML value", value, remedy, OVERRIDE)]) from error
        return steps, value.strip()
    return steps, parsed["value"] if len(parsed) == 1 else value


def put(table: dict[str, Any], steps: list[str], value: Any, source: str) -> None:
    """Sets a value deep in nested tables, making those that are missing.

    Args:
        table: The outermost table, changed in place.
        steps: The path of the value.
        value: The value.
        source: Where it came from, for the message.

    Raises:
        ConfigError: If something on the way is no table.
    """
    for depth, step in enumerate(steps[:-1], start=1):
        table = table.setdefault(step, {})
        if not isinstance(table, dict):
            path = ".".join(steps[:depth])
            message = f"is below {path}, which is no table"
            raise ConfigError([Fault(".".join(steps), message, literal(value), f"set {path} itself", source)])
    table[steps[-1]] = value
