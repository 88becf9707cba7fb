"""The whole configuration: TOML to a frozen, typed `Config`, and back.

Each table is a section that its component declares (``learning/config.py``, ``sampling/config.py``, ...); this module
composes them, reads files and overrides, and writes resolved TOML and the JSON schema that editors complete from. The
rules between tables stand here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field
from pydantic.json_schema import models_json_schema

from aiorl.environments.config import LinkConfig
from aiorl.errors import ConfigError, Fault
from aiorl.learning.config import LRSchedulerConfig, OptimizerConfig, ReinforcementLearningTrainerConfig
from aiorl.models.config import MODELS, MLPConfig, ModelConfig, OpenModelConfig
from aiorl.monitoring.config import ConsoleConfig, LoggerConfig
from aiorl.section import MAY_DIFFER, Breach, Section, mark_of, may_differ, rule
from aiorl.tasks.config import TASKS, OpenTaskConfig, PPOConfig, TaskConfig
from aiorl.toml import OVERRIDE, join, key_literal, literal, parse_file, parse_override, put
from aiorl.validation import Reader, section_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

__all__ = ["Config", "Difference", "as_tables", "differences", "json_schema", "load_config", "to_toml", "with_values"]


class Config(Section):
    """Everything that a run is made from. Built by `load_config`; immutable."""

    trainer: ReinforcementLearningTrainerConfig = Field(
        default_factory=ReinforcementLearningTrainerConfig, description="How long, how and on what a run learns."
    )
    task: TaskConfig = Field(default_factory=PPOConfig, description="What is learned.")
    model: ModelConfig = Field(default_factory=MLPConfig, description="The network.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="The optimizer.")
    lr_scheduler: LRSchedulerConfig = Field(
        default_factory=LRSchedulerConfig, description="The learning rate's way through the run."
    )
    logger: Annotated[LoggerConfig, MAY_DIFFER] = Field(
        default_factory=LoggerConfig, description="Where figures go beside `metrics.jsonl`."
    )
    link: Annotated[LinkConfig, MAY_DIFFER] = Field(
        default_factory=LinkConfig, description="The link between trainer and workers."
    )
    console: Annotated[ConsoleConfig, MAY_DIFFER] = Field(
        default_factory=ConsoleConfig, description="The console of a live run."
    )

    @rule(
        "trainer.sampling.min_batch_size",
        "trainer.sampling.num_epoch_samples",
        "task.environment.num_env_workers",
        "task.environment.envs_per_worker",
    )
    def _a_batch_can_fill(self) -> Breach | None:
        sampling, num_envs = self.trainer.sampling, self.task.environment.num_envs
        if sampling.min_batch_size <= (num_envs or sampling.most_envs):
            return None
        if num_envs is None:
            remedy = "lower it, raise num_epoch_samples, or set both numbers of task.environment"
            return f'is above the number of environments that "auto" chooses at most, {sampling.most_envs}', remedy
        return f"is above the number of environments, {num_envs}", "lower it, or raise task.environment.envs_per_worker"

    @rule("lr_scheduler.name", "trainer.max_samples", "trainer.max_epochs", "trainer.sampling.num_epoch_samples")
    def _a_schedule_has_an_end(self) -> Breach | None:
        if self.lr_scheduler.name == "constant" or self.trainer.total_samples is not None:
            return None
        return "needs to know when training ends", 'set trainer.max_samples, or write "constant"'

    @rule(
        "lr_scheduler.warmup_samples",
        "lr_scheduler.name",
        "trainer.max_samples",
        "trainer.max_epochs",
        "trainer.sampling.num_epoch_samples",
    )
    def _the_warmup_ends(self) -> Breach | None:
        total = self.trainer.total_samples
        if self.lr_scheduler.name == "constant" or total is None or self.lr_scheduler.warmup_samples < total:
            return None
        return f"is not below the {total} samples of the whole run", "lower it, or raise trainer.max_samples"


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Reads and validates a configuration.

    Reads the file on the calling thread, and imports the class behind a ``module:Name``, which must be on the import
    path.

    Args:
        path: A TOML file; None stands for an empty one, and so for the defaults, which train CartPole.
        overrides: ``"a.b=value"`` each, the value in TOML syntax; what is no TOML value is taken as a string. They go
            over the file, later ones over earlier ones.

    Raises:
        ConfigError: With every fault of the file and the overrides.
    """
    faults: list[Fault] = []
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = parse_file(path)
        except ConfigError as error:
            faults.extend(error.faults)
    readable = not faults
    written = set(_paths(table, ""))
    overridden: list[str] = []
    for override in overrides:
        try:
            steps, value = parse_override(override)
            put(table, steps, value, OVERRIDE)
        except ConfigError as error:
            faults.extend(error.faults)
        else:
            overridden.append(".".join(steps))
    if not readable:
        raise ConfigError(faults)

    def source_of(where: str) -> str:
        within = any(where == key or where.startswith((f"{key}.", f"{key}[")) for key in overridden)
        made = where not in written and any(key.startswith(f"{where}.") for key in overridden)
        if within or made:
            return OVERRIDE
        return str(path) if path is not None else ""

    return _read(table, source_of, faults)


