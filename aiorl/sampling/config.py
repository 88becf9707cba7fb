"""``[trainer.sampling]``: how much experience makes an epoch, how requests are batched, how trajectories are cut."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from aiorl.section import MAY_DIFFER, Breach, Section, rule

# Of an environment in an epoch. With 2,048 samples of CartPole, 64 learned as well as 128 (returns of 383 and 403 against 406 and 337);
# 32 and 16 did not (244 and 251; 175 and 272): trajectories are too short then.
_MIN_STEPS: Final = 64


class SamplingConfig(Section):
    """How experience is sampled."""

    num_epoch_samples: int = Field(
        ge=1,
        examples=[2048],
        description="Kept transitions that make an epoch; it overshoots by less than one group's rows (times the minimum "
        "length), carried rows left out.",
    )
    min_batch_size: Annotated[int, MAY_DIFFER] = Field(
        1, ge=1, description="Rows below which an expired `max_wait_time` does not yet flush a batch."
    )
    max_batch_size: Annotated[int | None, MAY_DIFFER] = Field(
        None, ge=1, description="Rows at which a batch is flushed at once; none = one group of each live worker."
    )
    max_wait_time: Annotated[float | None, MAY_DIFFER] = Field(
        None,
        ge=0.0,
        description="Longest time in seconds that the oldest queued row waits before a flush; 0 = until the loop's "
        "next turn; none = no limit: flush when full, or when nothing more can arrive.",
    )
    min_trajectory_length: int = Field(
        1,
        ge=1,
        description="Episodes shorter than this are dropped; a minimum above 1 biases towards long episodes.",
    )
    max_trajectory_length: int | None = Field(
        None,
        ge=1,
        description="A trajectory is cut here and bootstrapped, the environment not reset; none = `num_epoch_samples` "
        "// number of environments, at least `min_trajectory_length`.",
    )
    force_sync: Annotated[bool, MAY_DIFFER] = Field(
        False,
        description="Step environments inside the trainer's process, in a fixed order: reproducible to the bit.",
    )
    optimal: bool = Field(False, description="Act greedily instead of sampling actions.")
    max_policy_lag: int = Field(
        0,
        ge=0,
        description="Epochs by which acting may run ahead of learning; 0 = they alternate (on-policy).",
    )

    @rule("min_batch_size", "max_batch_size")
    def _batch_sizes_in_order(self) -> Breach | None:
        if self.max_batch_size is None or self.min_batch_size <= self.max_batch_size:
            return None
        return f"is above max_batch_size = {self.max_batch_size}", "lower it, or raise max_batch_size"

    @rule("min_trajectory_length", "max_trajectory_length")
    def _trajectory_lengths_in_order(self) -> Breach | None:
        if self.max_trajectory_length is None or self.min_trajectory_length <= self.max_trajectory_length:
            return None
        return (
            f"is above max_trajectory_length = {self.max_trajectory_length}",
            "lower it, or raise max_trajectory_length",
        )

    @rule("min_trajectory_length", "num_epoch_samples")
    def _trajectories_fit_into_an_epoch(self) -> Breach | None:
        if self.min_trajectory_length <= self.num_epoch_samples:
            return None
        return f"is above num_epoch_samples = {self.num_epoch_samples}", "lower it, or raise num_epoch_samples"

    @property
    def most_envs(self) -> int:
        """Environments at most where their number is measured: an epoch has 64 steps of each, or the minimum length."""
        return max(1, self.num_epoch_samples // max(_MIN_STEPS, self.min_trajectory_length))

    def trajectory_limit(self, num_envs: int) -> int:
        """The length at which trajectories are cut, in transitions, when ``num_envs`` environments sample."""
        if self.max_trajectory_length is not None:
            return self.max_trajectory_length
        return max(self.min_trajectory_length, self.num_epoch_samples // num_envs)
