"""Vector environments of Gymnasium's and of ALE's, as groups."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from aiorl.environments.make import EnvironmentGroup
from aiorl.environments.spaces import EnvironmentSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

SHORT: dict[str, Any] = {"max_num_frames_per_episode": 80, "num_threads": 1}


def spec_of(identifier: str, *wrappers: str, **kwargs: Any) -> EnvironmentSpec:
    register = ("ale_py",) if identifier.startswith("ALE/") else ()
    return EnvironmentSpec(identifier, kwargs, wrappers, register, "vector_entry_point")


def choose(observations: NDArray[Any], num_actions: int) -> NDArray[np.int64]:
    """Actions that depend on what each environment shows, and on nothing else."""
    numbers = observations.reshape(len(observations), -1).view(np.uint8).astype(np.int64)
    return (numbers @ (np.arange(numbers.shape[1]) % 7)) % num_actions


Transition = tuple[bytes, int, float, bool, bool, bytes]


def played(group: EnvironmentGroup, seeds: list[int] | None, num_ticks: int) -> list[list[Transition]]:
    """(observation, action, reward, terminated, truncated, what follows or is final) of each environment."""
    found: list[list[Transition]] = [[] for _ in range(group.num_envs)]
    observations = group.reset(seeds)
    masked = np.zeros(group.num_envs, np.bool_)
    for _ in range(num_ticks):
        actions = choose(observations, group.info.num_actions)
        actions.setflags(write=False)  # as they come from the link
        tick = group.step(actions)
        assert tick.observations.dtype == tick.final_observations.dtype == group.info.observation.dtype
        assert tick.rewards.dtype == np.float32
        ended = tick.terminated | tick.truncated
        finals = iter(tick.final_observations)
        for row in range(group.num_envs):
            following = (next(finals) if ended[row] else tick.observations[row]).tobytes()
            flags = bool(tick.terminated[row]), bool(tick.truncated[row])
            if masked[row]:
                assert (tick.rewards[row], flags) == (0.0, (False, False))
            else:
                found[row].append(
                    (observations[row].tobytes(), int(actions[row]), float(tick.rewards[row]), *flags, following)
                )
        masked = ended & (group.info.autoreset == "next_step")
        observations = tick.observations
    return found


def expected(environment: Any, seed: int, num_ticks: int) -> list[list[Transition]]:
    """The same in Gymnasium's own words, of a vector environment that resets in the step after an end."""
    assert environment.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    found: list[list[Transition]] = [[] for _ in range(environment.num_envs)]
    observations, _ = environment.reset(seed=seed)
    ended = np.zeros(environment.num_envs, np.bool_)
    for _ in range(num_ticks):
        actions = choose(np.ascontiguousarray(observations), int(environment.single_action_space.n))
        following, rewards, terminated, truncated, _ = environment.step(actions)
        for row in np.flatnonzero(~ended):
            flags = bool(terminated[row]), bool(truncated[row] and not terminated[row])
            found[row].append(
                (observations[row].tobytes(), int(actions[row]), float(rewards[row]), *flags, following[row].tobytes())
            )
        ended = terminated | truncated
        observations = following
    return found


def num_ends(found: list[list[Transition]]) -> int:
    return sum(terminated or truncated for row in found for _, _, _, terminated, truncated, _ in row)


def test_cartpole_does_what_gymnasium_says() -> None:
    group = EnvironmentGroup(spec_of("CartPole-v1", max_episode_steps=20), 8)
    assert group.info.autoreset == "next_step"
    found = played(group, list(range(5, 13)), 200)
    bare = gymnasium.make_vec("CartPole-v1", 8, "vector_entry_point", max_episode_steps=20)
    assert found == expected(bare, 5, 200)
    assert 8 * 9 < num_ends(found) < 8 * 21
    group.close()


def test_a_group_adds_little_to_the_step_of_a_large_vector_environment() -> None:
    """Processor time of one thread, the best of many short stretches, so that other work on the machine hardly counts."""
    group = EnvironmentGroup(spec_of("CartPole-v1"), 1024)
    bare = gymnasium.make_vec("CartPole-v1", 1024, "vector_entry_point")
    group.reset(list(range(1024)))
    bare.reset(seed=0)
    actions = np.random.default_rng(0).integers(0, 2, (20, 1024))

    def cost_s(step: Callable[[NDArray[Any]], Any]) -> float:
        started = time.thread_time()
        for action in actions:
            step(action)
        return time.thread_time() - started

    costs = [(cost_s(bare.step), cost_s(group.step)) for _ in range(40)]
    assert min(ours for _, ours in costs) < 1.6 * min(theirs for theirs, _ in costs)  # measured: 1.25
    group.close()


