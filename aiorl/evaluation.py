"""What a run has learned, played: `load_policy` for one's own program, `evaluate` for figures and a clip.

Both read a run's folder: its configuration and its newest sound checkpoint; and make one environment to see its spaces.
Dimensions: B observations of a batch, K environments that are played side by side.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from aiorl.compute.device import TorchSettings
from aiorl.config import Config, load_config
from aiorl.environments.local import open_local
from aiorl.environments.make import close_environment, make_environment, resolve, seed_of
from aiorl.environments.preflight import preflight
from aiorl.environments.spaces import first_action
from aiorl.errors import CheckpointCorrupt, CheckpointMissing, RunFolderError, first_cause
from aiorl.learning.acting import build_acting
from aiorl.learning.checkpoint import CheckpointStore
from aiorl.models.base import build_model
from aiorl.monitoring.folder import RunFolder, dump_json
from aiorl.monitoring.video import record_episode, unrenderable
from aiorl.sampling.noise import ActionNoise
from aiorl.sampling.policy import NumpyActing
from aiorl.tasks.base import ReinforcementLearningTask, build_task

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from numpy.typing import ArrayLike, NDArray

    from aiorl.environments.make import Group
    from aiorl.environments.spaces import EnvironmentInfo, EnvironmentSpec
    from aiorl.models.base import Model
    from aiorl.sampling.policy import Answer

    Act: TypeAlias = Callable[[NDArray[Any], NDArray[np.float64], bool], Answer]

logger = logging.getLogger(__name__)

MAX_ENVIRONMENTS: Final = 16
_INCARNATION: Final = 2**32 - 1  # no run is resumed so often: episodes that training never saw
_NOISE: Final = 0x6E6F697365  # sets the noise of evaluation apart from that of training
_SMALL_PARAMETERS: Final = 1_000_000  # below, a second thread slows a network down
_REPORT_INTERVAL_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Learned:
    """What a run's folder holds."""

    config: Config
    environment: EnvironmentSpec
    info: EnvironmentInfo
    first_action: int
    act: Act
    checkpoint: Path
    num_samples: int


class LoadedPolicy:
    """The policy of a checkpoint: observations to actions. `load_policy` makes it. Threads may share it, and take turns.

    Attributes:
        info: Observations and actions of the environment that it was trained in.
        checkpoint: The checkpoint's folder.
        num_samples: Environment transitions that it was trained on.
    """

    def __init__(self, learned: _Learned, seed: int) -> None:
        self.info = learned.info
        self.checkpoint = learned.checkpoint
        self.num_samples = learned.num_samples
        self._act = learned.act
        self._first_action = learned.first_action
        self._generator = np.random.default_rng(seed)
        self._lock = threading.Lock()

    def __call__(self, observation: ArrayLike, *, optimal: bool = True) -> Any:
        """Chooses actions, in the environment's own numbering.

        Args:
            observation: One, of the environment's shape, or ``[B, *shape]``.
            optimal: The most probable action; else one is drawn, with a generator of the policy's own.

        Returns:
            An int for one observation, int64 ``[B]`` for B.

        Raises:
            ValueError: The observation has another shape.
            TypeError: Its numbers do not fit the environment's type, as fractions do not fit integers.
        """
        spec = self.info.observation
        rows = np.asarray(observation)
        if not rows.size or rows.shape not in (spec.shape, (*rows.shape[:1], *spec.shape)):
            text = f"an observation of shape {rows.shape}, where the policy takes {spec.shape}, or a batch of these"
            raise ValueError(text)
        is_batch = rows.ndim > len(spec.shape)
        rows = rows.reshape(-1, *spec.shape).astype(spec.dtype, casting="same_kind")
        with self._lock:
            actions, _ = self._act(rows, self._generator.random(len(rows)), optimal)
        actions = actions + self._first_action
        return actions if is_batch else int(actions[0])


