"""The reference page is up to date, and every field that aiorl promises exists with its default."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from aiorl.config import Config, built_in_tables
from aiorl.config_reference import reference
from aiorl.models.config import MODELS
from aiorl.section import Section
from aiorl.validation import section_of

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"

REQUIRED = object()

# Written by hand, from what aiorl promises: not to be derived from the sections.
EXPECTED: dict[str, dict[str, Any]] = {
    "trainer": {
        "name": "rl",
        "exp_name": "default",
        "exp_dir": None,
        "log_dir_name": "logs",
        "use_double_weight_precision": False,
        "set_to_none": True,
        "deterministic": False,
        "use_tf32": True,
        "detect_anomaly": False,
        "clip_grad_norm": 10.0,
        "clip_grad_norm_type": 2.0,
        "balance_grad_norms": False,
        "seed": 1337,
        "device": "auto",
        "num_threads": "auto",
        "max_consecutive_skips": 20,
        "loop": "auto",
        "cpu_stats_ping_interval": 1.0,
        "cpu_stats_only_log_once": False,
        "gpu_stats_ping_interval": 10.0,
        "gpu_stats_only_log_once": False,
        "max_epochs": None,
        "max_steps": None,
        "max_samples": None,
        "max_seconds": None,
        "target_return": None,
        "drain_timeout": 10.0,
    },
    "trainer.checkpoint": {
        "save_every_n_steps": None,
        "save_every_n_seconds": 3600.0,
        "only_save_most_recent": True,
        "keep_best": 0,
        "keep_last": None,
        "load_from_ckpt_path": None,
        "load_strict": True,
    },
    "trainer.parallel": {
        "use_fsdp": False,
        "cpu_offload": False,
        "sharding_strategy": "full_shard",
        "sync_module_states": True,
    },
    "trainer.compiler": {
        "model": False,
        "func": False,
        "fullgraph": False,
        "dynamic": False,
        "backend": "inductor",
        "model_mode": "default",
        "func_mode": "default",
    },
    "trainer.mixed_precision": {
        "enabled": True,
        "dtype": None,
        "init_scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "min_grad_scale": 1e-4,
        "foreach": None,
    },
    "trainer.profiler": {
        "enabled": False,
        "record_shapes": False,
        "profile_memory": False,
        "with_stack": False,
        "with_flops": False,
        "with_modules": False,
        "wait_steps": 10,
        "warmup_steps": 10,
        "active_steps": 10,
        "repeat_steps": 1,
        "skip_first_steps": 10,
        "table_size": 10,
    },
    "trainer.sampling": {
        "num_epoch_samples": REQUIRED,
        "min_batch_size": 1,
        "max_batch_size": None,
        "max_wait_time": None,
        "min_trajectory_length": 1,
        "max_trajectory_length": None,
        "force_sync": False,
        "optimal": False,
        "max_policy_lag": 0,
    },
    "task": {
        "name": "ppo",
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "clip_coef": 0.2,
        "clip_vloss": False,
        "norm_adv": True,
        "ent_coef": 0.01,
        "vf_coef": 0.5,
        "target_kl": None,
        "num_update_epochs": 4,
        "minibatch_size": 256,
        "anneal": False,
    },
    "task.environment": {
        "id": "CartPole-v1",
        "kwargs": {},
        "wrappers": (),
        "register": (),
        "num_env_workers": 1,
        "envs_per_worker": 16,
        "groups_per_worker": "auto",
        "vectorization_mode": "sync",
        "env_worker_mode": "process",
        "env_seed": None,
        "env_cleanup_time": 5.0,
        "max_steps": 1000,
        "reset_timeout": None,
        "step_timeout": None,
        "on_worker_failure": "fail",
        "launcher": "local",
        "max_worker_rss_bytes": None,
    },
    "model": {"name": "mlp", "hidden_sizes": (64, 64), "activation": "tanh", "shared_trunk": False},
    "optimizer": {"name": "adam", "lr": 1e-3, "eps": 1e-5, "betas": (0.9, 0.999), "weight_decay": 0.0},
    "lr_scheduler": {"name": "constant", "warmup_samples": 0, "min_scale": 0.0},
    "logger": {"terminal": True, "tensorboard": True, "interval_s": 1.0},
    "link": {"endpoint": "auto", "key_dir": None},
    "console": {"enabled": False},
}


# The models that are called by another name.
NAMED: dict[str, dict[str, Any]] = {
    "cnn": {
        "name": "cnn",
        "channels": (32, 64, 64),
        "kernel_sizes": (8, 4, 3),
        "strides": (4, 2, 1),
        "hidden_sizes": (512,),
        "activation": "relu",
    },
    "nature_cnn": {"name": "nature_cnn"},
}


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "write it anew: python -c 'from aiorl.config_reference import reference; print(reference(), end=\"\")' "
        "> docs/configuration.md"
    )


def test_every_field_has_its_name_default_and_type() -> None:
    found = {
        path: {
            name: REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
            for name, field in section.model_fields.items()
            if section_of(field) is None
        }
        for path, section in built_in_tables()
    }
    assert found == EXPECTED
    for path, fields in EXPECTED.items():
        for name, default in fields.items():
            assert type(found[path][name]) is type(default), f"{path}.{name}"


def test_every_named_model_has_its_fields_and_stands_on_the_page() -> None:
    assert {"mlp": EXPECTED["model"], **NAMED} == {name: model().values() for name, model in MODELS.items()}
    text = PAGE.read_text(encoding="utf-8")
    for name, fields in NAMED.items():
        _, _, table = text.partition(f'## `[model]`, `name = "{name}"`')
        for field in fields:
            assert f"| `{field}`" in table.partition("\n## ")[0], f"{name}.{field}"


def test_tables_are_nested_as_they_are_named() -> None:
    for path in EXPECTED:
        section: Any = Config()
        for name in path.split("."):
            section = getattr(section, name)
        assert isinstance(section, Section)


def test_every_default_keeps_its_own_bounds() -> None:
    for path, section in built_in_tables():
        defaults = {name: default for name, default in EXPECTED[path].items() if default is not REQUIRED}
        if path == "trainer.sampling":
            defaults["num_epoch_samples"] = 1
        values = section.model_validate(defaults).values()
        assert {name: values[name] for name in defaults} == defaults


def test_the_page_tells_of_every_field() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for path, fields in EXPECTED.items():
        _, _, table = text.partition(f"## `[{path}]`")
        table = table.partition("\n## ")[0]
        for name in fields:
            assert f"| `{name}`" in table, f"{path}.{name}"


def test_types_bounds_and_marks_are_spelt_out() -> None:
    lines = reference().splitlines()
    for field, kind, default in (
        ("`num_epoch_samples`", "integer ≥ 1", "required"),
        ("`betas`", "list of 2 numbers ≥ 0, < 1", "`[0.9, 0.999]`"),
        ("`hidden_sizes`", "list of integers ≥ 1", "`[64, 64]`"),
        ("`max_epochs` ↻", 'integer ≥ 1 or `"none"`', '`"none"`'),
        ("`num_threads` ↻", 'integer ≥ 1 or `"auto"`', '`"auto"`'),
        ("`loop` ↻", '`"auto"` or `"asyncio"` or `"uvloop"`', '`"auto"`'),
        ("`kwargs`", "table", "`{}`"),
    ):
        assert any(line.startswith(f"| {field} | {kind} | {default} | ") for line in lines), field
    later = "*Not available yet (compiling the train step).*"
    assert f"| `func` ↻ | boolean | `false` | Compile the train step. {later} |" in lines


def test_the_order_of_a_norm_may_be_infinite() -> None:
    trainer = Config().trainer
    assert type(trainer).model_validate({"clip_grad_norm_type": "inf"}).clip_grad_norm_type == math.inf
