"""What is written from a configuration: resolved TOML, the differences that make another run, and the JSON schema."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorl.config import Config, Difference, differences, json_schema, load_config, to_toml, with_values
from aiorl.tasks.config import OpenTaskConfig

CONFIGS = Path(__file__).parent.parent / "configs"


def schema_accepts(value: Any, schema: dict[str, Any], definitions: dict[str, Any]) -> bool:
    """Whether a JSON schema, of the keywords that ours uses, accepts a value parsed from TOML."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    integer = isinstance(value, int) and not isinstance(value, bool)
    types = {
        "object": isinstance(value, dict), "array": isinstance(value, list), "string": isinstance(value, str),
        "number": number, "integer": integer, "boolean": isinstance(value, bool),
    }  # fmt: skip

    def accepts(inner: dict[str, Any], item: Any) -> bool:
        return schema_accepts(item, inner, definitions)

    for keyword, wanted in schema.items():
        match keyword:
            case "$ref":
                kept = accepts(definitions[wanted.removeprefix("#/definitions/")], value)
            case "allOf":
                kept = all(accepts(inner, value) for inner in wanted)
            case "anyOf":
                kept = any(accepts(inner, value) for inner in wanted)
            case "type":
                kept = types[wanted]
            case "const":
                kept = value == wanted
            case "enum":
                kept = value in wanted
            case "minimum":
                kept = not number or value >= wanted
            case "exclusiveMinimum":
                kept = not number or value > wanted
            case "maximum":
                kept = not number or value <= wanted
            case "exclusiveMaximum":
                kept = not number or value < wanted
            case "minLength":
                kept = not isinstance(value, str) or len(value) >= wanted
            case "pattern":
                kept = not isinstance(value, str) or re.search(wanted, value) is not None
            case "minItems":
                kept = not isinstance(value, list) or len(value) >= wanted
            case "maxItems":
                kept = not isinstance(value, list) or len(value) <= wanted
            case "items":
                inner = wanted if isinstance(wanted, list) else [wanted] * len(value)
                kept = all(accepts(*pair) for pair in zip(inner, value, strict=False))
            case "properties":
                kept = all(accepts(wanted[key], item) for key, item in value.items() if key in wanted)
            case "required":
                kept = all(key in value for key in wanted)
            case "additionalProperties":
                others = [item for key, item in value.items() if key not in schema.get("properties", {})]
                kept = not others if wanted is False else wanted is True or all(accepts(wanted, o) for o in others)
            case "$schema" | "definitions" | "description" | "default" | "examples" | "additionalItems":
                kept = True
            case _:
                raise AssertionError(f"the schema uses a keyword that this check does not know: {keyword}")
        if not kept:
            return False
    return True


SCHEMA = json_schema()


def schema_takes(text: str) -> bool:
    return schema_accepts(tomllib.loads(text), SCHEMA, SCHEMA["definitions"])


# ---- the round trip

names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1).filter(
    lambda text: text[0] != "." and not set(text) & set("/\\")
)
positive = st.floats(min_value=0.0, exclude_min=True, allow_infinity=False)
options = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    exp_name=names,
    target_return=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    norm_type=positive | st.just(math.inf),
    max_wait_time=st.none() | st.floats(0.0, 1e9),
    num_threads=st.just("auto") | st.integers(1, 2**40),
    kwargs=st.dictionaries(st.text(), options, max_size=4),
    hidden_sizes=st.lists(st.integers(1, 10**6), max_size=4),
    lr=positive,
)
def test_resolved_toml_reads_as_an_equal_configuration(
    tmp_path_factory: pytest.TempPathFactory,
    exp_name: str,
    target_return: float | None,
    norm_type: float,
    max_wait_time: float | None,
    num_threads: int | str,
    kwargs: dict[str, Any],
    hidden_sizes: list[int],
    lr: float,
) -> None:
    config = with_values(
        Config(),
        {
            "trainer.exp_name": exp_name,
            "trainer.target_return": target_return,
            "trainer.clip_grad_norm_type": norm_type,
            "trainer.sampling.max_wait_time": max_wait_time,
            "trainer.num_threads": num_threads,
            "task.environment.kwargs": kwargs,
            "model.hidden_sizes": hidden_sizes,
            "optimizer.lr": lr,
        },
    )
    text = to_toml(config)
    path = tmp_path_factory.getbasetemp() / "resolved.toml"
    path.write_text(text, encoding="utf-8")
    again = load_config(path)
    assert again == config
    assert to_toml(again) == text
    assert schema_takes(text)
    assert differences(config, again) == []


# ---- resuming