def load_policy(run_folder: str | Path, *, seed: int = 0) -> LoadedPolicy:
    """Loads the policy of a run's newest checkpoint, on the CPU.

    Blocks for as long as the environment takes to be imported and made: a running loop calls it through
    ``asyncio.to_thread``. A checkpoint cannot run code, but the run's configuration names what is imported and called:
    load no folder whose ``config.toml`` you would not run.

    Args:
        run_folder: For example ``runs/cartpole/run_0``. The run may be going on.
        seed: Of actions that are drawn, with ``optimal=False``.

    Raises:
        RunFolderError: It is no run's folder.
        CheckpointMissing: The run has not saved one yet.
        CheckpointCorrupt: No checkpoint is what was written, or its weights are not those of the configured model.
        ConfigError: The run's configuration cannot be used here: its environment is not installed, for example.
    """
    return LoadedPolicy(_learned(Path(run_folder)), seed)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What playing a checkpoint brought.

    Attributes:
        folder: The run's.
        checkpoint: The checkpoint's folder.
        num_samples: Environment transitions that it was trained on.
        optimal: Whether actions were greedy.
        returns: Undiscounted return of each episode, float64 ``[episodes]``.
        lengths: Transitions of each, int64 ``[episodes]``.
        wall_s: Time spent playing them, in seconds.
    """

    folder: Path
    checkpoint: Path
    num_samples: int
    optimal: bool
    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    wall_s: float

    @property
    def episodes(self) -> int:
        """How many episodes were played."""
        return len(self.returns)

    @property
    def return_mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def return_std(self) -> float:
        """Population standard deviation of the return."""
        return float(self.returns.std())

    def to_json(self) -> str:
        """One JSON object, on one line."""
        return dump_json(
            {
                "episode_return_mean": self.return_mean,
                "episode_return_std": self.return_std,
                "episodes": self.episodes,
                "num_samples": self.num_samples,
                "episode_return_min": self.returns.min(),
                "episode_return_max": self.returns.max(),
                "episode_length_mean": self.lengths.mean(),
                "optimal": self.optimal,
                "checkpoint": self.checkpoint,
            }
        )


def evaluate(
    folder: str | Path,
    *,
    episodes: int = 100,
    optimal: bool = True,
    seed: int | None = None,
    video: Path | None = None,
) -> Evaluation:
    """Plays the newest checkpoint of a run. Blocks, on a loop of its own.

    Up to `MAX_ENVIRONMENTS` environments are played side by side, each a share of the episodes that is fixed
    beforehand: to count whatever ends first would count short episodes more often.

    Args:
        folder: The run's.
        episodes: How many, at least 1.
        optimal: Greedy actions; else they are drawn.
        seed: Of environments and of actions that are drawn; None: the run's own, which gives other episodes than those
            of training.
        video: Where to record the first episode, ``task.environment.max_steps`` steps at most, as ``.gif`` or ``.mp4``.

    Raises:
        ValueError: ``episodes`` is below 1.
        EnvironmentRaised: An environment raised while it was played.
        AiorlError: What `load_policy` raises; a `ConfigError` too where no clip can be made.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, not {episodes}")
    folder = Path(folder)
    learned = _learned(folder)
    if seed is None:
        own = learned.config.task.environment.env_seed
        seed = learned.config.trainer.seed if own is None else own
    if video is not None:
        _record(learned, video, optimal=optimal, seed=seed)
    started = time.perf_counter()
    played = asyncio.run(_play_all(learned, episodes, optimal=optimal, seed=seed))
    returns, lengths = zip(*played, strict=True)
    return Evaluation(
        folder=folder,
        checkpoint=learned.checkpoint,
        num_samples=learned.num_samples,
        optimal=optimal,
        returns=np.array(returns, np.float64),
        lengths=np.array(lengths, np.int64),
        wall_s=time.perf_counter() - started,
    )


# ---------------------------------------------------------------------- loading
def _learned(folder: Path) -> _Learned:
    """Reads a run's folder, in a thread: an environment may be of a kind that is closed on a loop."""
    with ThreadPoolExecutor(1, thread_name_prefix="aiorl-load") as executor:
        return executor.submit(_load, folder).result()


def _load(folder: Path) -> _Learned:
    run = RunFolder(folder)
    if not run.config_file.is_file():
        raise RunFolderError(f"{folder} is no run's folder: {_why_no_run(folder)}", folder=folder)
    config = load_config(run.config_file)
    if not run.holds_checkpoint:
        why = f": {run.ending}" if run.ending else " yet: a run saves one when it ends, or on SIGUSR1"
        raise CheckpointMissing(f"{folder} holds no checkpoint{why}")
    loaded = CheckpointStore(run.checkpoints, only_most_recent=True).load()
    task = build_task(config.task)
    environment = task.get_environment()
    info = preflight(environment)
    with torch.random.fork_rng(devices=()):
        model = build_model(config.model, info)
    try:
        model.load_state_dict(dict(loaded.contents.model), assign=True)
    except RuntimeError as error:
        raise CheckpointCorrupt(
            f"{loaded.path} holds the weights of another model than the one that {run.config_file} names (a model that was "
            f"passed as an object is named by no configuration): {error}"
        ) from error
    made = make_environment(environment, resolve(environment))
    first = first_action(made)
    close_environment(made)
    return _Learned(
        config=config,
        environment=environment,
        info=info,
        first_action=first,
        act=_acting(model, task),
        checkpoint=loaded.path,
        num_samples=int(loaded.contents.state["num_samples"]),
    )


