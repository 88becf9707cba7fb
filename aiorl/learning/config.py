"""``[trainer]`` with its tables, ``[optimizer]`` and ``[lr_scheduler]``: how long, how and on what a run learns."""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from aiorl.compute.config import CompilerConfig, MixedPrecisionConfig
from aiorl.monitoring.config import ProfilerConfig
from aiorl.sampling.config import SamplingConfig
from aiorl.section import MAY_DIFFER, Breach, Section, not_yet, rule

RUN_FOLDER_NAMES: Final = (
    "config.toml",
    "calibration.json",
    "provenance.json",
    "metrics.jsonl",
    "summary.json",
    "checkpoints",
)
"""What lies in a run's folder beside its logs (see `aiorl.monitoring.folder`)."""

_SHARDING = not_yet("several learners")


def _inf(value: Any) -> Any:
    return math.inf if value == "inf" else value


class CheckpointConfig(Section):
    """When checkpoints are written, which are kept, and what a run starts from."""

    save_every_n_steps: Annotated[int | None, MAY_DIFFER] = Field(
        None, ge=1, description="Optimizer steps between checkpoints, each at the next epoch end; none = not by steps."
    )
    save_every_n_seconds: Annotated[float | None, MAY_DIFFER] = Field(
        3600.0, gt=0.0, description="Seconds between checkpoints, each at the next epoch end; none = not by time."
    )
    only_save_most_recent: Annotated[bool, MAY_DIFFER] = Field(
        True, description="Keep the newest checkpoint and its predecessor; else all."
    )
    keep_best: Annotated[int, MAY_DIFFER, not_yet("keeping the best")] = Field(
        0, ge=0, description="Checkpoints with the best mean return that are kept besides."
    )
    keep_last: Annotated[int | None, MAY_DIFFER, not_yet("keeping more than two")] = Field(
        None, ge=2, description="Newest checkpoints that are kept; none = as `only_save_most_recent` says."
    )
    load_from_ckpt_path: Annotated[str | None, MAY_DIFFER] = Field(
        None,
        min_length=1,
        description="Run folder or checkpoint whose weights a new run starts from, counters at 0; none = fresh ones.",
    )
    load_strict: Annotated[bool, MAY_DIFFER] = Field(
        True, description="Refuse weights whose names or shapes are not the model's; else take those that fit."
    )


class ParallelConfig(Section):
    """Several learners, when launched by torchrun."""

    use_fsdp: Annotated[bool, MAY_DIFFER, _SHARDING] = Field(False, description="Shard the model (FSDP); else DDP.")
    cpu_offload: Annotated[bool, MAY_DIFFER, _SHARDING] = Field(
        False, description="Keep sharded parameters in the host's memory."
    )
    sharding_strategy: Annotated[
        Literal["full_shard", "shard_grad_op", "no_shard", "hybrid_shard"], MAY_DIFFER, _SHARDING
    ] = Field("full_shard", description="What is sharded, and over which ranks.")
    sync_module_states: Annotated[bool, MAY_DIFFER, _SHARDING] = Field(
        True, description="Start every rank from the weights of rank 0."
    )


class OptimizerConfig(Section):
    """The optimizer."""

    name: Literal["adam"] = Field("adam", description="Which optimizer.")
    lr: Annotated[float, MAY_DIFFER] = Field(1e-3, gt=0.0, description="Learning rate, before the scheduler's factor.")
    eps: float = Field(1e-5, gt=0.0, description="Added to the denominator.")
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = Field(
        (0.9, 0.999), description="Decay of the running means of the gradient and of its square."
    )
    weight_decay: float = Field(0.0, ge=0.0, description="L2 penalty.")


class LRSchedulerConfig(Section):
    """The learning rate's factor as a function of the samples taken so far."""

    name: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Shape of the factor's way from 1 to `min_scale` by the end of training."
    )
    warmup_samples: int = Field(0, ge=0, description="Transitions over which the factor first rises linearly from 0.")
    min_scale: float = Field(0.0, ge=0.0, le=1.0, description="The factor at the end of training.")


