"""Returns and advantages as pure functions of NumPy arrays.

Dimensions: B rows, trajectory after trajectory. ``ends`` marks the last row of each trajectory, be it the end of an
episode or a cut; no recursion crosses it, so one call serves a whole batch of trajectories of any lengths.

Three ways in which a trajectory stops, and what its last row looks ahead to:

==========  ==============  ==========================================================
            ``terminated``  ``next_values``
==========  ==============  ==========================================================
terminated  True            not looked at: nothing is earned after a terminal state
truncated   False           the value of the episode's true final observation
cut         False           the value of the observation from which the episode goes on
==========  ==============  ==========================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]


def discounted_scan(deltas: Floats, decays: Floats) -> NDArray[np.float64]:
    """Solves ``x[t] = deltas[t] + decays[t] * x[t + 1]`` for every row, with ``x[B] = 0``.

    The recursion is resolved by doubling: after the k-th pass each row holds the sum over its next ``2**k`` rows, so
    that log2 of the longest trajectory passes over the batch take the place of B steps of a Python loop
    (2,048 rows: 0.1 ms instead of 0.3; 100,000: 1.5 instead of 16). Computed in float64, whatever the arguments are.

    Args:
        deltas: What each row adds; floating ``[B]``, finite.
        decays: What each row takes of its successor; floating ``[B]``, 0 in the last row of each trajectory.

    Returns:
        The sums, float64 ``[B]``.

    Raises:
        ValueError: The arguments are not two vectors of one length.
    """
    if deltas.ndim != 1 or deltas.shape != decays.shape:
        raise ValueError(f"deltas {deltas.shape} and decays {decays.shape} must be two vectors of one length")
    sums = deltas.astype(np.float64)  # copies of its own: both are worked on in place
    carry = decays.astype(np.float64)  # the product of the decays between a row and the one `reach` further on
    reach = 1
    while reach < len(sums):
        near = carry[:-reach]
        if not near.any():  # every trajectory is shorter than what is summed already
            break
        sums[:-reach] += near * sums[reach:]
        carry[:-reach] = near * carry[reach:]
        reach *= 2
    return sums


def gae(
    rewards: Floats,
    values: Floats,
    next_values: Floats,
    terminated: NDArray[np.bool_],
    ends: NDArray[np.bool_],
    gamma: float,
    gae_lambda: float,
) -> tuple[Floats, Floats]:
    """Generalised advantage estimation over whole trajectories.

    Schulman et al. 2016, "High-dimensional continuous control using generalized advantage estimation", equations 11
    to 16: ``delta[t] = r[t] + gamma V(s[t+1]) - V(s[t])`` and ``A[t] = delta[t] + gamma lambda A[t+1]``, with ``V`` of
    a terminal state 0 and the second recursion stopping at the end of each trajectory.

    Args:
        rewards: Floating ``[B]``.
        values: The value of each row's observation, floating ``[B]``.
        next_values: The value of each row's next observation, floating ``[B]``; see the table above for the last rows.
        terminated: Bool ``[B]``: the row reached a terminal state.
        ends: Bool ``[B]``: the row is the last of its trajectory.
        gamma: Discount per step, in [0, 1].
        gae_lambda: Weight of longer look-ahead, in [0, 1]: 0 is the one-step advantage, 1 the whole discounted return.

    Returns:
        ``(advantages, returns)``, each ``[B]`` in the dtype of ``values``; ``returns`` are the advantages plus the
        values, the targets of the value function. The sums are taken in float64.

    Raises:
        ValueError: The arguments are not vectors of one length.
    """
    shapes = {array.shape for array in (rewards, values, next_values, terminated, ends)}
    if len(shapes) != 1:
        raise ValueError(f"rewards, values, next_values, terminated and ends must be of one length, not {shapes}")
    baseline = values.astype(np.float64)
    ahead = np.where(terminated, 0.0, next_values.astype(np.float64))
    deltas = rewards.astype(np.float64) + gamma * ahead - baseline
    advantages = discounted_scan(deltas, np.where(ends | terminated, 0.0, gamma * gae_lambda))
    return advantages.astype(values.dtype), (advantages + baseline).astype(values.dtype)


def explained_variance(values: Floats, returns: Floats) -> float:
    """The share of the returns' variance that the values foretold: ``1 - Var(returns - values) / Var(returns)``.

    1 is a perfect value function, 0 one that is no better than a constant, below 0 one that is worse.

    Args:
        values: Floating ``[B]``.
        returns: Floating ``[B]``.

    Returns:
        The share; NaN where the returns do not vary, or there are none.
    """
    if len(returns) == 0:
        return float("nan")
    variance = float(np.var(returns, dtype=np.float64))
    if variance == 0.0:
        return float("nan")
    return 1.0 - float(np.var(returns.astype(np.float64) - values, dtype=np.float64)) / variance
