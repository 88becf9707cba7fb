"""Distributions over actions, drawn from noise that the caller brings.

No generator is kept or touched here: an action is a function of the logits and of the noise alone, so that runs do not
depend on the order in which batches happen to be formed.

Dimensions: B rows, A actions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from torch import Tensor

_BELOW_ONE = 1.0 - 2.0**-53  # the largest float64 below 1


class Categorical:
    """One of A actions per row, given by unnormalised log-probabilities.

    Half-precision logits are taken to float32 first. A logit of minus infinity masks its action out: it is never drawn
    and adds nothing to the entropy, nor NaN to any gradient. At least one logit of each row must be finite.

    Attributes:
        noise_width: Uniform numbers that one draw of one row takes.
        log_probabilities: Normalised log-probabilities, floating ``[B, A]``.
    """

    noise_width: ClassVar[int] = 1
    __slots__ = ("log_probabilities",)

    def __init__(self, logits: Tensor) -> None:
        """Normalises the logits.

        Args:
            logits: Floating ``[B, A]``; adding a constant to a row changes nothing.

        Raises:
            ValueError: ``logits`` is not a matrix with at least one column.
        """
        if logits.ndim != 2 or logits.shape[1] == 0:
            raise ValueError(f"logits must be [rows, actions] with at least one action, not {list(logits.shape)}")
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        self.log_probabilities = torch.log_softmax(logits, dim=1)

    @property
    def num_actions(self) -> int:
        """A, the number of actions."""
        return self.log_probabilities.shape[1]

    def probabilities(self) -> Tensor:
        """The probability of each action, floating ``[B, A]``."""
        return self.log_probabilities.exp()

    def sample(self, noise: Tensor) -> Tensor:
        """Draws by the inverse of the cumulative distribution.

        Action ``a`` is drawn where ``noise`` lies in ``[P(actions before a), P(actions up to a))``. The cumulative sums
        are float64 and the noise is measured against their last one, not against 1, so that rounding never yields an
        action of probability 0, however close to 1 the noise is, and every action keeps its due however improbable.

        Args:
            noise: Uniform in [0, 1), floating ``[B]``; 1, which float32 noise may have been rounded up to, is taken as
                the largest number below it.

        Returns:
            Actions from 0 to A - 1, int64 ``[B]``.

        Raises:
            ValueError: ``noise`` is not one number per row.
        """
        if noise.shape != self.log_probabilities.shape[:1]:
            raise ValueError(f"noise must be [{len(self.log_probabilities)}], not {list(noise.shape)}")
        cumulative = self.log_probabilities.detach().double().exp().cumsum(dim=1)
        threshold = noise.double().clamp(max=_BELOW_ONE).unsqueeze(1) * cumulative[:, -1:]
        return (cumulative <= threshold).sum(dim=1)  # below A by construction: the last sum is above any threshold

    def mode(self) -> Tensor:
        """The most probable action of each row, the first of equals; int64 ``[B]``."""
        return self.log_probabilities.argmax(dim=1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """The logarithm of each action's probability.

        Args:
            actions: From 0 to A - 1, any integer dtype, ``[B]``.

        Returns:
            Floating ``[B]``; minus infinity for a masked action.

        Raises:
            ValueError: ``actions`` is not one action per row.
        """
        if actions.shape != self.log_probabilities.shape[:1]:
            raise ValueError(f"actions must be [{len(self.log_probabilities)}], not {list(actions.shape)}")
        return self.log_probabilities.gather(1, actions.long().unsqueeze(1)).squeeze(1)

    def entropy(self) -> Tensor:
        """The entropy of each row in nats, floating ``[B]``; from 0 to ``log(A)``."""
        # 0 * -inf would be NaN; a finite stand-in makes both the product and its gradient 0.
        finite = self.log_probabilities.clamp(min=torch.finfo(self.log_probabilities.dtype).min)
        return -(self.log_probabilities.exp() * finite).sum(dim=1)
