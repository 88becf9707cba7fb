from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from aiorl.environments.make import EnvironmentGroup, load, seed_of
from aiorl.environments.spaces import EnvironmentSpec
from aiorl.errors import UnsupportedSpace

if TYPE_CHECKING:
    from numpy.typing import NDArray

Transition = tuple[tuple[float, ...], int, float, bool, bool, tuple[float, ...]]
"""Observation, action, reward, terminated, truncated, next (or final) observation."""

WALK = EnvironmentSpec("walks:Walk")
SEEDS = [11, 12, 13]


def policy(observation: NDArray[Any]) -> int:
    return int(observation[1:].sum()) % 2


def reference(seed: int, num_steps: int, **kwargs: Any) -> list[Transition]:
    """One environment in Gymnasium's own words, without any autoreset."""
    environment = load("walks:Walk")(**kwargs)
    found: list[Transition] = []
    observation = environment.reset(seed=seed)[0].copy()
    while len(found) < num_steps:
        action = policy(observation)
        following, reward, terminated, truncated, _ = environment.step(action)
        following = following.copy()
        found.append((tuple(observation), action, reward, terminated, truncated and not terminated, tuple(following)))
        observation = environment.reset()[0].copy() if terminated or truncated else following
    return found


def played(group: EnvironmentGroup, num_steps: int) -> list[list[Transition]]:
    """Transitions of each environment of a group, the ticks after an end left out where they are none."""
    found: dict[int, list[Transition]] = defaultdict(list)
    observations = group.reset(SEEDS)
    masked = np.zeros(group.num_envs, bool)
    while min(len(found[row]) for row in range(group.num_envs)) < num_steps:
        actions = np.array([policy(observation) for observation in observations])
        tick = group.step(actions)
        ended = np.flatnonzero(tick.terminated | tick.truncated)
        finals = dict(zip(ended, tick.final_observations, strict=True))
        for row in range(group.num_envs):
            flags = bool(tick.terminated[row]), bool(tick.truncated[row])
            if masked[row]:
                assert (tick.rewards[row], flags) == (0.0, (False, False))
                continue
            following = tuple(finals.get(row, tick.observations[row]))
            found[row].append(
                (tuple(observations[row]), int(actions[row]), float(tick.rewards[row]), *flags, following)
            )
        masked = (tick.terminated | tick.truncated) & (group.info.autoreset == "next_step")
        observations = tick.observations
    return [found[row][:num_steps] for row in range(group.num_envs)]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("mode", ["plain", "SameStep", "NextStep", "Disabled"])
def test_every_autoreset_mode_gives_the_same_trajectories(mode: str, both: bool) -> None:
    spec = EnvironmentSpec("walks:Walk", {"both": both})
    if mode != "plain":
        spec = EnvironmentSpec(
            "walks:vector", {"autoreset": mode, "both": both}, vectorization_mode="vector_entry_point"
        )
    group = EnvironmentGroup(spec, len(SEEDS))
    assert played(group, 60) == [reference(seed, 60, both=both) for seed in SEEDS]
    group.close()


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_arrays_that_a_vector_environment_reuses_are_not_handed_on(mode: str) -> None:
    spec = EnvironmentSpec("walks:vector", {"autoreset": mode, "copy": False}, vectorization_mode="vector_entry_point")
    group = EnvironmentGroup(spec, len(SEEDS))
    assert played(group, 60) == [reference(seed, 60) for seed in SEEDS]
    group.close()


def test_the_last_reward_and_the_final_observation_are_kept() -> None:
    group = EnvironmentGroup(WALK, 1)
    transitions = played_alone(group)
    ends = [transition for transition in transitions if transition[3] or transition[4]]
    assert len(ends) > 3
    for observation, _, reward, _, _, final in ends:
        assert reward == final[2] == observation[2] + 1  # the walk pays the number of its step
        assert final[1] == observation[1]  # of the episode that ended, not of the next
    group.close()


def played_alone(group: EnvironmentGroup) -> list[Transition]:
    found: list[Transition] = []
    observations = group.reset([5])
    for _ in range(60):
        action = policy(observations[0])
        tick = group.step(np.array([action]))
        following = tick.final_observations if len(tick.final_observations) else tick.observations
        flags = bool(tick.terminated[0]), bool(tick.truncated[0])
        found.append((tuple(observations[0]), action, float(tick.rewards[0]), *flags, tuple(following[0])))
        observations = tick.observations
    return found


