"""A section: one table of the configuration, declared beside the component that it configures.

A section is a frozen pydantic model. Its fields carry their bounds, a one-line meaning (``Field(description=...)``,
which feeds the reference page and the JSON schema) and, where they need it, two marks:

- ``not_yet("mixed precision")``: the machinery behind the field does not exist yet, so that anything but its default
  is refused rather than ignored;
- ``MAY_DIFFER``: a run that is resumed may have another value here and still be the same run.

Rules over several fields are methods marked with ``@rule``. They report what they find instead of raising, so that
``aiorl.config`` can list them together with the faults of single fields; a section that is constructed directly raises
``pydantic.ValidationError`` for both.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import math
import re
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Final, Self, TypeAlias, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from aiorl.errors import AiorlError, ConfigError, Fault

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic.fields import FieldInfo

COLLECT: Final = {"aiorl": "collect"}
"""Validation context in which a section's rules are left to the caller, who reports them together."""

MODULE_NAME: Final = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
"""Regular expression of ``module:Name``."""

_MOST_FRAMES: Final = 4  # of a traceback in a message: the end says what failed, and where


@dataclass(frozen=True, slots=True)
class NotYet:
    """Marks a field whose machinery, or part of it, is not available yet.

    Attributes:
        what: What is missing, for the reference page.
        values: Patterns (``fnmatch``) of the strings that are refused; empty where everything but the default is.
    """

    what: str
    values: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The mark as a sentence for editors and the reference page."""
        if not self.values:
            return f"Not available yet ({self.what})."
        return f"Not available yet: {' or '.join(self.values)} ({self.what})."

    def refuses(self, raw: object) -> bool:
        """Whether one of the named strings stands in the file."""
        return isinstance(raw, str) and any(fnmatchcase(raw, pattern) for pattern in self.values)


def not_yet(what: str, *values: str) -> NotYet:
    """The mark of a field that refuses every value but its default, or only the named string values."""
    return NotYet(what, values)


@dataclass(frozen=True, slots=True)
class MayDiffer:
    """Marks a field that may have changed when a run is resumed."""


MAY_DIFFER: Final = MayDiffer()

Breach: TypeAlias = tuple[str, str]
"""What a rule found: what is wrong with its first field, and what to do about it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What ``@rule`` leaves on a method.

    Attributes:
        fields: Dotted paths below the section of the fields that the rule looks at; the first is the one blamed.
    """

    fields: tuple[str, ...]


SectionT = TypeVar("SectionT", bound="Section")


def rule(*fields: str) -> Callable[[Callable[[SectionT], Breach | None]], Callable[[SectionT], Breach | None]]:
    """Mark a method of a section as a rule over ``fields``; it answers None where the rule is kept."""

    def mark(method: Callable[[SectionT], Breach | None]) -> Callable[[SectionT], Breach | None]:
        method.__aiorl_rule__ = Rule(fields)  # type: ignore[attr-defined]
        return method

    return mark


def is_optional(field: FieldInfo) -> bool:
    """Whether the field takes None, written ``"none"`` in TOML."""
    return NoneType in get_args(field.annotation)


def mark_of(field: FieldInfo) -> NotYet | None:
    """The field's ``not_yet`` mark."""
    return next((mark for mark in field.metadata if isinstance(mark, NotYet)), None)


def may_differ(field: FieldInfo) -> bool:
    """Whether the field is marked ``MAY_DIFFER``."""
    return MAY_DIFFER in field.metadata


class Section(BaseModel):
    """One table of the configuration.

    Values are taken strictly (a bool is no int, ``1.0`` is no int, an int is a float), the string ``"none"`` means
    None where a field is optional, a list stands for a tuple, and infinite numbers are refused unless a field says
    otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="wrap")
    @classmethod
    def _as_in_toml(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Translate TOML's ways of writing None and tuples, and refuse what is not available yet."""
        field = cls.model_fields[info.field_name or ""]
        mark = mark_of(field)
        if mark is not None and mark.refuses(value):
            raise PydanticCustomError("not_yet", "not available yet")
        if isinstance(value, str) and value == "none" and is_optional(field):
            value = None
        elif isinstance(value, list):
            value = tuple(value)
        result = handler(value)
        if mark is not None and not mark.values and result != field.get_default(call_default_factory=True):
            raise PydanticCustomError("not_yet", "not available yet")
        return result

    @model_validator(mode="after")
    def _keeps_its_rules(self, info: ValidationInfo) -> Self:
        """Hold a section that is constructed directly to its rules."""
        if info.context != COLLECT:
            broken = [f"{fields[0]} {message}; {remedy}" for fields, (message, remedy) in self.breaches()]
            if broken:
                raise PydanticCustomError("rule", "{broken}", {"broken": " / ".join(broken)})
        return self

    def breaches(self) -> Iterator[tuple[tuple[str, ...], Breach]]:
        """The section's own rules that are broken, each with the fields that it looked at."""
        for name in dir(type(self)):
            mark = getattr(getattr(type(self), name, None), "__aiorl_rule__", None)
            if isinstance(mark, Rule):
                breach = getattr(self, name)()
                if breach is not None:
                    yield mark.fields, breach

    def values(self) -> dict[str, Any]:
        """The value of every field by name, and of the further keys of a section that takes any."""
        return {name: getattr(self, name) for name in type(self).model_fields} | (self.model_extra or {})

    @classmethod
    def variant(cls, table: Mapping[str, Any]) -> type[Section]:
        """The class that reads ``table``: this one, unless a table's ``name`` chooses among several.

        Raises:
            UnknownName: If the name that chooses is unknown or cannot be imported.
        """
        return cls