def test_differences_that_make_another_run_are_listed() -> None:
    before = load_config()
    after = with_values(
        before, {"task.gamma": 0.5, "trainer.seed": 2, "task.environment.kwargs": {"g": 1}, "model.hidden_sizes": [3]}
    )
    found = differences(before, after)
    assert found == [
        Difference("trainer.seed", "1337", "2"),
        Difference("task.environment.kwargs", "{}", "{ g = 1 }"),
        Difference("task.gamma", "0.99", "0.5"),
        Difference("model.hidden_sizes", "[64, 64]", "[3]"),
    ]
    assert str(found[0]) == "trainer.seed: 1337 → 2"
    assert [(dataclasses.replace(d, before=d.after, after=d.before)) for d in found] == differences(after, before)


@pytest.mark.parametrize(
    "values",
    [
        {"trainer.max_samples": 5, "trainer.max_epochs": 1, "trainer.max_steps": 1, "trainer.max_seconds": 1.0},
        {"trainer.target_return": 1.0, "trainer.exp_dir": "x", "trainer.exp_name": "y", "trainer.drain_timeout": 1.0},
        {"logger.terminal": False, "logger.tensorboard": False, "logger.interval_s": 3.0, "link.endpoint": "ipc:///x"},
        {"trainer.checkpoint.save_every_n_steps": 5, "trainer.checkpoint.only_save_most_recent": False},
        {"optimizer.lr": 0.5, "trainer.device": "cpu", "trainer.num_threads": 2, "trainer.loop": "asyncio"},
        {"trainer.sampling.max_wait_time": 1.0, "trainer.sampling.max_batch_size": 4},
        {"task.environment.env_worker_mode": "thread", "task.environment.env_cleanup_time": 1.0},
    ],
)
def test_where_when_and_how_fast_may_differ(values: dict[str, Any]) -> None:
    assert differences(load_config(), with_values(load_config(), values)) == []


LEARNING = [
    "trainer.seed", "trainer.clip_grad_norm", "trainer.clip_grad_norm_type", "trainer.sampling.num_epoch_samples",
    "trainer.sampling.min_trajectory_length", "trainer.sampling.max_trajectory_length",
    "trainer.sampling.max_policy_lag", "task.minibatch_size", "task.num_update_epochs",
    "task.environment.num_env_workers", "task.environment.envs_per_worker", "task.environment.env_seed",
    "optimizer.eps", "optimizer.weight_decay", "lr_scheduler.warmup_samples",
]  # fmt: skip


def test_what_is_learned_from_what_may_not_differ() -> None:
    for path in LEARNING:
        assert [d.path for d in differences(load_config(), with_values(load_config(), {path: 3}))] == [path]


def test_another_task_differs_in_its_name_and_its_fields() -> None:
    before, after = Config(), Config(task=OpenTaskConfig.model_validate({"name": "a:B", "depth": 3}))
    found = {difference.path: difference for difference in differences(before, after)}
    assert found["task.name"] == Difference("task.name", '"ppo"', '"a:B"')
    assert found["task.gamma"] == Difference("task.gamma", "0.99", "(absent)")
    assert found["task.depth"] == Difference("task.depth", "(absent)", "3")


# ---- the schema


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_schema_accepts_what_is_shipped(path: Path) -> None:
    assert schema_takes(path.read_text())


def test_the_schema_is_json_that_speaks_of_every_field() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    text = json.dumps(schema)
    assert set(re.findall(r'"\$ref": "#/definitions/(\w+)"', text)) <= set(schema["definitions"])
    assert '"null"' not in text
    for name, definition in schema["definitions"].items():
        for field, entry in definition["properties"].items():
            assert entry.get("description") or "$ref" in entry, f"{name}.{field}"
    device = schema["definitions"]["ReinforcementLearningTrainerConfig"]["properties"]["device"]
    assert device["description"].endswith("Not available yet: cuda or cuda:* (CUDA).")


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("", True),
        ("[trainer]\nmax_samples = 'none'\nclip_grad_norm_type = 'inf'\nnum_threads = 'auto'", True),
        ("[task]\nname = 'ppo'\ngamma = 1", True),
        ("[task]\nname = 'x.y:Z'\nanything = 1", True),
        ("[task]\ngama = 1", False),
        ("[task]\nname = 'pp'", False),
        ("[model]\nname = 'mlp'\ndepth = 3", False),
        ("[trainer]\nseed = 1.5", False),
        ("[trainer]\nseed = -1", False),
        ("[trainer.sampling]\noptimal = true", False),
        ("[optimizer]\nbetas = [0.9]", False),
        ("[optimizer]\nbetas = [0.9, 1.0]", False),
        ("[optimizer]\nlr = 'none'", False),
        ("[model]\nactivation = 'tahn'", False),
        ("[trainr]", False),
    ],
)
def test_the_schema_accepts_what_the_loader_does(text: str, accepted: bool) -> None:
    assert schema_takes(text) is accepted
