"""From what was measured to what it means: medians, shares, the bottleneck, and the setting that would move it. No I/O.

All figures are environment steps per second.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiorl.bench.trainer_cost import TrainerCost
    from aiorl.monitoring.loop_lag import LagStatistics

LOOP_LAG_GOAL_S: Final = 0.010
_BUSY: Final = 0.85  # of one core: then the trainer's thread is the limit
_NEAR: Final = 0.75  # of a ceiling: then that is the limit


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of several slices, with its spread.

    Attributes:
        median: Environment steps per second.
        low: The lowest slice.
        high: The highest.
        num_slices: How many there were.
    """

    median: float
    low: float
    high: float
    num_slices: int

    @classmethod
    def of(cls, rates: Sequence[float]) -> Figure:
        """The figure of some slices' rates."""
        return cls(median(rates), min(rates), max(rates), len(rates))


@dataclass(frozen=True, slots=True)
class Subject:
    """What was measured.

    Attributes:
        environment_id: ``task.environment.id``.
        num_env_workers: Worker processes; 0 where everything steps in the trainer's, under ``force_sync`` too.
        num_envs: Environments of all of them.
        num_groups: Groups of all of them.
        num_cores: That this process may use.
        max_policy_lag: Epochs by which acting may run ahead of learning.
        waits: Whether batches wait until they are full (no ``max_wait_time``).
        room_for_envs: Environments at most that an epoch has room for.
    """

    environment_id: str
    num_env_workers: int
    num_envs: int
    num_groups: int
    num_cores: int
    max_policy_lag: int
    waits: bool
    room_for_envs: int


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What holds the whole back.

    Attributes:
        name: ``"environments"``, ``"link"``, ``"inference"``, ``"trainer"``, ``"waiting"`` or ``"learner"``.
        sentence: The same, in a sentence with its figures.
        remedy: The setting that would move it, in words.
        setting: Its TOML path; None where no setting would.
    """

    name: str
    sentence: str
    remedy: str
    setting: str | None


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that a bench found.

    Attributes:
        subject: Of what.
        environments: Stepped with random actions, no trainer.
        link: Messages of this size, environments that cost nothing; None without workers.
        inference: The policy on batches of `batch_rows`.
        learner: Updates on a sampled epoch.
        sampling: Sampling alone.
        whole: A run.
        batch_rows: Mean rows of the batches that sampling formed.
        trainer_busy: Processor seconds of the trainer per second of sampling alone.
        sampling_lag: Of the loop, during sampling alone.
        whole_lag: Of the loop, during the run, after its first epoch.
        trainer_cost: Per tick and row; None where there was no time to measure it.
    """

    subject: Subject
    environments: Figure
    link: Figure | None
    inference: Figure
    learner: Figure
    sampling: Figure
    whole: Figure
    batch_rows: float
    trainer_busy: float
    sampling_lag: LagStatistics
    whole_lag: LagStatistics
    trainer_cost: TrainerCost | None

    @property
    def sampling_ceiling(self) -> float:
        """What sampling could do: its slowest part where the parts work side by side, all in turn in one process."""
        parts = [self.environments.median, self.inference.median]
        if self.link is None:
            return in_turn(parts)
        return min(*parts, self.link.median)

    @property
    def whole_ceiling(self) -> float:
        """What the whole could do: sampling and learning in turn at lag 0, the slower of them above."""
        parts = [self.sampling.median, self.learner.median]
        return min(parts) if self.subject.max_policy_lag else in_turn(parts)


def in_turn(rates: Sequence[float]) -> float:
    """The rate of doing one thing after the other."""
    return 1.0 / sum(1.0 / rate for rate in rates)


def bottleneck(found: Findings) -> Bottleneck:
    """What takes most of the whole's time, and what to set."""
    sampling, learner = found.sampling.median, found.learner.median
    if learner < sampling:
        return _learning(found)
    return _sampling(found)


