"""The whole configuration: faults with path, value and remedy; overrides; classes of the user's own."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from aiorl.config import Config, load_config, to_toml, with_values
from aiorl.errors import ConfigError, Fault
from aiorl.learning.config import LRSchedulerConfig, ReinforcementLearningTrainerConfig
from aiorl.models.config import MLPConfig, OpenModelConfig
from aiorl.sampling.config import SamplingConfig
from aiorl.tasks.config import OpenTaskConfig, PPOConfig

CONFIGS = Path(__file__).parent.parent / "configs"


def faults_of(path: Path | None = None, *overrides: str) -> list[Fault]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return list(caught.value.faults)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


# ---- what is shipped


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid_and_sets_a_wait_time(path: Path) -> None:
    config = load_config(path)
    assert config.trainer.exp_name == path.stem
    assert config.trainer.sampling.max_wait_time is not None


def test_without_a_file_the_defaults_stand() -> None:
    config = load_config()
    assert config == Config()
    assert isinstance(config.task, PPOConfig)
    assert isinstance(config.model, MLPConfig)
    assert (config.task.environment.id, config.trainer.sampling.num_epoch_samples) == ("CartPole-v1", 2048)


def test_torch_and_gymnasium_are_not_imported() -> None:
    code = "import sys, aiorl.config as c; c.load_config(); print('torch' in sys.modules, 'gymnasium' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# ---- faults


@pytest.mark.parametrize(
    ("override", "path", "message", "remedy"),
    [
        # unknown keys and tables
        ("trainr.seed=1", "trainr", "is unknown", 'did you mean "trainer"?'),
        ("trainer.exp_nam=x", "trainer.exp_nam", "is unknown", 'did you mean "exp_name"?'),
        ("trainer.gamma=0.9", "trainer.gamma", "is unknown", "it belongs into [task]"),
        ("trainer.samplin.optimal=true", "trainer.samplin", "is unknown", 'did you mean "sampling"?'),
        ("task.gama=0.9", "task.gama", "is unknown", 'did you mean "gamma"?'),
        ("model.zzz=1", "model.zzz", "is unknown", "known are name, hidden_sizes, activation, shared_trunk"),
        # wrong types
        ("trainer=3", "trainer", "should be a table", "write its fields under [trainer]"),
        ("trainer.seed=true", "trainer.seed", "should be an integer", "the default is 1337"),
        ("trainer.seed=1.5", "trainer.seed", "should be an integer", "the default is 1337"),
        ("trainer.max_epochs=x", "trainer.max_epochs", 'should be an integer or "none"', 'the default is "none"'),
        ("logger.terminal=1", "logger.terminal", "should be true or false", "the default is true"),
        ("trainer.num_threads=atuo", "trainer.num_threads", 'should be an integer or "auto"', 'did you mean "auto"?'),
        ("trainer.clip_grad_norm_type=max", "trainer.clip_grad_norm_type", "should be a number", "the default is 2.0"),
        ("model.hidden_sizes=64", "model.hidden_sizes", "should be a list", "the default is [64, 64]"),
        ("optimizer.betas=[0.9]", "optimizer.betas", "should have 2 items", "the default is [0.9, 0.999]"),
        ("task.environment.kwargs=3", "task.environment.kwargs", "should be a table", "the default is {}"),
        (
            "task.environment.kwargs.day=2020-01-01",
            "task.environment.kwargs.day",
            "should be made of numbers, strings, booleans, lists and tables",
            "the default is {}",
        ),
        # bounds and forms
        ("trainer.seed=-1", "trainer.seed", "should be at least 0", "the default is 1337"),
        ("optimizer.lr=0", "optimizer.lr", "should be above 0.0", "the default is 0.001"),
        ("optimizer.lr=inf", "optimizer.lr", "should be finite", "the default is 0.001"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas[1]", "should be below 1.0", "the default is [0.9, 0.999]"),
        ("task.gamma=1.5", "task.gamma", "should be at most 1.0", "the default is 0.99"),
        ("model.hidden_sizes=[64, 0]", "model.hidden_sizes[1]", "should be at least 1", "the default is [64, 64]"),
        ("model.activation=reul", "model.activation", "should be", 'did you mean "relu"?'),
        ("trainer.exp_name=a/b", "trainer.exp_name", "has not the form that is asked for", "no slash"),
        ("trainer.exp_name=..", "trainer.exp_name", "has not the form that is asked for", "no slash"),
        ("trainer.device=tpu", "trainer.device", "has not the form that is asked for", '"cuda:N"'),
        ("link.endpoint=udp://x", "link.endpoint", "has not the form that is asked for", "tcp://HOST:PORT"),
        ("task.environment.wrappers=[gym]", "task.environment.wrappers", "is no TOML value", "write a number"),
        (
            'task.environment.wrappers=["Frames"]',
            "task.environment.wrappers[0]",
            "has not the form that is asked for",
            "module:callable",
        ),
        # names
        ("task.name=pp", "task.name", "is unknown", 'did you mean "ppo"?'),
        ("model.name=nature", "model.name", "is unknown", "module:Name"),
        ("task.name=no.such:Task", "task.name", "cannot be imported", "import path"),
        ("task.name=3", "task.name", "should be a string", 'the default is "ppo"'),
        # rules over several fields and tables
        (
            "trainer.sampling={num_epoch_samples = 64, min_batch_size = 9, max_batch_size = 8}",
            "trainer.sampling.min_batch_size",
            "is above max_batch_size = 8",
            "lower it, or raise max_batch_size",
        ),
        (
            "trainer.sampling={num_epoch_samples = 64, min_trajectory_length = 9, max_trajectory_length = 8}",
            "trainer.sampling.min_trajectory_length",
            "is above max_trajectory_length = 8",
            "lower it, or raise max_trajectory_length",
        ),
        (
            "trainer.sampling={num_epoch_samples = 64, min_trajectory_length = 65}",
            "trainer.sampling.min_trajectory_length",
            "is above num_epoch_samples = 64",
            "lower it, or raise num_epoch_samples",
        ),
        (
            "trainer.sampling={num_epoch_samples = 64, min_batch_size = 17}",
            "trainer.sampling.min_batch_size",
            "is above the number of environments, 16",
            "lower it, or raise task.environment.envs_per_worker",
        ),
        ("trainer.sampling={}", "trainer.sampling.num_epoch_samples", "is required", "set it, for example to 2048"),
        (
            'trainer.compiler={backend = "eager", model_mode = "max-autotune"}',
            "trainer.compiler.model_mode",
            'is a mode of inductor, not of backend = "eager"',
            'leave it at "default"',
        ),
        (
            "task.environment.groups_per_worker=17",
            "task.environment.groups_per_worker",
            "is above envs_per_worker = 16",
            'lower it, or write "auto"',
        ),
        (
            'model={name = "cnn", channels = [8], strides = [8]}',
            "model.kernel_sizes",
            "has 3 entries, and channels has 1",
            "give one for each convolution",
        ),
        (
            "lr_scheduler.name=linear",
            "lr_scheduler.name",
            "needs to know when training ends",
            'set trainer.max_samples, or write "constant"',
        ),
    ],
)
def test_a_fault_names_its_place_and_its_remedy(override: str, path: str, message: str, remedy: str) -> None:
    (fault,) = faults_of(None, override)
    assert (fault.path, fault.source) == (path, "--set")
    assert message in fault.message
    assert remedy in fault.remedy


# Every field that is to come, with a value that only its machinery could honour.
NOT_YET = [
    "trainer.use_double_weight_precision=true", "trainer.deterministic=true", "trainer.use_tf32=false",
    "trainer.detect_anomaly=true", "trainer.balance_grad_norms=true", "trainer.device=cuda", "trainer.device=cuda:1",
    "trainer.checkpoint.keep_best=1", "trainer.checkpoint.keep_last=3", "trainer.parallel.use_fsdp=true",
    "trainer.parallel.cpu_offload=true", "trainer.parallel.sharding_strategy=no_shard",
    "trainer.parallel.sync_module_states=false", "trainer.compiler.func=true", "trainer.compiler.func_mode=reduce-overhead",
    "trainer.mixed_precision.enabled=false", "trainer.mixed_precision.dtype=bfloat16",
    "trainer.mixed_precision.init_scale=2.0", "trainer.mixed_precision.growth_factor=3.0",
    "trainer.mixed_precision.backoff_factor=0.1", "trainer.mixed_precision.growth_interval=5",
    "trainer.mixed_precision.min_grad_scale=0.1", "trainer.mixed_precision.foreach=true",
    "trainer.profiler.enabled=true", "trainer.profiler.record_shapes=true", "trainer.profiler.profile_memory=true",
    "trainer.profiler.with_stack=true", "trainer.profiler.with_flops=true", "trainer.profiler.with_modules=true",
    "trainer.profiler.wait_steps=1", "trainer.profiler.warmup_steps=1", "trainer.profiler.active_steps=1",
    "trainer.profiler.repeat_steps=2", "trainer.profiler.skip_first_steps=1", "trainer.profiler.table_size=1",
    "task.environment.reset_timeout=1",
    "task.environment.step_timeout=1", "task.environment.on_worker_failure=replace", "task.environment.launcher=ray",
    "task.environment.max_worker_rss_bytes=1", "link.key_dir=keys", "console.enabled=true",
]  # fmt: skip


def test_what_is_to_come_is_refused_and_not_ignored() -> None:
    for override in NOT_YET:
        (fault,) = faults_of(None, override)
        assert (fault.path, fault.message) == (override.partition("=")[0], "not available yet")
        assert fault.remedy.startswith("leave it at its default, ")


def test_what_is_to_come_may_be_written_with_its_default(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, to_toml(Config()))) == Config()


def test_faults_of_file_and_overrides_are_listed_together_in_order(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        [modle]
        name = "mlp"
        [trainer]
        sede = 1
        max_samples = -5
        [trainer.sampling]
        num_epoch_samples = 100
        min_batch_size = 40
        max_batch_size = 30
        min_trajectory_length = 200
        [task]
        gamma = "high"
        [task.environment]
        envs_per_worker = 8
        """,
    )
    overrides = ["optimizer.lr=-1", "nonsense", "lr_scheduler.name=linear", "trainer.device.index=1"]
    with pytest.raises(ConfigError) as caught:
        load_config(path, [*overrides, 'trainer.exp_dir="x'])
    assert str(caught.value).splitlines() == [
        "the configuration has 11 faults:",
        "  --set: nonsense: is no override; write KEY=VALUE, as in trainer.seed=1",
        '  --set: trainer.exp_dir = "x: is no TOML value; write a number, true, "text", [1, 2], ...',
        f'  {path}: modle: is unknown; did you mean "model"?',
        f'  {path}: trainer.sede = 1: is unknown; did you mean "seed"?',
        '  --set: trainer.device: should be a string; the default is "auto"',
        f'  {path}: trainer.max_samples = -5: should be at least 1; the default is "none"',
        f"  {path}: trainer.sampling.min_batch_size = 40: is above max_batch_size = 30; lower it, or raise "
        "max_batch_size",
        f"  {path}: trainer.sampling.min_batch_size = 40: is above the number of environments, 8; lower it, or raise "
        "task.environment.envs_per_worker",
        f"  {path}: trainer.sampling.min_trajectory_length = 200: is above num_epoch_samples = 100; lower it, or raise "
        "num_epoch_samples",
        f'  {path}: task.gamma = "high": should be a number; the default is 0.99',
        "  --set: optimizer.lr = -1: should be above 0.0; the default is 0.001",
    ]


