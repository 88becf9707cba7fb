from __future__ import annotations

import importlib
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from aiorl.environments.spaces import ArraySpec, EnvironmentInfo, describe, first_action
from aiorl.errors import ConfigError, UnsupportedSpace

walks = vars(importlib.import_module("walks"))


def test_cartpole_is_described() -> None:
    with gymnasium.make("CartPole-v1") as environment:
        assert describe(environment) == EnvironmentInfo(
            observation=ArraySpec((4,), "float32"),
            action=ArraySpec((), "int64"),
            num_actions=2,
            autoreset="same_step",
            max_episode_steps=500,
        )


@pytest.mark.parametrize(
    ("mode", "autoreset"), [("SameStep", "same_step"), ("Disabled", "same_step"), ("NextStep", "next_step")]
)
def test_vector_environments_are_described_by_one_of_theirs(mode: str, autoreset: str) -> None:
    environment = walks["vector"](3, mode)
    info = describe(environment)
    environment.close()
    assert (info.observation, info.autoreset) == (ArraySpec((4,), "float64"), autoreset)


def test_actions_are_counted_from_zero() -> None:
    environment = walks["Walk"](start=5)
    assert (describe(environment).num_actions, first_action(environment)) == (2, 5)


def test_awaitable_environments_are_told_apart() -> None:
    assert describe(walks["AwaitableWalk"]()).is_awaitable
    assert not describe(walks["Walk"]()).is_awaitable


@pytest.mark.parametrize(
    ("observation", "action", "named"),
    [
        (spaces.Discrete(3), spaces.Discrete(2), "Discrete(3)"),
        (spaces.Box(0, 1, (), np.float32), spaces.Discrete(2), "Box"),
        (spaces.Box(0, 1, (0,), np.float32), spaces.Discrete(2), "(0,)"),
        (spaces.Box(0, 1, (2,), np.float32), spaces.Box(0, 1, (2,), np.float32), "action space Box"),
    ],
)
def test_other_spaces_are_refused_by_name(observation: Any, action: Any, named: str) -> None:
    environment = walks["Walk"]()
    environment.observation_space, environment.action_space = observation, action
    with pytest.raises(UnsupportedSpace, match="is not supported") as caught:
        describe(environment)
    assert named in str(caught.value)


def test_a_vector_environment_has_to_say_when_it_resets() -> None:
    environment = walks["Unreset"](2)
    with pytest.raises(ConfigError, match="autoreset_mode"):
        describe(environment)
    environment.close()