def test_ale_resets_in_the_same_step_and_shows_true_final_observations() -> None:
    ale_py = pytest.importorskip("ale_py", reason='ALE is installed by pip install "aiorl[atari]"')
    group = EnvironmentGroup(spec_of("ALE/Breakout-v5", **SHORT), 3)
    assert group.info.autoreset == "same_step"
    assert (group.info.observation.shape, group.info.observation.dtype) == ((4, 84, 84), "uint8")
    found = played(group, [5, 6, 7], 70)
    bare = ale_py.vector_env.AtariVectorEnv("breakout", 3, repeat_action_probability=0.25, **SHORT)
    for ours, theirs in zip(found, expected(bare, 5, 74), strict=True):
        assert ours == theirs[: len(ours)]
    assert num_ends(found) == 3 * 3
    for row in found:
        for observation, _, _, _, truncated, following in row:
            if truncated:  # the last three frames that the action was chosen from, and a new one
                assert following[: 3 * 84 * 84] == observation[84 * 84 :]
    group.close()
    bare.close()


def test_ale_by_module_and_callable_is_the_same() -> None:
    pytest.importorskip("ale_py", reason='ALE is installed by pip install "aiorl[atari]"')
    named = EnvironmentGroup(spec_of("ALE/Pong-v5", repeat_action_probability=0.0, **SHORT), 2)
    called = EnvironmentGroup(spec_of("ale_py.vector_env:AtariVectorEnv", game="pong", **SHORT), 2)
    assert called.info.autoreset == "same_step"
    assert played(named, [1, 2], 30) == played(called, [1, 2], 30)
    named.close()
    called.close()


def test_the_last_point_of_a_game_is_kept() -> None:
    """A game of Pong ends with its 21st point, so that the points of each side are those of a whole game."""
    pytest.importorskip("ale_py", reason='ALE is installed by pip install "aiorl[atari]"')
    group = EnvironmentGroup(spec_of("ALE/Pong-v5"), 1)
    group.reset([3])
    points = []
    tick = group.step(np.zeros(1, np.int64))
    while not tick.terminated[0]:
        tick = group.step(np.zeros(1, np.int64))
        points.append(float(tick.rewards[0]))
    assert points[-1] == -1.0
    assert points.count(-1.0) == 21
    assert not (tick.final_observations[0] == tick.observations[0]).all()
    group.close()


@pytest.mark.parametrize("identifier", ["CartPole-v1", "ALE/Pong-v5"])
def test_one_seed_makes_a_group_and_another_one_another(identifier: str) -> None:
    if identifier.startswith("ALE/"):
        pytest.importorskip("ale_py", reason='ALE is installed by pip install "aiorl[atari]"')
    first, second = EnvironmentGroup(spec_of(identifier), 3), EnvironmentGroup(spec_of(identifier), 3)
    highest = 2**31 - 1
    found = played(first, [highest, 1, 2], 40)
    assert found[0] != found[1] != found[2] != found[0]
    assert found == played(second, [highest, 8, 9], 40)
    assert found != played(second, [4, 5, 6], 40)
    assert found != played(first, None, 40)
    first.close()
    second.close()


def test_wrappers_wrap_the_group() -> None:
    wrapper = "gymnasium.wrappers.vector:FlattenObservation"
    group = EnvironmentGroup(spec_of("walks:Asked", wrapper), 2)
    assert group.info.autoreset == "next_step"  # that wrapper knows no other mode than this, which is the default
    observations = group.reset([3, 4])
    assert observations[:, 0].tolist() == [3.0, 4.0]
    group.close()


def test_observations_that_are_not_of_the_space_are_refused() -> None:
    group = EnvironmentGroup(spec_of("walks:vector", f"{__name__}:Narrow"), 2)
    with pytest.raises(ValueError, match=r"shape \(2, 3\), and 2 of its spaces have \(2, 4\)"):
        group.reset([1, 2])
    group.close()


class Narrow(gymnasium.vector.VectorWrapper):
    """Shows less than its space says."""

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        observations, infos = super().reset(seed=seed, options=options)
        return observations[:, :3], infos
