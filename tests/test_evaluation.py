"""Loading a policy and playing it: what it chooses, which episodes count, and what is refused."""

from __future__ import annotations

import asyncio
import json
import shutil
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from PIL import Image
from torch import Tensor

import aiorl
from aiorl.compute.distributions import Categorical
from aiorl.config import load_config, to_toml
from aiorl.environments.make import seed_of
from aiorl.errors import CheckpointCorrupt, CheckpointMissing, ConfigError, EnvironmentRaised, RunFolderError
from aiorl.evaluation import evaluate, load_policy
from aiorl.learning.checkpoint import CheckpointStore
from aiorl.learning.snapshot import Buffers, Contents
from aiorl.models.base import Model
from aiorl.monitoring.folder import RunFolder

if TYPE_CHECKING:
    from pathlib import Path

    from aiorl.environments.spaces import EnvironmentInfo

FIRST = 10  # the environments below call their actions 10, 11 and 12
WEIGHT = np.array([[0.0, 0.0], [0.2, 0.0], [0.0, 0.1]], np.float32)
BIAS = np.array([1.0, 0.0, -0.5], np.float32)


class Uneven(gymnasium.Env[Any, Any]):
    """Episodes of 1 to 30 steps; each step is worth the number of its action."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012 - Gymnasium's way
    observation_space = spaces.Box(0.0, 100.0, (2,), np.float32)
    action_space = spaces.Discrete(3, start=FIRST)

    def __init__(self, render_mode: str | None = None, fails_after: int = 10**9, picture: int = 20) -> None:
        self.render_mode = render_mode
        self._left = fails_after
        self._picture = picture
        self._at = self._length = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._at, self._length = 0, int(self.np_random.integers(1, 31))
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("the bottom fell out")
        self._at += 1
        is_over = self._at >= self._length
        return self._observation(), float(action), is_over and self._at % 2 == 0, is_over and self._at % 2 == 1, {}

    def render(self) -> Any:
        picture = np.zeros((self._picture, 30, 3), np.uint8)
        picture[:, : self._at] = 255
        return picture

    def _observation(self) -> Any:
        return np.array([self._at, self._length], np.float32)


def side_by_side(num_envs: int) -> SyncVectorEnv:
    """The same as a vector environment."""
    return SyncVectorEnv([Uneven] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP)


class Awaited:
    """The same, as a service would be: reset and step are coroutines."""

    observation_space = Uneven.observation_space
    action_space = Uneven.action_space

    def __init__(self) -> None:
        self._inner = Uneven()

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        await asyncio.sleep(0)
        return self._inner.reset(seed=seed)

    async def step(self, action: int) -> Any:
        await asyncio.sleep(0)
        return self._inner.step(action)

    async def close(self) -> None:
        await asyncio.sleep(0)


class Unseen(Uneven):
    """Knows nothing of rendering."""

    def __init__(self) -> None:
        super().__init__()


class Own(Model):
    """A model of one's own: always prefers one action."""

    def __init__(self, info: EnvironmentInfo, favourite: int) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(info.num_actions))
        self.favourite = favourite

    def policy(self, observations: Tensor) -> Categorical:
        logits = self.logits + torch.nn.functional.one_hot(torch.tensor(self.favourite), len(self.logits))
        return Categorical(logits.expand(len(observations), -1))

    def value(self, observations: Tensor) -> Tensor:
        return observations.sum(dim=1)


LINEAR = {
    "policy_head.weight": torch.from_numpy(WEIGHT),
    "policy_head.bias": torch.from_numpy(BIAS),
    "value_head.weight": torch.zeros(1, 2),
    "value_head.bias": torch.zeros(1),
}


def saved_run(path: Path, *overrides: str, weights: dict[str, Tensor] | None = None) -> Path:
    """The folder of a run whose policy is known."""
    world = "task.environment.id=tests.test_evaluation:Uneven"
    config = load_config(None, [world, "model.hidden_sizes=[]", "trainer.seed=5", *overrides])
    folder = RunFolder.create(str(path / "run"), "known")
    folder.write_config(to_toml(config))
    state = {"num_steps": 3, "num_samples": 1234}
    contents = Contents(model=LINEAR if weights is None else weights, optimizer={}, scheduler={}, state=state, extra={})
    store = CheckpointStore(folder.checkpoints, only_most_recent=True)
    asyncio.run(store.save(Buffers().copy(contents)))
    return folder.path


