"""From tables to sections: every fault is found and listed, none hides another.

`Reader.section` validates a table twice where it must: the second time without the keys that were faulty, so that a
section stands and the rules over several fields can be looked at too. A rule that touches a faulty field is left out,
since what it would say follows from the fault. Rules are looked at last, by `Reader.rules`, when the whole tree stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import ValidationError

from aiorl.errors import Fault
from aiorl.section import COLLECT, Section, UnknownName, is_optional, mark_of, nearest, suggestion
from aiorl.toml import join, literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

_LONGEST_VALUE = 80

_MESSAGES = {
    "int_type": "should be an integer",
    "float_type": "should be a number",
    "bool_type": "should be true or false",
    "string_type": "should be a string",
    "tuple_type": "should be a list",
    "dict_type": "should be a table",
    "mapping_type": "should be a table",
    "finite_number": "should be finite",
    "greater_than": "should be above {gt}",
    "greater_than_equal": "should be at least {ge}",
    "less_than": "should be below {lt}",
    "less_than_equal": "should be at most {le}",
    "string_too_short": "should not be empty",
    "string_pattern_mismatch": "has not the form that is asked for",
    "missing": "is required",
}


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section class of a field that is a table; None where the field is a value."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def choices_of(annotation: Any) -> list[str]:
    """The strings that an annotation names with ``Literal``."""
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    return [choice for argument in get_args(annotation) for choice in choices_of(argument)]


class Reader:
    """Reads tables into sections and gathers every fault on the way.

    Attributes:
        faults: What was found so far.
    """

    def __init__(self, *, source_of: Callable[[str], str], homes: Mapping[str, str]) -> None:
        """Prepares to read.

        Args:
            source_of: Where the value of a TOML path came from.
            homes: For each field's bare name, the table that it belongs into.
        """
        self.faults: list[Fault] = []
        self._faulty: set[str] = set()
        self._source_of = source_of
        self._homes = homes

    def section(self, declared: type[Section], table: Mapping[str, Any], path: str) -> Section | None:
        """Reads one table and the tables in it.

        Args:
            declared: The section's class, or the base of the classes that the table's ``name`` chooses from.
            table: The table as parsed from TOML.
            path: Its TOML path.

        Returns:
            The section, with defaults in place of what is faulty; None where even that cannot be built.
        """
        try:
            cls = declared.variant(table)
        except UnknownName as error:
            self._add(join(path, "name"), error.message, table.get("name"), error.remedy)
            cls = declared
            table = {key: value for key, value in table.items() if key in cls.model_fields and key != "name"}
        values: dict[str, Any] = {}
        for key, value in table.items():
            where = join(path, key)
            field = cls.model_fields.get(key)
            inner = section_of(field) if field is not None else None
            if field is None and cls.model_config.get("extra") != "allow":
                self._add(where, "is unknown", value, self._remedy_for_unknown(cls, path, key))
            elif inner is None:
                values[key] = value
            elif not isinstance(value, Mapping):
                self._add(where, "should be a table", value, f"write its fields under [{where}]")
            elif (section := self.section(inner, value, where)) is not None:
                values[key] = section
        try:
            return cls.model_validate(values, context=COLLECT)
        except ValidationError as error:
            for key in self._field_faults(cls, error.errors(), values, path):
                values.pop(key, None)
                examples = cls.model_fields[key].examples if key in cls.model_fields else None
                if examples:
                    values[key] = examples[0]
        try:
            return cls.model_validate(values, context=COLLECT)
        except ValidationError:
            self._faulty.add(path)
            return None

    def rules(self, section: Section, path: str) -> None:
        """Looks at the rules of a section and of the sections in it, as far as no faulty field is in their way."""
        broken: list[tuple[str, str, object, str]] = []
        self._collect_breaches(section, path, broken)
        for breach in broken:
            self._add(*breach)

    def _collect_breaches(self, section: Section, path: str, broken: list[tuple[str, str, object, str]]) -> None:
        for name in type(section).model_fields:
            inner = getattr(section, name)
            if isinstance(inner, Section):
                self._collect_breaches(inner, join(path, name), broken)
        for fields, (message, remedy) in section.breaches():
            paths = [join(path, field) for field in fields]
            if not any(self._is_faulty(touched) for touched in paths):
                broken.append((paths[0], message, _value_at(section, fields[0]), remedy))

    def _is_faulty(self, path: str) -> bool:
        return any(path == faulty or path.startswith(f"{faulty}.") for faulty in self._faulty)

    def _add(self, path: str, message: str, value: object = None, remedy: str = "", *, show: bool = True) -> None:
        text = None if not show or isinstance(value, Mapping) else literal(value)
        if text is not None and len(text) > _LONGEST_VALUE:
            text = f"{text[: _LONGEST_VALUE - 1]}…"
        self._faulty.add(path.partition("[")[0])
        self.faults.append(Fault(path, message, text, remedy, self._source_of(path)))

    def _remedy_for_unknown(self, cls: type[Section], path: str, key: str) -> str:
        home = self._homes.get(key, path)
        if home != path:
            return f"it belongs into [{home}]"
        return suggestion(key, list(cls.model_fields))

    def _field_faults(
        self, cls: type[Section], errors: Sequence[ErrorDetails], values: Mapping[str, Any], path: str
    ) -> Iterator[str]:
        """Add a fault for each place where pydantic found something; yields the faulty keys."""
        found: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
        for error in errors:
            found.setdefault(_place(error, values), []).append(error)
        for place, here in found.items():
            key = str(place[0]) if place else ""
            field = cls.model_fields.get(key)
            missing = here[0]["type"] == "missing" and len(here[0]["loc"]) == 1
            where = path if not key else join(path, key)
            steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place[1:])
            message, remedy = _message(here, field), _remedy(here, field, missing=missing)
            self._add(where + steps, message, here[0]["input"], remedy, show=bool(key) and not missing)
            self._faulty.add(where)
            if key:
                yield key


def _place(error: ErrorDetails, values: Mapping[str, Any]) -> tuple[str | int, ...]:
    """The field, then indices and keys into its value, without the names that pydantic gives to members of a union."""
    place: list[str | int] = list(error["loc"][:1])
    value: Any = values.get(str(place[0])) if place else None
    for step in error["loc"][1:]:
        try:
            value = value[step]
        except (TypeError, LookupError):
            break
        place.append(step)
    return tuple(place)


def _message(errors: Sequence[ErrorDetails], field: FieldInfo | None) -> str:
    """What is wrong in one place; the members of a union each say what they want."""
    messages = list(dict.fromkeys(_single_message(error, field) for error in errors))
    if field is not None and is_optional(field) and errors[0]["type"].endswith(("_type", "literal_error")):
        messages.append('"none"')
    return " or ".join([messages[0], *(other.removeprefix("should be ") for other in messages[1:])])


def _single_message(error: ErrorDetails, field: FieldInfo | None) -> str:
    kind = error["type"]
    if kind == "literal_error":
        choices = choices_of(field.annotation) if field is not None else []
        return f"should be {' or '.join(literal(choice) for choice in choices)}"
    if (kind == "missing" and len(error["loc"]) > 1) or kind == "too_long":
        return f"should have {len(get_args(field.annotation)) if field is not None else 'other'} items"
    if kind in _MESSAGES:
        return _MESSAGES[kind].format(**error.get("ctx", {}))
    return error["msg"].removeprefix("Value error, ").removeprefix("Input ")


def _remedy(errors: Sequence[ErrorDetails], field: FieldInfo | None, *, missing: bool) -> str:
    kinds, value = {error["type"] for error in errors}, errors[0]["input"]
    if field is None:
        return "leave it out"
    if missing:
        return f"set it, for example to {literal(field.examples[0])}" if field.examples else "set it"
    if field.is_required():
        return f"for example {literal(field.examples[0])}" if field.examples else ""
    default = literal(field.get_default(call_default_factory=True))
    if "not_yet" in kinds:
        mark = mark_of(field)
        return f"leave it at its default, {default}" + (f" (to come: {mark.what})" if mark is not None else "")
    if "string_pattern_mismatch" in kinds and field.description is not None:
        return f"it means: {field.description}"
    meant = nearest(value, choices_of(field.annotation)) if isinstance(value, str) else None
    if meant is not None:
        return f'did you mean "{meant}"?'
    return f"the default is {default}"


def _value_at(section: Section, path: str) -> object:
    value: object = section
    for name in path.split("."):
        value = getattr(value, name)
    return value
