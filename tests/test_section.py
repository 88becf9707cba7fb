"""Sections take values strictly, in TOML's spelling, and refuse what is not available yet."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from aiorl.section import (
    COLLECT,
    MAY_DIFFER,
    Breach,
    Section,
    UnknownName,
    choose_variant,
    load_object,
    may_differ,
    not_yet,
    rule,
    suggestion,
)

if TYPE_CHECKING:
    from pathlib import Path


class Engine(Section):
    cylinders: int = Field(4, ge=1)
    power: float = 1.0
    turbo: bool = False
    fuel: str = "petrol"
    gears: tuple[int, ...] = (1, 2)
    limit: float | None = None
    label: str | None = None
    ratio: Annotated[float, MAY_DIFFER] = Field(1.0, allow_inf_nan=True)
    electric: Annotated[bool, not_yet("batteries")] = False
    drive: Annotated[Literal["rear", "front", "four"], not_yet("four-wheel drive", "four")] = "rear"
    size: Annotated[int, not_yet("measuring", "auto", "auto:*")] = 3

    @rule("cylinders", "power")
    def _power_needs_cylinders(self) -> Breach | None:
        return ("are too few", "add some") if self.power > 100.0 * self.cylinders else None

    @rule("power")
    def _power_is_no_teapot(self) -> Breach | None:
        return ("is a teapot's", "brew coffee") if self.power == 418.0 else None


@pytest.mark.parametrize(
    ("values", "field", "kind"),
    [
        ({"cylinders": True}, "cylinders", "int_type"),
        ({"cylinders": 2.0}, "cylinders", "int_type"),
        ({"cylinders": "2"}, "cylinders", "int_type"),
        ({"cylinders": "none"}, "cylinders", "int_type"),
        ({"cylinders": 0}, "cylinders", "greater_than_equal"),
        ({"power": True}, "power", "float_type"),
        ({"power": math.inf}, "power", "finite_number"),
        ({"power": math.nan}, "power", "finite_number"),
        ({"turbo": 1}, "turbo", "bool_type"),
        ({"turbo": "true"}, "turbo", "bool_type"),
        ({"fuel": 3}, "fuel", "string_type"),
        ({"gears": 3}, "gears", "tuple_type"),
        ({"gears": [1, "2"]}, "gears", "int_type"),
        ({"colour": "red"}, "colour", "extra_forbidden"),
        ({"electric": True}, "electric", "not_yet"),
        ({"drive": "four"}, "drive", "not_yet"),
        ({"drive": "none"}, "drive", "literal_error"),
        ({"size": "auto"}, "size", "not_yet"),
        ({"size": "auto:3"}, "size", "not_yet"),
        ({"size": "big"}, "size", "int_type"),
    ],
)
def test_refuses(values: dict[str, Any], field: str, kind: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Engine(**values)
    (error,) = caught.value.errors()
    assert (error["loc"][0], error["type"]) == (field, kind)


def test_takes_the_spelling_of_toml() -> None:
    values: dict[str, Any] = {"power": 3, "gears": [1, 2, 3], "limit": "none", "label": "none", "fuel": "none"}
    engine = Engine(**values)
    assert (engine.power, engine.gears, engine.limit, engine.label) == (3.0, (1, 2, 3), None, None)
    assert isinstance(engine.power, float)
    assert engine.fuel == "none", "only optional fields can be none"
    assert math.isinf(Engine(ratio=math.inf).ratio)


def test_what_is_not_available_yet_may_be_written_with_its_default() -> None:
    assert Engine(electric=False, drive="front", size=5).size == 5


def test_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Engine().cylinders = 3  # type: ignore[misc]


def test_direct_construction_keeps_the_rules_and_names_every_broken_one() -> None:
    with pytest.raises(ValidationError) as caught:
        Engine(power=418.0)
    assert "cylinders are too few; add some" in str(caught.value)
    assert "power is a teapot's; brew coffee" in str(caught.value)


def test_a_collecting_reader_gets_a_section_and_looks_at_its_rules_itself() -> None:
    engine = Engine.model_validate({"power": 418.0}, context=COLLECT)
    assert sorted(engine.breaches()) == [
        (("cylinders", "power"), ("are too few", "add some")),
        (("power",), ("is a teapot's", "brew coffee")),
    ]


def test_marks_are_found() -> None:
    assert may_differ(Engine.model_fields["ratio"])
    assert not may_differ(Engine.model_fields["power"])


class Animal(Section):
    name: str = "custom"


class Dog(Animal):
    name: str = "dog"


class Open(Animal, extra="allow"):
    pass


BUILT_IN = {"dog": Dog}


def choose(table: dict[str, Any]) -> type[Animal]:
    return choose_variant(table, built_in=BUILT_IN, default="dog", base=Animal, fallback=Open)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of a user's own, under a name that no other test uses."""
    name = f"zoo_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        "from aiorl.section import Section\n"
        "class Plain: pass\n"
        "class Nest:\n"
        "    class Bird: pass\n"
        "class Wrong:\n"
        "    class Config(Section): pass\n"
    )
    (tmp_path / f"{name}_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_name_chooses_the_section(zoo: str) -> None:
    assert choose({}) is Dog
    assert choose({"name": "dog"}) is Dog
    assert choose({"name": f"{zoo}:Plain"}) is Open
    assert choose({"name": 3}) is Dog, "a name of the wrong type is a fault of its field"


@pytest.mark.parametrize(
    ("name", "message", "remedy"),
    [
        ("dgo", "is unknown", 'did you mean "dog"? (or write the module:Name of a class of your own)'),
        ("{zoo}:Plane", "names nothing in module {zoo}", 'did you mean "Plain"?'),
        ("{zoo}_broken:Plain", "cannot be imported: ZeroDivisionError: division by zero", "see that"),
        (
            "{zoo}_absent:Plain",
            "cannot be imported: ModuleNotFoundError: No module named '{zoo}_absent'",
            "import path",
        ),
        ("{zoo}:Wrong", "declares a Config that is no Animal", "derive it from"),
        (":Plain", "is not of the form module:Name", "write"),
        ("{zoo}:", "is not of the form module:Name", "write"),
    ],
)
def test_a_name_that_chooses_nothing_says_why(zoo: str, name: str, message: str, remedy: str) -> None:
    with pytest.raises(UnknownName) as caught:
        choose({"name": name.format(zoo=zoo)})
    assert caught.value.message == message.format(zoo=zoo)
    assert remedy in caught.value.remedy


def test_names_may_be_dotted(zoo: str) -> None:
    assert load_object(f"{zoo}:Nest.Bird").__qualname__ == "Nest.Bird"
    assert load_object("os.path:join").__name__ == "join"


def test_suggestions() -> None:
    assert suggestion("cylindres", ["cylinders", "power"]) == 'did you mean "cylinders"?'
    assert suggestion("xyz", ["cylinders", "power"]) == "known are cylinders, power"
    assert suggestion("xyz", []) == "leave it out"