def greedy(observation: Any) -> int:
    return FIRST + int(np.argmax(WEIGHT @ observation + BIAS))


def reference(num_envs: int, shares: list[int], seed: int) -> tuple[list[float], list[int]]:
    """Returns and lengths of every environment's share of greedy episodes, one environment after the other."""
    returns, lengths = [], []
    for env in range(num_envs):
        world = Uneven()
        observation, _ = world.reset(seed=seed_of(seed, env, 2**32 - 1))
        for _ in range(shares[env]):
            total, length, is_over = 0.0, 0, False
            while not is_over:
                observation, reward, terminated, truncated, _ = world.step(greedy(observation))
                total, length, is_over = total + reward, length + 1, terminated or truncated
            observation, _ = world.reset()
            returns.append(total)
            lengths.append(length)
    return returns, lengths


# ---------------------------------------------------------------------- load_policy
def test_a_policy_answers_one_observation_or_many_in_the_environments_own_numbering(tmp_path: Path) -> None:
    policy = aiorl.load_policy(saved_run(tmp_path))
    assert policy.num_samples == 1234
    assert policy.checkpoint.name == "000001_step_3"
    observations = np.array([[0.0, 1.0], [9.0, 1.0], [0.0, 30.0]], np.float32)
    expected = [greedy(observation) for observation in observations]
    assert expected == [10, 11, 12]
    assert policy(observations).tolist() == expected
    assert policy(observations).dtype == np.int64
    alone = policy([9, 1])
    assert (alone, type(alone)) == (11, int)


@pytest.mark.parametrize("observation", [0.0, [1.0, 2.0, 3.0], np.zeros((2, 3, 2)), np.zeros((0, 2))])
def test_an_observation_of_another_shape_is_refused(tmp_path: Path, observation: Any) -> None:
    policy = load_policy(saved_run(tmp_path))
    with pytest.raises(ValueError, match=r"where the policy takes \(2,\)"):
        policy(observation)


def test_drawn_actions_follow_the_policy_and_its_seed(tmp_path: Path) -> None:
    folder = saved_run(tmp_path, weights={**LINEAR, "policy_head.bias": torch.log(torch.tensor([0.5, 0.2, 0.3]))})
    observations = np.zeros((4000, 2), np.float32)
    drawn = load_policy(folder, seed=1)(observations, optimal=False)
    shares = np.bincount(drawn - FIRST) / len(drawn)
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.03)  # four standard deviations
    assert (load_policy(folder, seed=1)(observations, optimal=False) == drawn).all()
    assert (load_policy(folder, seed=2)(observations, optimal=False) != drawn).any()


def test_a_model_of_ones_own_is_loaded_by_its_name(tmp_path: Path) -> None:
    config = load_config(None, ["model.name=tests.test_evaluation:Own", "model.favourite=2"])
    path = saved_run(tmp_path, weights={"logits": torch.tensor([0.0, 0.5, 0.0])})
    text = (path / "config.toml").read_text()
    (path / "config.toml").write_text(
        text.partition("[model]")[0] + to_toml(config)[to_toml(config).index("[model]") :]
    )
    before = torch.get_num_threads(), torch.get_rng_state()
    policy = load_policy(path)
    assert policy(np.zeros((2, 2))).tolist() == [12, 12]
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_policy_is_loaded_inside_a_running_loop_too(tmp_path: Path) -> None:
    folder = saved_run(tmp_path, "task.environment.id=tests.test_evaluation:Awaited")

    async def application() -> Any:
        return load_policy(folder)([9.0, 1.0])

    assert asyncio.run(application()) == 11


# ---------------------------------------------------------------------- evaluate
VECTOR = "task.environment.vectorization_mode=vector_entry_point"


@pytest.mark.parametrize(
    ("world", "overrides"),
    [("Uneven", ()), ("Awaited", ()), ("side_by_side", (VECTOR,))],
    ids=["plain", "awaitable", "vector"],
)
def test_each_environment_plays_a_fixed_share_whatever_its_episodes_length(
    tmp_path: Path, world: str, overrides: tuple[str, ...]
) -> None:
    folder = saved_run(tmp_path, f"task.environment.id=tests.test_evaluation:{world}", *overrides)
    evaluation = evaluate(folder, episodes=37)
    returns, lengths = reference(16, [3] * 5 + [2] * 11, seed=5)
    assert evaluation.lengths.tolist() == lengths
    assert evaluation.returns.tolist() == returns
    assert len(set(lengths)) > 10
    told = json.loads(evaluation.to_json())
    assert told["episodes"] == 37
    assert told["num_samples"] == 1234
    assert told["episode_return_mean"] == pytest.approx(sum(returns) / 37)
    deviations = [(value - sum(returns) / 37) ** 2 for value in returns]
    assert told["episode_return_std"] == pytest.approx((sum(deviations) / 37) ** 0.5)