def test_same_step_is_asked_for_where_it_can_be() -> None:
    group = EnvironmentGroup(EnvironmentSpec("walks:Asked", vectorization_mode="vector_entry_point"), 2)
    assert group.info.autoreset == "same_step"
    group.close()


def test_a_second_reset_does_not_repeat_the_first() -> None:
    group = EnvironmentGroup(WALK, 2)
    first = group.reset([1, 2])
    second = group.reset()
    assert (first[:, 1] == 1).all()
    assert (second[:, 1] == 2).all()
    assert (group.reset([1, 2]) == first).all()
    group.close()


def test_actions_are_shifted_to_the_environment_s_own() -> None:
    group = EnvironmentGroup(EnvironmentSpec("walks:Walk", {"start": 5}), 1)
    position = group.reset([3])[0, 3]
    tick = group.step(np.array([1]))
    final = tick.final_observations if len(tick.final_observations) else tick.observations
    assert final[0, 3] == position + 2
    group.close()


def test_wrappers_registered_modules_and_ids_behind_modules() -> None:
    spec = EnvironmentSpec("walks:Walk", wrappers=("walks:Doubled", "walks:Doubled"), register=("json",))
    group = EnvironmentGroup(spec, 1)
    group.reset([1])
    assert group.step(np.array([0])).rewards.tolist() == [4.0]
    group.close()
    EnvironmentGroup(EnvironmentSpec("gymnasium.envs:CartPole-v1"), 1).close()


def test_large_observations_keep_shape_and_type() -> None:
    group = EnvironmentGroup(EnvironmentSpec("walks:Pixels"), 3)
    group.reset([1, 2, 3])
    tick = group.step(np.array([0, 0, 0]))
    assert tick.observations.shape == (3, 84, 84, 1)
    assert tick.observations.dtype == np.uint8
    group.close()


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        (EnvironmentSpec("walks:Nested"), UnsupportedSpace, "Dict"),
        (EnvironmentSpec("walks:AwaitableWalk"), TypeError, "num_env_workers = 0"),
        (EnvironmentSpec("walks:Walk", vectorization_mode="vector_entry_point"), TypeError, "num_envs"),
        (
            EnvironmentSpec("walks:three", vectorization_mode="vector_entry_point"),
            ValueError,
            "has 3 env.* where 2 were",
        ),
        (EnvironmentSpec("walks:NOT_CALLABLE"), TypeError, "not callable"),
        (EnvironmentSpec("builtins:dict"), TypeError, "is no environment"),
        (EnvironmentSpec("walks:Missing"), AttributeError, "Missing"),
        (EnvironmentSpec("walks:Walk", {"misbehave": "raise", "where": "constructor"}), ValueError, "bridge"),
    ],
)
def test_what_cannot_be_a_group_is_refused(spec: EnvironmentSpec, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        EnvironmentGroup(spec, 2)


def test_misuse_is_refused() -> None:
    group = EnvironmentGroup(WALK, 2)
    with pytest.raises(ValueError, match="1 seeds for 2"):
        group.reset([1])
    group.reset([1, 2])
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        group.step(np.zeros(3, np.int64))
    group.close()
    group.close()


@pytest.mark.parametrize("shape", [(3,), (5,), (2, 2), (1, 4), ()])
@pytest.mark.parametrize("where", ["reset", "step", "end", "autoreset"])
def test_an_observation_of_another_shape_is_refused(where: str, shape: tuple[int, ...]) -> None:
    spec = EnvironmentSpec("walks:Odd", {"shape": shape, "where": where, "only_seed": SEEDS[1]})
    group = EnvironmentGroup(spec, len(SEEDS), first_env=10)
    told = f"environment 11 gave an observation of shape {shape}, and its space has shape (4,)"
    with pytest.raises(ValueError, match=re.escape(told)):
        played(group, 60)
    group.close()


def test_every_environment_and_incarnation_has_its_own_seed() -> None:
    seeds = {seed_of(1337, env, incarnation) for env in range(300) for incarnation in range(10)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(1337, 0, 0) != seed_of(1338, 0, 0)
    assert seed_of(2**63 - 1, 7, 1) == seed_of(2**63 - 1, 7, 1)
