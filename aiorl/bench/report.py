"""What a bench found, as text for a terminal and as one JSON object."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from aiorl.bench.figures import LOOP_LAG_GOAL_S, bottleneck

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiorl.bench.figures import Figure, Findings
    from aiorl.monitoring.loop_lag import LagStatistics

FORMAT: Final = 1
"""Raised when a key of the JSON object changes its meaning or goes."""


def as_json(found: Findings) -> str:
    """One line of JSON; its keys are those of ``docs/cli.md``."""
    figures = _figures(found)
    cost, lag = found.trainer_cost, {"sampling": found.sampling_lag, "whole": found.whole_lag}
    content: dict[str, Any] = {
        "format": FORMAT,
        **asdict(found.subject),
        "steps_per_s": {name: asdict(figure) if figure is not None else None for name, figure in figures.items()},
        "ceilings": {"sampling": found.sampling_ceiling, "whole": found.whole_ceiling},
        "shares": {
            "sampling": found.sampling.median / found.sampling_ceiling,
            "whole": found.whole.median / found.whole_ceiling,
            **{
                f"whole_of_{name}": found.whole.median / figure.median if figure is not None else None
                for name, figure in figures.items()
                if name != "whole"
            },
        },
        "bottleneck": asdict(bottleneck(found)),
        "batch_rows": found.batch_rows,
        "trainer_busy": found.trainer_busy,
        "trainer_cpu": None
        if cost is None
        else {
            "per_tick_us": cost.per_tick_us,
            "per_row_us": cost.per_row_us,
            "reference_us": cost.reference_us,
            "tick_us_by_group_size": {str(size): tick_us for size, tick_us in cost.points.items()},
        },
        "loop_lag_s": {name: {"p50": of.p50, "p99": of.p99, "max": of.max} for name, of in lag.items()},
        "loop_lag_within_goal": all(of.p99 <= LOOP_LAG_GOAL_S for of in lag.values()),
    }
    return json.dumps(content, allow_nan=False)


def as_text(found: Findings) -> str:
    """A table and what follows from it."""
    return "\n".join(_lines(found))


def _lines(found: Findings) -> Iterator[str]:
    subject = found.subject
    where = _counted(subject.num_env_workers, "worker") if subject.num_env_workers else "the trainer's process"
    yield (
        f"{subject.environment_id}: {_counted(subject.num_envs, 'environment')} in {_counted(subject.num_groups, 'group')} in {where}, "
        f"{_counted(subject.num_cores, 'core')}, max_policy_lag = {subject.max_policy_lag}"
    )
    yield ""
    yield f"{'environment steps/s':<32}{'median':>12}{'lowest':>12}{'highest':>12}   the whole is"
    for name, figure in _figures(found).items():
        if figure is None:
            yield f"{_TITLES[name]:<32}{'none':>12}"
            continue
        share = f"{found.whole.median / figure.median:>11.0%} of it" if name != "whole" else ""
        yield (
            f"{_TITLES[name]:<32}{figure.median:>12,.0f}{figure.low:>12,.0f}{figure.high:>12,.0f}   {share}".rstrip()
        )
    yield ""
    yield (
        f"sampling alone reaches {found.sampling.median / found.sampling_ceiling:.0%} of what its parts allow, "
        f"{found.sampling_ceiling:,.0f}; the whole {found.whole.median / found.whole_ceiling:.0%} of what sampling and "
        f"learner allow{', side by side' if subject.max_policy_lag else ' in turn'}, {found.whole_ceiling:,.0f}"
    )
    cost = found.trainer_cost
    if cost is not None:
        per_row = f"{cost.per_row_us:.2f} µs" if cost.per_row_us else "too little to be measured"
        yield (
            f"trainer: {cost.per_tick_us:.1f} µs of processor for each tick of a group, {per_row} for each "
            f"row of it; {found.batch_rows:.1f} rows a batch; busy {found.trainer_busy:.0%} while sampling"
        )
    for name, lag in (("sampling alone", found.sampling_lag), ("the whole", found.whole_lag)):
        yield f"loop lag, {name}: {_lag(lag)}"
    yield ""
    narrow = bottleneck(found)
    yield narrow.sentence
    yield f"What would move it: {narrow.remedy}."


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _lag(lag: LagStatistics) -> str:
    verdict = "within" if lag.p99 <= LOOP_LAG_GOAL_S else "above"
    return (
        f"p50 {1000 * lag.p50:.1f} ms, p99 {1000 * lag.p99:.1f} ms, max {1000 * lag.max:.1f} ms "
        f"(p99 {verdict} the {1000 * LOOP_LAG_GOAL_S:.0f} ms aimed at)"
    )


_TITLES: Final = {
    "environments": "environments, no trainer",
    "link": "link, costless environments",
    "inference": "inference",
    "learner": "learner",
    "sampling": "sampling alone",
    "whole": "the whole",
}


def _figures(found: Findings) -> dict[str, Figure | None]:
    return {name: getattr(found, name) for name in _TITLES}