def _acting(model: Model, task: ReinforcementLearningTask) -> Act:
    """Acts as training did: in NumPy where it can, in torch with one thread where the model is small."""
    acting = build_acting(model, task, torch.device("cpu"))
    is_large = sum(parameter.numel() for parameter in model.parameters()) >= _SMALL_PARAMETERS
    if is_large or isinstance(acting, NumpyActing):
        return acting.act
    settings = TorchSettings(num_threads=1)

    def act(observations: NDArray[Any], noise: NDArray[np.float64], optimal: bool) -> Answer:
        with settings.applied():
            return acting.act(observations, noise, optimal)

    return act


def _why_no_run(folder: Path) -> str:
    if not folder.exists():
        return "it does not exist"
    found = [path for pattern in ("*/config.toml", "*/*/config.toml") for path in folder.glob(pattern)]
    runs = sorted(found, key=lambda path: path.stat().st_mtime)
    if runs:
        return f"it has no config.toml; did you mean {runs[-1].parent}?"
    return "it has no config.toml"


# ---------------------------------------------------------------------- playing
async def _play_all(learned: _Learned, episodes: int, *, optimal: bool, seed: int) -> list[tuple[float, int]]:
    """(return, length) of every episode, environment after environment."""
    num_envs = min(MAX_ENVIRONMENTS, episodes)
    shares = np.full(num_envs, episodes // num_envs)
    shares[: episodes % num_envs] += 1
    workers = await open_local(
        learned.environment,
        [[num_envs]],
        env_seed=seed,
        incarnation=_INCARNATION,
        env_cleanup_time=learned.config.task.environment.env_cleanup_time,
    )
    try:
        async with asyncio.TaskGroup() as tasks:
            playing = [
                tasks.create_task(
                    _play(learned, group, shares[group.first_env :][: group.num_envs], optimal=optimal, seed=seed),
                    name=f"play {group.name}",
                )
                for group in workers.groups
            ]
    except BaseExceptionGroup as group:
        cause = first_cause(group)
        raise cause from cause.__cause__
    finally:
        await workers.aclose()
    return [episode for task in playing for episode in task.result()]


async def _play(
    learned: _Learned, group: Group, shares: NDArray[np.int64], *, optimal: bool, seed: int
) -> list[tuple[float, int]]:
    """(return, length) of each environment's share of episodes; one that has played its share idles along uncounted."""
    noise = _noise(seed, group.first_env, group.num_envs)
    masks = learned.info.autoreset == "next_step"
    played: list[list[tuple[float, int]]] = [[] for _ in shares]
    returns = np.zeros(len(shares))
    lengths = np.zeros(len(shares), np.int64)
    ended = np.zeros(len(shares), np.bool_)
    told_at = time.monotonic()
    observations = await group.reset()
    while any(len(episodes) < share for episodes, share in zip(played, shares, strict=True)):
        masked = ended if masks and ended.any() else None
        actions, _ = learned.act(observations, noise.draw(masked), optimal)
        tick = await group.step(actions)
        returns += tick.rewards
        lengths += 1 if masked is None else ~masked
        ended = tick.terminated | tick.truncated
        for row in np.flatnonzero(ended):
            if len(played[row]) < shares[row]:
                played[row].append((float(returns[row]), int(lengths[row])))
            returns[row] = lengths[row] = 0
        observations = tick.observations
        if time.monotonic() - told_at > _REPORT_INTERVAL_S:
            told_at = time.monotonic()
            done = sum(map(len, played))
            logger.info(
                "%d of %d episodes played; the longest that is open has %d steps", done, shares.sum(), lengths.max()
            )
        await asyncio.sleep(0)  # environments in this process never wait, and an interrupt has to get through
    return [episode for episodes in played for episode in episodes]


def _noise(seed: int, first_env: int, num_envs: int) -> ActionNoise:
    return ActionNoise(seed ^ _NOISE, first_env, num_envs)


def _record(learned: _Learned, path: Path, *, optimal: bool, seed: int) -> None:
    """Plays the first environment's first episode, and records it."""
    if learned.info.is_awaitable:
        raise unrenderable(path, "is awaitable, and cannot be recorded")
    if learned.environment.is_vector:
        mode = learned.environment.vectorization_mode
        raise unrenderable(path, f'has vectorization_mode = "{mode}": only single environments can be recorded')
    spec = dataclasses.replace(learned.environment, kwargs={**learned.environment.kwargs, "render_mode": "rgb_array"})
    noise = _noise(seed, 0, 1)

    def choose(observation: Any) -> int:
        row = np.array([observation], learned.info.observation.dtype)
        actions, _ = learned.act(row, noise.draw(None), optimal)
        return int(actions[0]) + learned.first_action

    try:
        environment = make_environment(spec, resolve(spec))
    except Exception as error:
        remedy = 'let its constructor take render_mode="rgb_array"'
        raise unrenderable(path, f"cannot be rendered: {error}", remedy) from error
    try:
        max_steps = learned.config.task.environment.max_steps
        record_episode(path, environment, choose, seed=seed_of(seed, 0, _INCARNATION), max_steps=max_steps)
    finally:
        environment.close()