def _learning(found: Findings) -> Bottleneck:
    subject, sampling, learner = found.subject, found.sampling.median, found.learner.median
    sentence = f"The learner is the bottleneck: it learns {_k(found.learner)} steps/s, and sampling alone makes {_k(found.sampling)}."
    if subject.max_policy_lag == 0 and subject.num_cores > 1 and subject.num_env_workers:
        gain = min(sampling, learner) / in_turn([sampling, learner])
        remedy = f"trainer.sampling.max_policy_lag = 1 would let workers sample while it learns: up to {gain:.1f} times as fast"
        return Bottleneck("learner", sentence, remedy, "trainer.sampling.max_policy_lag")
    remedy = "a larger task.minibatch_size, fewer task.num_update_epochs or a smaller model make an update cheaper"
    return Bottleneck("learner", sentence, remedy, "task.minibatch_size")


def _sampling(found: Findings) -> Bottleneck:
    """Sampling takes the larger part: which part of it?"""
    local = found.subject.num_env_workers == 0
    name = _slowest_part_in_process(found) if local else _nearest_ceiling(found)
    sentences = {
        "environments": f"The environments are the bottleneck: without a trainer they make {_k(found.environments)} steps/s",
        "link": f"The link is the bottleneck: with nothing behind it, it carries {_k(found.link)} steps/s",
        "inference": f"Choosing actions is the bottleneck: the policy alone answers {_k(found.inference)} rows/s",
        "trainer": f"The trainer's thread is the bottleneck: the trainer is busy {found.trainer_busy:.0%} of the time",
        "waiting": f"Waiting is the bottleneck: the trainer is busy only {found.trainer_busy:.0%} of the time",
    }
    others = f"sampling alone makes {_k(found.sampling)}, and the learner learns {_k(found.learner)}."
    remedy, setting = _for_environments(found.subject) if name == "environments" else _for_the_rest(name, found.subject)
    return Bottleneck(name, f"{sentences[name]}; {others}", remedy, setting)


def _for_environments(subject: Subject) -> tuple[str, str | None]:
    """What makes environments step faster: words, and the setting."""
    setting, cores = "task.environment.num_env_workers", subject.num_cores
    if cores > 1 and subject.num_env_workers == 0:
        return f'{setting} = "auto" measures whether they step faster in processes of their own', setting
    if cores > 1 and subject.num_env_workers < cores:
        return f"{setting} up to the {cores} cores steps more of them side by side", setting
    return "all cores step environments: only cheaper environments or more cores help", None


def _for_the_rest(name: str, subject: Subject) -> tuple[str, str]:
    """What makes each step cheaper for the trainer: words, and the setting."""
    if name == "waiting" and subject.waits:
        setting = "trainer.sampling.max_wait_time"
        return f"{setting} = 0.0 acts on what is there instead of waiting for full batches", setting
    if subject.num_envs < subject.room_for_envs:
        setting = "task.environment.envs_per_worker"
        return f"{setting} higher makes groups larger, and a tick cheaper for each of its steps", setting
    if name == "inference":
        return "a smaller model answers faster", "model"
    setting = "trainer.sampling.num_epoch_samples"
    return f"{setting} higher has room for more environments, and so for larger groups", setting


def _slowest_part_in_process(found: Findings) -> str:
    """In one process everything is done in turn: the part that takes most of a step's time."""
    step_s = 1.0 / found.sampling.median
    environments_s, inference_s = 1.0 / found.environments.median, 1.0 / found.inference.median
    parts = {
        "environments": environments_s,
        "inference": inference_s,
        "trainer": step_s - environments_s - inference_s,
    }
    return max(parts, key=lambda name: parts[name])


def _nearest_ceiling(found: Findings) -> str:
    """Side by side, the part that works without a break: the ceiling that sampling comes near, or a thread that is busy."""
    ceilings = {"environments": found.environments.median, "inference": found.inference.median}
    if found.link is not None:
        ceilings["link"] = found.link.median
    nearest = min(ceilings, key=lambda name: ceilings[name])
    if found.sampling.median >= _NEAR * ceilings[nearest]:
        return nearest
    return "trainer" if found.trainer_busy >= _BUSY else "waiting"


def _k(figure: Figure | None) -> str:
    return f"{figure.median:,.0f}" if figure is not None else "none"