def with_values(config: Config, values: Mapping[str, Any], *, source: str = "") -> Config:
    """A copy of ``config`` with other values at some TOML paths, validated as a whole.

    Args:
        config: The configuration to start from.
        values: By TOML path, for example ``{"optimizer.lr": 1e-4}``; None and ``"none"`` are the same.
        source: Where the values came from, for the message.

    Raises:
        ConfigError: With every fault.
    """
    table = as_tables(config)
    faults: list[Fault] = []
    for path, value in values.items():
        try:
            put(table, path.split("."), _plain(value), source)
        except ConfigError as error:
            faults.extend(error.faults)
    return _read(table, lambda _: source, faults)


def as_tables(section: Section) -> dict[str, Any]:
    """The section as nested tables of what TOML can write: None as ``"none"``, tuples as lists."""
    return {name: _plain(value) for name, value in section.values().items()}


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML, every field written out; `load_config` reads an equal one from it."""
    return "\n".join(_written(config, ""))


@dataclass(frozen=True, slots=True)
class Difference:
    """A field in which two configurations differ so much that they describe two different runs.

    Attributes:
        path: Its TOML path.
        before: The value in the first, as it would stand in TOML; ``"(absent)"`` where it has no such field.
        after: The value in the second.
    """

    path: str
    before: str
    after: str

    def __str__(self) -> str:
        """The difference on one line."""
        return f"{self.path}: {self.before} → {self.after}"


def differences(before: Config, after: Config) -> list[Difference]:
    """The fields that would make ``after`` another run than ``before``, in the order of the configuration.

    Fields and tables that are marked ``MAY_DIFFER`` where they are declared are left out: when to stop, what to log,
    where and how fast to run, and the learning rate.
    """
    return list(_differences(before, after, ""))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, in draft 7, which editors' TOML plug-ins understand (taplo among them).

    A ``[task]`` or ``[model]`` whose name is ``module:Name`` may have any further keys here: only `load_config` imports
    the class and knows which.
    """
    variants: list[type[Section]] = [Config, *TASKS.values(), OpenTaskConfig, *MODELS.values(), OpenModelConfig]
    _, schema = models_json_schema([(cls, "validation") for cls in variants], ref_template="#/definitions/{model}")
    definitions = {name: _editable(definition) for name, definition in schema["$defs"].items()}
    for cls in (*(section for _, section in built_in_tables()), *variants):
        for name, field in cls.model_fields.items():
            mark = mark_of(field)
            if mark is not None:
                definitions[cls.__name__]["properties"][name]["description"] += f" {mark}"
    chosen: tuple[tuple[str, Mapping[str, type[Section]], type[Section]], ...] = (
        ("task", TASKS, OpenTaskConfig),
        ("model", MODELS, OpenModelConfig),
    )
    for table, named, free in chosen:
        for name, cls in named.items():
            definitions[cls.__name__]["properties"]["name"]["pattern"] = f"^{name}$"
        definitions[free.__name__]["properties"]["name"]["pattern"] = ":"
        definitions[free.__name__]["required"] = ["name"]
        choices = [{"$ref": f"#/definitions/{cls.__name__}"} for cls in (*named.values(), free)]
        definitions["Config"]["properties"][table] = {
            "description": Config.model_fields[table].description,
            "anyOf": choices,
        }
    config = definitions.pop("Config")
    return {"$schema": "http://json-schema.org/draft-07/schema#", **config, "definitions": definitions}