def test_a_rule_that_a_fault_makes_meaningless_is_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "[trainer]\nmax_samples = -1\n[lr_scheduler]\nname = 'linear'\n[task.environment]\nenvs_per_worker = 0\n",
    )
    assert [fault.path for fault in faults_of(path)] == ["trainer.max_samples", "task.environment.envs_per_worker"]


def test_a_file_that_is_no_configuration_is_a_fault(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.toml", tmp_path, write(tmp_path, "a =")):
        first, second = faults_of(path, "nonsense")
        assert (first.path, second.path) == (str(path), "nonsense")


# ---- overrides


def test_overrides_go_over_the_file_and_later_ones_over_earlier_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "[trainer]\nseed = 1\nexp_name = 'x'\n[task.environment.kwargs]\na = 1\n")
    overrides = [
        "trainer.seed=2", "trainer.seed=3", "trainer.exp_name=foo", "task.environment.kwargs.b=[1, 2]",
        "optimizer.lr=3e-4", "trainer.checkpoint.save_every_n_seconds=none", "trainer.clip_grad_norm_type=inf",
        "trainer.max_samples=1_000",
    ]  # fmt: skip
    config = load_config(path, overrides)
    assert (config.trainer.seed, config.trainer.exp_name, config.optimizer.lr) == (3, "foo", 3e-4)
    assert dict(config.task.environment.kwargs) == {"a": 1, "b": [1, 2]}
    assert config.trainer.checkpoint.save_every_n_seconds is None
    assert math.isinf(config.trainer.clip_grad_norm_type)
    assert config.trainer.max_samples == 1000


