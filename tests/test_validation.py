"""Every fault of a table is found in one reading, each with its path, value and remedy."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from aiorl.errors import Fault
from aiorl.section import Breach, Section, TomlValue, not_yet, rule
from aiorl.validation import Reader


class Wheel(Section):
    radius: float = Field(gt=0.0, examples=[0.3])
    spokes: int = 20

    @rule("spokes", "radius")
    def _spokes_fit(self) -> Breach | None:
        return ("are too many", "take fewer") if self.spokes > 100 * self.radius else None


class Bell(Section):
    tones: tuple[Annotated[int, Field(ge=1)], ...] = (1,)
    pair: tuple[int, int] = (1, 2)
    rings: Annotated[int, Field(ge=1)] | Literal["often", "seldom"] | None = None
    extras: dict[str, TomlValue] = {}  # noqa: RUF012 (pydantic copies defaults)
    mark: str = Field("x", pattern="^[a-z]$", description="One small letter.")
    loud: Annotated[bool, not_yet("amplifiers")] = False


class Strict(Section):
    tightness: int

    @model_validator(mode="after")
    def _of_the_old_school(self) -> Strict:
        if self.tightness > 3:
            raise ValueError("too tight")
        return self


class Bicycle(Section):
    wheel: Wheel = Field(default_factory=lambda: Wheel(radius=0.3))
    bell: Bell = Field(default_factory=Bell)
    strict: Strict = Field(default_factory=lambda: Strict(tightness=1))
    speed: float = 1.0

    @rule("speed", "wheel.radius")
    def _wheels_keep_up(self) -> Breach | None:
        return ("is too fast", "slow down") if self.speed > 100 * self.wheel.radius else None

    @rule("speed", "wheel.spokes")
    def _wheels_stay_whole(self) -> Breach | None:
        return ("is too fast for such spokes", "slow down") if self.speed * self.wheel.spokes > 100_000 else None


def read(table: dict[str, Any]) -> list[Fault]:
    reader = Reader(source_of=lambda _: "", homes={"spokes": "wheel", "speed": ""})
    section = reader.section(Bicycle, table, "")
    assert section is not None
    reader.rules(section, "")
    return reader.faults


def test_a_faultless_table() -> None:
    assert read({"wheel": {"radius": 1}, "bell": {"tones": [1, 2], "rings": "often"}, "strict": {"tightness": 2}}) == []


def test_every_fault_is_found_at_once() -> None:
    table = {
        "bel": 1,
        "spokes": 3,
        "wheel": {"spokes": True},
        "bell": {
            "tones": [1, 0, "a"],
            "pair": [1],
            "rings": "oftn",
            "extras": {"a": {"b": None}},
            "mark": "X",
            "loud": True,
        },
        "strict": 7,
    }
    expected = [
        Fault("bel", "is unknown", "1", 'did you mean "bell"?'),
        Fault("spokes", "is unknown", "3", "it belongs into [wheel]"),
        Fault("wheel.spokes", "should be an integer", "true", "the default is 20"),
        Fault("wheel.radius", "is required", None, "set it, for example to 0.3"),
        Fault("bell.tones[1]", "should be at least 1", "0", "the default is [1]"),
        Fault("bell.tones[2]", "should be an integer", '"a"', "the default is [1]"),
        Fault("bell.pair", "should have 2 items", "[1]", "the default is [1, 2]"),
        Fault("bell.rings", 'should be an integer or "often" or "seldom" or "none"', '"oftn"', 'did you mean "often"?'),
        Fault(
            "bell.extras.a",
            "should be made of numbers, strings, booleans, lists and tables",
            None,
            "the default is {}",
        ),
        Fault("bell.mark", "has not the form that is asked for", '"X"', "it means: One small letter."),
        Fault("bell.loud", "not available yet", "true", "leave it at its default, false (to come: amplifiers)"),
        Fault("strict", "should be a table", "7", "write its fields under [strict]"),
    ]
    assert sorted(read(table), key=str) == sorted(expected, key=str)


def test_lists_of_the_wrong_length() -> None:
    (fault,) = read({"bell": {"pair": [1, 2, 3]}})
    assert (fault.path, fault.message, fault.value) == ("bell.pair", "should have 2 items", "[1, 2, 3]")


def test_rules_are_looked_at_beside_other_faults() -> None:
    faults = read({"speed": 99.0, "bell": {"pair": 3}, "wheel": {"radius": 0.1, "spokes": 50}})
    assert sorted(faults, key=str) == sorted(
        [
            Fault("bell.pair", "should be a list", "3", "the default is [1, 2]"),
            Fault("speed", "is too fast", "99.0", "slow down"),
            Fault("wheel.spokes", "are too many", "50", "take fewer"),
        ],
        key=str,
    )


def test_a_broken_rule_hides_no_other() -> None:
    faults = read({"speed": 99.0, "wheel": {"radius": 0.1, "spokes": 2000}})
    assert [fault.message for fault in faults] == ["are too many", "is too fast", "is too fast for such spokes"]


def test_a_rule_that_touches_a_faulty_field_is_left_out() -> None:
    assert [fault.path for fault in read({"speed": 99.0, "wheel": {"radius": -1, "spokes": 500}})] == ["wheel.radius"]
    assert [fault.path for fault in read({"speed": 99.0, "wheel": 3})] == ["wheel"]


def test_a_section_that_cannot_be_built_at_all_hides_no_other_fault() -> None:
    faults = read({"strict": {"tightness": 9}, "speed": 99.0, "bell": {"pair": 3}})
    assert [(fault.path, fault.message) for fault in faults] == [
        ("strict", "too tight"),
        ("bell.pair", "should be a list"),
        ("speed", "is too fast"),
    ]
    faults = read({"strict": {}, "speed": 99.0})
    assert [str(fault) for fault in faults] == [
        "strict.tightness: is required; set it",
        "speed = 99.0: is too fast; slow down",
    ]


def test_long_values_are_cut() -> None:
    (fault,) = read({"bell": {"mark": "x" * 1000}})
    assert fault.value is not None
    assert len(fault.value) == 80
    assert fault.value.endswith("…")