def _editable(schema: Any) -> Any:
    """Pydantic's schema as draft 7, with ``"none"`` where Python has None."""
    if isinstance(schema, list):
        return [_editable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "null":
        return {"const": "none"}
    changed = {key: _editable(value) for key, value in schema.items() if key != "title" or not isinstance(value, str)}
    if "default" in changed and changed["default"] is None:
        changed["default"] = "none"
    if "prefixItems" in changed:
        changed |= {"items": changed.pop("prefixItems"), "additionalItems": False}
    if "$ref" in changed and len(changed) > 1:  # draft 7 ignores what stands beside a reference
        changed["allOf"] = [{"$ref": changed.pop("$ref")}]
    return changed


def homes() -> dict[str, str]:
    """For each field's bare name, the table that it stands in, where only one built-in table has it."""
    found: dict[str, list[str]] = {}
    for path, section in built_in_tables():
        for name, field in section.model_fields.items():
            if section_of(field) is None:
                found.setdefault(name, []).append(path)
    return {name: paths[0] for name, paths in found.items() if len(paths) == 1}


def built_in_tables() -> Iterator[tuple[str, type[Section]]]:
    """Every table with its TOML path and section, the built-in task and model standing for any other."""

    def walk(section: Section, path: str) -> Iterator[tuple[str, type[Section]]]:
        if path:
            yield path, type(section)
        for name in type(section).model_fields:
            inner = getattr(section, name)
            if isinstance(inner, Section):
                yield from walk(inner, join(path, name))

    return walk(Config(), "")


def _read(table: Mapping[str, Any], source_of: Callable[[str], str], faults: list[Fault]) -> Config:
    reader = Reader(source_of=source_of, homes=homes())
    config = reader.section(Config, table, "")
    if config is not None:
        reader.rules(config, "")
    if faults or reader.faults:
        raise ConfigError([*faults, *_in_order(reader.faults)])
    return cast("Config", config)


def _in_order(faults: Iterable[Fault]) -> list[Fault]:
    """Sort faults by the order of the configuration; an unknown key comes where its table begins."""
    order: dict[str, int] = {}
    for path, section in built_in_tables():
        for name in ("", *section.model_fields):
            order.setdefault(join(path, name).rstrip("."), len(order))

    def rank(fault: Fault) -> int:
        path = fault.path.partition("[")[0]
        while path and path not in order:
            path = path.rpartition(".")[0]
        return order.get(path, -1)

    return sorted(faults, key=rank)


def _written(section: Section, path: str) -> Iterator[str]:
    """The lines of a section: its header, its values, then the sections in it; free-form tables stand inline."""
    values = section.values()
    if path:
        yield f"[{path}]"
        for name, value in values.items():
            if not isinstance(value, Section):
                yield f"{key_literal(name)} = {literal(_plain(value))}"
        yield ""
    for name, value in values.items():
        if isinstance(value, Section):
            yield from _written(value, join(path, name))


def _paths(table: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, value in table.items():
        yield join(path, key)
        if isinstance(value, Mapping):
            yield from _paths(value, join(path, key))


def _plain(value: Any) -> Any:
    if value is None:
        return "none"
    if isinstance(value, Section):
        return as_tables(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _differences(before: Section, after: Section, path: str) -> Iterator[Difference]:
    fields = {**type(before).model_fields, **type(after).model_fields}
    old, new = before.values(), after.values()
    for name in dict.fromkeys([*old, *new]):
        if name in fields and may_differ(fields[name]):
            continue
        ours, theirs = old.get(name, ...), new.get(name, ...)
        where = join(path, name)
        if isinstance(ours, Section) and isinstance(theirs, Section):
            yield from _differences(ours, theirs, where)
        elif ours != theirs:
            yield Difference(where, *("(absent)" if value is ... else literal(value) for value in (ours, theirs)))