def test_values_are_changed_in_a_copy() -> None:
    config = load_config()
    changed = with_values(config, {"optimizer.lr": 0.5, "trainer.max_samples": 7, "trainer.clip_grad_norm": None})
    assert (changed.optimizer.lr, changed.trainer.max_samples, changed.trainer.clip_grad_norm) == (0.5, 7, None)
    assert config == Config()
    with pytest.raises(ConfigError) as caught:
        with_values(config, {"optimizer.lr": -1.0, "optimizer.rate": 1, "trainer.seed.x": 1}, source="run.set")
    assert [(fault.path, fault.source) for fault in caught.value.faults] == [
        ("trainer.seed.x", "run.set"), ("optimizer.rate", "run.set"), ("optimizer.lr", "run.set"),
    ]  # fmt: skip


# ---- classes of the user's own

MODULE = """
from pydantic import Field
from aiorl.models.config import MLPConfig
from aiorl.tasks.config import PPOConfig, TaskConfig

class Plain: pass

class Configured:
    class Config(TaskConfig):
        bonus: float = Field(0.5, ge=0.0, description="A bonus.")

class Derived:
    Config = PPOConfig

class Net:
    class Config(MLPConfig):
        dropout: float = 0.0
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_class_without_a_config_gets_every_key_as_an_option(module: str, tmp_path: Path) -> None:
    text = f"""
    [task]
    name = "{module}:Plain"
    depth = 3
    names = ["a", "none"]
    [task.curriculum]
    stages = [{{ length = 1.5 }}]
    [task.environment]
    env_seed = 4
    [model]
    name = "{module}:Plain"
    width = 5
    """
    config = load_config(write(tmp_path, text))
    assert isinstance(config.task, OpenTaskConfig)
    assert config.task.options == {"depth": 3, "names": ["a", "none"], "curriculum": {"stages": [{"length": 1.5}]}}
    assert config.task.environment.env_seed == 4
    assert isinstance(config.model, OpenModelConfig)
    assert config.model.options == {"width": 5}
    assert load_config(write(tmp_path, to_toml(config))) == config
    (fault,) = faults_of(write(tmp_path, f"[task]\nname = '{module}:Plain'\nday = 2020-01-01\n"))
    assert (fault.path, fault.remedy) == ("task.day", "leave it out")


def test_a_class_with_a_config_has_its_table_validated(module: str, tmp_path: Path) -> None:
    config = load_config(None, [f"task.name={module}:Configured", "task.bonus=2", f"model.name={module}:Net"])
    assert config.task.values()["bonus"] == 2.0
    assert isinstance(config.model, MLPConfig)
    assert load_config(write(tmp_path, to_toml(config))) == config
    faults = faults_of(None, f"task.name={module}:Configured", "task.bonu=2", "task.bonus=-1")
    assert [(fault.path, fault.remedy) for fault in faults] == [
        ("task.bonu", 'did you mean "bonus"?'),
        ("task.bonus", "the default is 0.5"),
    ]


def test_a_class_derived_from_a_built_in_one_inherits_its_fields(module: str) -> None:
    config = load_config(None, [f"task.name={module}:Derived", "task.gamma=0.5"])
    assert isinstance(config.task, PPOConfig)
    assert (config.task.name, config.task.gamma) == (f"{module}:Derived", 0.5)


# ---- what follows from the fields


def test_trajectories_are_cut_so_that_every_environment_adds_to_an_epoch() -> None:
    sampling = SamplingConfig(num_epoch_samples=100)
    assert [sampling.trajectory_limit(num_envs) for num_envs in (1, 16, 33, 101)] == [100, 6, 3, 1]
    assert SamplingConfig(num_epoch_samples=100, min_trajectory_length=7).trajectory_limit(33) == 7
    assert SamplingConfig(num_epoch_samples=100, max_trajectory_length=50).trajectory_limit(33) == 50


def test_environments_are_as_many_in_process_as_with_one_worker() -> None:
    for workers, per_worker, total in ((0, 3, 3), (1, 3, 3), (4, 3, 12)):
        overrides = [f"task.environment.num_env_workers={workers}", f"task.environment.envs_per_worker={per_worker}"]
        assert load_config(None, overrides).task.environment.num_envs == total


def test_how_many_environments_there_are_is_open_until_it_was_measured() -> None:
    for field in ("num_env_workers", "envs_per_worker"):
        environment = load_config(None, [f"task.environment.{field}=auto"]).task.environment
        assert environment.is_auto
        assert environment.num_envs is None
        with pytest.raises(ValueError, match="have to be numbers by now"):
            environment.numbers()
    given = load_config(None, []).task.environment
    assert not given.is_auto
    assert given.numbers() == (1, 16)


def test_a_batch_that_no_measured_number_of_environments_can_fill_is_a_fault() -> None:
    auto = ["trainer.sampling.num_epoch_samples=2048", "task.environment.envs_per_worker=auto"]
    assert load_config(None, [*auto, "trainer.sampling.min_batch_size=32"]).trainer.sampling.most_envs == 32
    (fault,) = faults_of(None, *auto, "trainer.sampling.min_batch_size=33")
    assert fault.path == "trainer.sampling.min_batch_size"
    assert fault.message == 'is above the number of environments that "auto" chooses at most, 32'


def test_neither_a_negative_number_nor_another_word_stands_for_workers() -> None:
    for value in ("-1", "many"):
        (fault,) = faults_of(None, f"task.environment.num_env_workers={value}")
        assert fault.path == "task.environment.num_env_workers"


def test_the_end_of_a_schedule_is_the_first_bound_on_samples() -> None:
    sampling = SamplingConfig(num_epoch_samples=10)
    ends = [
        ReinforcementLearningTrainerConfig(sampling=sampling, max_samples=samples, max_epochs=epochs).total_samples
        for samples, epochs in ((None, None), (25, None), (None, 2), (25, 2), (15, 2))
    ]
    assert ends == [None, 25, 20, 20, 15]


def test_a_warmup_ends_before_training_does() -> None:
    overrides = ["trainer.max_samples=100", "lr_scheduler.name=cosine"]
    assert load_config(None, [*overrides, "lr_scheduler.warmup_samples=99"]).lr_scheduler.warmup_samples == 99
    (fault,) = faults_of(None, *overrides, "lr_scheduler.warmup_samples=100")
    assert (fault.path, fault.message) == (
        "lr_scheduler.warmup_samples",
        "is not below the 100 samples of the whole run",
    )


def test_a_configuration_built_in_code_keeps_the_rules_between_tables() -> None:
    with pytest.raises(ValidationError, match="needs to know when training ends"):
        Config(lr_scheduler=LRSchedulerConfig(name="linear"))