class ReinforcementLearningTrainerConfig(Section):
    """The trainer."""

    name: Annotated[str, MAY_DIFFER] = Field("rl", min_length=1, description="The trainer's name in logs.")
    exp_name: Annotated[str, MAY_DIFFER] = Field(
        "default",
        pattern=r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]*$",
        description="The experiment's name, after which the folder of its runs is called; no slash.",
    )
    exp_dir: Annotated[str | None, MAY_DIFFER] = Field(
        None, min_length=1, description="The run's folder; none = `runs/<exp_name>/run_<k>`, the first k that is free."
    )
    log_dir_name: Annotated[str, MAY_DIFFER] = Field(
        "logs",
        pattern=r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]*$",
        description="Folder of logs and TensorBoard events within the run's; no slash.",
    )
    seed: int = Field(
        1337,
        ge=0,
        le=2**63 - 1,
        description="Seed of weights, actions and minibatch order; and of environments, unless `env_seed` is set.",
    )
    device: Annotated[str, MAY_DIFFER, not_yet("CUDA", "cuda", "cuda:*")] = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description='"auto", "cpu", "cuda" or "cuda:N".'
    )
    num_threads: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], MAY_DIFFER] = Field(
        "auto",
        description='Intra-op threads of torch; "auto" = measured at the start; 1 for small networks and `force_sync`.',
    )
    loop: Annotated[Literal["auto", "asyncio", "uvloop"], MAY_DIFFER] = Field(
        "auto", description='Event loop; "auto" = uvloop where it can be had.'
    )
    max_epochs: Annotated[int | None, MAY_DIFFER] = Field(None, ge=1, description="Stop after so many epochs.")
    max_steps: Annotated[int | None, MAY_DIFFER] = Field(None, ge=1, description="Stop after so many optimizer steps.")
    max_samples: Annotated[int | None, MAY_DIFFER] = Field(
        None, ge=1, description="Stop after so many environment transitions."
    )
    max_seconds: Annotated[float | None, MAY_DIFFER] = Field(
        None, gt=0.0, description="Stop at the first epoch end after so many seconds of training."
    )
    target_return: Annotated[float | None, MAY_DIFFER] = Field(
        None, description="Stop when the mean return of the last 100 episodes reaches this."
    )
    drain_timeout: Annotated[float, MAY_DIFFER] = Field(
        10.0, ge=0.0, description="Seconds that a stopped run is given to finish its epoch."
    )
    use_double_weight_precision: Annotated[bool, not_yet("float64 weights")] = Field(
        False, description="Weights in float64."
    )
    set_to_none: Annotated[bool, MAY_DIFFER] = Field(True, description="Free gradients instead of zeroing them.")
    deterministic: Annotated[bool, MAY_DIFFER, not_yet("torch's deterministic algorithms")] = Field(
        False, description="Torch's deterministic algorithms, and the cuDNN and cuBLAS settings that they need."
    )
    use_tf32: Annotated[bool, not_yet("CUDA")] = Field(
        True, description="TF32 in matrix products and convolutions, on a GPU that has it."
    )
    detect_anomaly: Annotated[bool, MAY_DIFFER, not_yet("anomaly detection")] = Field(
        False, description="Let autograd name the operation that made a gradient NaN; slow."
    )
    clip_grad_norm: float | None = Field(
        10.0, gt=0.0, description="Norm to which gradients are clipped; none = no clipping."
    )
    clip_grad_norm_type: Annotated[float, BeforeValidator(_inf, json_schema_input_type=float | Literal["inf"])] = Field(
        2.0, gt=0.0, allow_inf_nan=True, description='The order of that norm; "inf" = the largest component.'
    )
    balance_grad_norms: Annotated[bool, not_yet("gradient balancing")] = Field(
        False, description="Give each named loss an equal share of `clip_grad_norm`."
    )
    max_consecutive_skips: Annotated[int, MAY_DIFFER] = Field(
        20,
        ge=0,
        description="Steps in a row that may be skipped for a non-finite loss or gradient; one more ends the run.",
    )
    cpu_stats_ping_interval: Annotated[float, MAY_DIFFER] = Field(
        1.0, gt=0.0, description="Seconds between two readings of processor and memory."
    )
    cpu_stats_only_log_once: Annotated[bool, MAY_DIFFER] = Field(
        False, description="Log each such reading once instead of on every logged step."
    )
    gpu_stats_ping_interval: Annotated[float, MAY_DIFFER] = Field(
        10.0, gt=0.0, description="Seconds between two readings of the GPUs."
    )
    gpu_stats_only_log_once: Annotated[bool, MAY_DIFFER] = Field(
        False, description="Log each such reading once instead of on every logged step."
    )
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Checkpoints.")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="Several learners.")
    compiler: CompilerConfig = Field(default_factory=CompilerConfig, description="Compilation.")
    mixed_precision: MixedPrecisionConfig = Field(default_factory=MixedPrecisionConfig, description="Precision.")
    profiler: ProfilerConfig = Field(default_factory=ProfilerConfig, description="Profiling.")
    sampling: SamplingConfig = Field(
        default_factory=lambda: SamplingConfig(num_epoch_samples=2048), description="Sampling."
    )

    @rule("log_dir_name")
    def _logs_have_a_place_of_their_own(self) -> Breach | None:
        if self.log_dir_name not in RUN_FOLDER_NAMES:
            return None
        return "is what the run's folder itself calls something else", 'choose another name, for example "logs"'

    @property
    def total_samples(self) -> int | None:
        """Transitions by which the run ends at the latest, for schedules; None where nothing bounds them."""
        bounds = [self.max_samples] if self.max_samples is not None else []
        if self.max_epochs is not None:
            bounds.append(self.max_epochs * self.sampling.num_epoch_samples)
        return min(bounds, default=None)