def test_fewer_episodes_than_environments_take_one_each(tmp_path: Path) -> None:
    evaluation = evaluate(saved_run(tmp_path, "task.environment.env_seed=8"), episodes=3)
    assert evaluation.returns.tolist() == reference(3, [1, 1, 1], seed=8)[0]


def test_sampled_episodes_are_repeatable_and_depend_on_the_seed(tmp_path: Path) -> None:
    folder = saved_run(tmp_path)
    first, again, other = (evaluate(folder, episodes=20, optimal=False, seed=seed) for seed in (1, 1, 2))
    assert first.returns.tolist() == again.returns.tolist()
    assert first.returns.tolist() != other.returns.tolist()
    assert first.returns.tolist() != evaluate(folder, episodes=20, seed=1).returns.tolist()
    assert not first.optimal


def test_an_environment_that_raises_is_reported_as_it_is(tmp_path: Path) -> None:
    folder = saved_run(tmp_path, "task.environment.kwargs.fails_after=3")
    with pytest.raises(EnvironmentRaised, match="raised in step: RuntimeError: the bottom fell out"):
        evaluate(folder, episodes=50)


def test_no_episodes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(tmp_path, episodes=0)


# ---------------------------------------------------------------------- folders
def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="does not exist"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match=r"it has no config\.toml$"):
        load_policy(tmp_path)
    folder = saved_run(tmp_path)
    with pytest.raises(RunFolderError, match=f"did you mean {folder}"):
        load_policy(tmp_path)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointMissing, match="holds no checkpoint yet"):
        load_policy(folder)
    RunFolder(folder).write_summary({"status": "failed", "error": "NaNError: parameters are not finite: a"})
    with pytest.raises(
        CheckpointMissing, match=r"no checkpoint: its run failed, NaNError: parameters are not finite: a$"
    ):
        load_policy(folder)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = saved_run(tmp_path, "model.hidden_sizes=[4]")
    with pytest.raises(CheckpointCorrupt, match="weights of another model"):
        load_policy(folder)


def test_an_environment_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Nonexistent"):
        load_policy(saved_run(tmp_path, "task.environment.id=tests.test_evaluation:Nonexistent"))


# ---------------------------------------------------------------------- clips
def test_a_clip_shows_the_first_episode(tmp_path: Path) -> None:
    clip = tmp_path / "clips" / "first.gif"
    evaluation = evaluate(saved_run(tmp_path), episodes=3, optimal=False, video=clip)
    with Image.open(clip) as image:
        assert image.n_frames == evaluation.lengths[0] + 1  # type: ignore[attr-defined] # of every image with frames
        assert image.info["duration"] == 40
        image.seek(evaluation.lengths[0])
        assert (np.asarray(image.convert("RGB"))[0, :, 0] > 127).sum() == evaluation.lengths[0]


def test_a_clip_has_max_steps_at_most(tmp_path: Path) -> None:
    clip = tmp_path / "first.gif"
    evaluation = evaluate(saved_run(tmp_path, "task.environment.max_steps=2"), episodes=1, seed=3, video=clip)
    assert evaluation.lengths[0] > 2
    with Image.open(clip) as image:
        assert image.n_frames == 3  # type: ignore[attr-defined] # of every image with frames


@pytest.mark.parametrize(
    ("world", "overrides", "name", "message"),
    [
        ("Uneven", (), "clip.avi", "neither a .gif nor an .mp4"),
        ("Unseen", (), "clip.gif", "cannot be rendered"),
        ("Awaited", (), "clip.gif", "is awaitable"),
        ("side_by_side", (VECTOR,), "clip.gif", "only single environments can be recorded"),
    ],
)
def test_a_clip_that_cannot_be_made_is_a_fault(
    tmp_path: Path, world: str, overrides: tuple[str, ...], name: str, message: str
) -> None:
    folder = saved_run(tmp_path, f"task.environment.id=tests.test_evaluation:{world}", *overrides)
    with pytest.raises(ConfigError, match=message):
        evaluate(folder, episodes=1, video=tmp_path / name)
    assert not (tmp_path / name).exists()
