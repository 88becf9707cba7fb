"""What environments return, made into arrays and checked: nobody else looks at what user code hands over.

Every error names the environment by its global index. Dimensions: K environments of a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def check_observation(observation: Any, shape: tuple[int, ...], env: int) -> None:
    """Raises ``ValueError`` where an observation of environment ``env`` does not have the shape of its space."""
    try:
        found = np.shape(observation)
    except ValueError as error:
        raise ValueError(f"environment {env} gave an observation that is no array: {error}") from error
    if found != shape:
        raise ValueError(f"environment {env} gave an observation of shape {found}, and its space has shape {shape}")


def stack_observations(
    rows: Sequence[Any] | NDArray[Any],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    first_env: int,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Observations of environments ``first_env`` and following as one array ``[K, *shape]``: a new one, or ``out``.

    2 µs for 16 rows of CartPole, as long as ``np.concatenate``, which also takes rows of different lengths;
    ``np.stack``, or a look at the shape of each row, takes 8.

    Raises:
        ValueError: A row has another shape than the space.
        TypeError: A row's type cannot be cast to the space's.
    """
    if out is not None:
        return _write(rows, shape, first_env, out)
    if not len(rows):
        return np.empty((0, *shape), dtype)
    try:
        stacked = np.array(rows)
    except ValueError:  # of different shapes, which one of them is told below
        stacked = np.empty(0)
    if stacked.shape != (len(rows), *shape):
        for env, observation in enumerate(rows, first_env):
            check_observation(observation, shape, env)
    return stacked.astype(dtype, casting="same_kind", copy=False)


def _write(
    rows: Sequence[Any] | NDArray[Any], shape: tuple[int, ...], first_env: int, out: NDArray[Any]
) -> NDArray[Any]:
    """Writes rows where they are to lie, each once: 16 rows of 28 KB in two thirds of the time of an array and its copy."""
    if isinstance(rows, np.ndarray) and rows.shape == out.shape:
        np.copyto(out, rows, casting="same_kind")
        return out
    for env, observation in enumerate(rows, first_env):
        check_observation(observation, shape, env)
    if not shape:
        np.copyto(out, np.array(rows), casting="same_kind")
    else:
        np.concatenate(rows, out=out.reshape(-1, *shape[1:]), casting="same_kind")
    return out


def stack_rewards(rewards: Sequence[Any] | NDArray[Any], first_env: int) -> NDArray[np.float32]:
    """Rewards of environments ``first_env`` and following as a new array float32 ``[K]``, finite or not.

    Raises:
        ValueError: A reward is not a number; NumPy alone takes None for NaN, and text for what it says.
    """
    try:
        stacked = np.array(rewards)
    except ValueError:  # of different shapes
        stacked = np.empty(0)
    if stacked.dtype.kind not in "biuf" or stacked.size != len(rewards):
        stacked = np.array([_number(reward, env) for env, reward in enumerate(rewards, first_env)])
    return stacked.astype(np.float32, copy=False).reshape(len(rewards))


def _number(reward: Any, env: int) -> float:
    try:
        number = np.asarray(reward).item()  # an environment's reward is on the host: nothing to wait for
        if isinstance(number, str | bytes):
            raise TypeError("it is text")
        return float(number)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"environment {env} gave the reward {reward!r:.80}, which is not a number") from error