def _toml_value(value: Any) -> Any:
    """Let through what TOML and msgpack both can write."""
    if isinstance(value, (str, bool)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, (list, tuple)):
        return [_toml_value(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _toml_value(item) for key, item in value.items()}
    raise PydanticCustomError("toml_value", "should be made of numbers, strings, booleans, lists and tables")


TomlValue: TypeAlias = Annotated[Any, AfterValidator(_toml_value)]
"""A free-form value: finite numbers, strings, booleans, lists and tables of them."""


class UnknownName(ValueError):
    """A table's ``name`` chooses nothing that exists.

    Attributes:
        message: What is wrong.
        remedy: What to do about it.
    """

    def __init__(self, message: str, remedy: str) -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(f"{message}; {remedy}")


def choose_variant(
    table: Mapping[str, Any],
    *,
    built_in: Mapping[str, type[SectionT]],
    default: str,
    base: type[SectionT],
    fallback: type[SectionT],
) -> type[SectionT]:
    """The section class that a table's ``name`` chooses.

    Args:
        table: The table as it stands in the file.
        built_in: What is called by a plain name.
        default: The name of a table that has none.
        base: What the ``Config`` of a class of the user's own must be derived from.
        fallback: The section of a class that declares no ``Config``.

    Raises:
        UnknownName: If the name is none of ``built_in`` and cannot be imported, or its ``Config`` is of another kind.
    """
    name = table.get("name", default)
    if not isinstance(name, str):
        return built_in[default]
    if ":" not in name:
        if name in built_in:
            return built_in[name]
        remedy = f"{suggestion(name, list(built_in))} (or write the module:Name of a class of your own)"
        raise UnknownName("is unknown", remedy)
    config = getattr(load_object(name), "Config", base)
    if not (isinstance(config, type) and issubclass(config, base)):
        raise UnknownName(
            f"declares a Config that is no {base.__name__}", f"derive it from {base.__module__}.{base.__name__}"
        )
    return fallback if config is base else config


def load_object(name: str) -> Any:
    """Import ``module:Name``, where Name may be dotted.

    Raises:
        UnknownName: If it has another form, if the module cannot be imported, whatever it raised, or has no such name.
    """
    if re.fullmatch(MODULE_NAME, name) is None:
        raise UnknownName("is not of the form module:Name", "write a module's name, a colon and a name in it")
    module_name, _, attributes = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise UnknownName(
            f"cannot be imported: {type(error).__name__}: {error}", "see that its folder is on the import path"
        ) from error
    try:
        return functools.reduce(getattr, attributes.split("."), found)
    except AttributeError as error:
        names = sorted(public for public in vars(found) if not public.startswith("_"))
        raise UnknownName(f"names nothing in module {module_name}", suggestion(attributes, names)) from error


@contextmanager
def translated(path: str, name: str, failing: str) -> Iterator[None]:
    """Turns what the user's code raises within into a fault on ``path`` that tells where it was raised.

    What aiorl raises on purpose passes as it is.

    Args:
        path: TOML path of the name under which that code was found.
        name: That name.
        failing: What cannot be done.

    Raises:
        ConfigError: The code within raised.
    """
    try:
        yield
    except AiorlError:
        raise
    except (Exception, SystemExit) as error:
        line = traceback.format_exception_only(error)[-1].strip()
        frames = traceback.extract_tb(error.__traceback__)[2:]  # without this one and the caller's
        text = "".join(traceback.format_list(frames[-_MOST_FRAMES:])).rstrip()
        told = "\n" + textwrap.indent(text, "    ") if text else ""
        raise ConfigError([Fault(path, f"{failing}: {line}{told}", f'"{name}"')]) from error


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that ``name`` may be a misspelling of; None where none is near."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def suggestion(name: str, known: Sequence[str]) -> str:
    """A remedy for a misspelt name: the nearest known one, or else all of them."""
    meant = nearest(name, known)
    if meant is not None:
        return f'did you mean "{meant}"?'
    return f"known are {', '.join(known)}" if known else "leave it out"
