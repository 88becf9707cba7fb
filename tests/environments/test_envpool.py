"""EnvPool as the back end of a group."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from aiorl.environments.make import EnvironmentGroup
from aiorl.environments.preflight import preflight
from aiorl.environments.spaces import ArraySpec, EnvironmentSpec
from aiorl.errors import ConfigError

WHY = 'EnvPool is installed by pip install "aiorl[envpool]"'


def spec_of(identifier: str = "CartPole-v1", **kwargs: Any) -> EnvironmentSpec:
    return EnvironmentSpec(identifier, kwargs, vectorization_mode="envpool")


def test_cartpole_does_what_gymnasium_s_cartpole_does() -> None:
    """Every transition against Gymnasium's own step from the same state, with the time limit counted here."""
    pytest.importorskip("envpool", reason=WHY)
    limit = 12
    group = EnvironmentGroup(spec_of(max_episode_steps=limit), 6)
    cart: Any = gymnasium.make("CartPole-v1").unwrapped
    cart.reset()
    generator = np.random.default_rng(1)
    observations = group.reset([11, 12, 13, 14, 15, 16])
    ended, lengths = np.zeros(6, np.bool_), np.zeros(6, np.int64)
    num_terminated = num_truncated = 0
    for _ in range(120):
        actions = generator.integers(0, 2, 6)
        actions[:2] = 1  # falls soon
        actions.setflags(write=False)  # as they come from the link
        tick = group.step(actions)
        finals = iter(tick.final_observations)
        for row in range(6):
            if ended[row]:  # no transition, but the start of an episode
                assert (tick.rewards[row], tick.terminated[row], tick.truncated[row]) == (0.0, False, False)
                assert (np.abs(tick.observations[row]) <= 0.05).all()
                lengths[row] = 0
                continue
            lengths[row] += 1
            cart.state, cart.steps_beyond_terminated = observations[row].astype(np.float64), None
            following, reward, terminated, _, _ = cart.step(int(actions[row]))
            truncated = lengths[row] == limit
            assert tick.rewards[row] == reward
            assert (tick.terminated[row], tick.truncated[row]) == (terminated and not truncated, truncated)
            assert tick.observations[row] == pytest.approx(following, abs=1e-5)
            if terminated or truncated:
                assert next(finals) == pytest.approx(following, abs=1e-5)
        ended = tick.terminated | tick.truncated
        num_terminated += int(tick.terminated.sum())
        num_truncated += int(tick.truncated.sum())
        observations = tick.observations
    assert num_terminated > 10
    assert num_truncated > 10
    group.close()


def test_each_environment_has_its_own_seed_in_whatever_group_it_is() -> None:
    pytest.importorskip("envpool", reason=WHY)
    together, left, right = (EnvironmentGroup(spec_of(), size) for size in (4, 2, 2))
    seeds = [2**31 - 1, 1, 2, 3]
    begin = together.reset(seeds)
    assert (begin == np.concatenate([left.reset(seeds[:2]), right.reset(seeds[2:])])).all()
    assert (begin != together.reset()).any()
    assert (begin == together.reset(seeds)).all()
    for group in (together, left, right):
        group.close()


def test_atari_images() -> None:
    pytest.importorskip("envpool", reason=WHY)
    spec = spec_of("Pong-v5", reward_clip=True)
    info = preflight(spec)
    assert (info.observation, info.num_actions) == (ArraySpec((4, 84, 84), "uint8"), 6)
    group = EnvironmentGroup(spec, 2)
    begin = group.reset([1, 2])
    tick = group.step(np.array([2, 3]))
    assert tick.observations.dtype == np.uint8
    assert (tick.observations[:, :3] == begin[:, 1:]).all()
    group.close()


def test_closing_ends_the_pool_s_threads() -> None:
    pytest.importorskip("envpool", reason=WHY)
    group = EnvironmentGroup(spec_of(num_threads=3), 4)
    before = num_threads()
    group.reset([1, 2, 3, 4])
    with_pool = num_threads()
    assert with_pool >= before + 3
    group.reset([5, 6, 7, 8])
    assert num_threads() == with_pool
    group.close()
    gc.collect()
    assert num_threads() == before


def num_threads() -> int:
    """Those of this process that Python does not know of, too."""
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.parametrize(
    ("spec", "field", "message", "remedy"),
    [
        (spec_of("ALE/Pong-v5"), "id", "unknown to EnvPool", "Pong-v5"),
        (spec_of("walks:Walk"), "id", "unknown to EnvPool", "list_all_envs"),
        (spec_of(seed=3), "kwargs.seed", "", "env_seed"),
        (spec_of(batch_size=3), "kwargs.batch_size", "", "step together"),
        (spec_of(num_envs=3), "kwargs.num_envs", "", "leave it out"),
        (spec_of(colour=3), "kwargs", "'colour'", "constructor"),
        (spec_of("Pendulum-v1"), "id", "action space Box", "choose another"),
    ],
)
def test_faults_are_named_by_their_field(spec: EnvironmentSpec, field: str, message: str, remedy: str) -> None:
    pytest.importorskip("envpool", reason=WHY)
    with pytest.raises(ConfigError) as caught:
        preflight(spec)
    (fault,) = caught.value.faults
    assert fault.path == f"task.environment.{field}"
    assert message in fault.message
    assert remedy in fault.remedy


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ConfigError) as caught:
        preflight(spec_of())
    (fault,) = caught.value.faults
    assert (fault.path, fault.remedy) == ("task.environment.vectorization_mode", 'pip install "aiorl[envpool]"')
