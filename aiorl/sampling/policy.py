"""Batched acting with a version of the weights of its own. The only file of the sampling folder that knows torch.

The learner *publishes* the weights after an epoch; the rollout *activates* the newest published ones when an epoch opens. Between the
two, acting goes on with the weights it has, so that no action is ever chosen by half-updated ones.

Dimensions: B rows, A actions.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from aiorl.compute.distributions import Categorical

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    Answer = tuple[NDArray[np.int64], NDArray[np.float32]]

NUMPY_ACTIVATIONS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {}
"""The non-linearities of `aiorl.models.mlp`, in place where NumPy can, so that a hidden layer costs no second array."""


def _activation(
    name: str,
) -> Callable[[Callable[[NDArray[Any]], NDArray[Any]]], Callable[[NDArray[Any]], NDArray[Any]]]:
    def register(function: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[NDArray[Any]], NDArray[Any]]:
        NUMPY_ACTIVATIONS[name] = function
        return function

    return register


@_activation("tanh")
def _tanh(x: NDArray[Any]) -> NDArray[Any]:
    np.tanh(x, out=x)
    return x


@_activation("relu")
def _relu(x: NDArray[Any]) -> NDArray[Any]:
    np.maximum(x, 0, out=x)
    return x


@_activation("elu")
def _elu(x: NDArray[Any]) -> NDArray[Any]:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


@_activation("gelu")
def _gelu(x: NDArray[Any]) -> NDArray[Any]:
    inner = np.sqrt(2.0 / np.pi).astype(x.dtype) * (x + 0.044715 * x * x * x)
    gated: NDArray[Any] = 0.5 * x * (1.0 + np.tanh(inner))
    return gated


@_activation("silu")
def _silu(x: NDArray[Any]) -> NDArray[Any]:
    return x * (0.5 * (1.0 + np.tanh(0.5 * x)))  # the logistic function without its overflow


class Acting(Protocol):
    """A back end: how actions are computed from observations."""

    def snapshot(self) -> Any:
        """Copies the learner's weights. Between updates only."""
        ...

    def load(self, weights: Any) -> None:
        """Acts with `weights`, which `snapshot` made, from now on. Between batches only."""
        ...

    def act(self, observations: NDArray[Any], noise: NDArray[np.float64], optimal: bool) -> Answer:
        """Actions ``int64 [B]`` and their log-probabilities ``float32 [B]``.

        Args:
            observations: ``[B, *shape]``.
            noise: Uniform in [0, 1), ``float64 [B]``.
            optimal: The most probable actions instead of sampled ones.
        """
        ...


class NumpyActing:
    """Acts with a stack of linear layers in NumPy: on a CPU, for small batches, several times faster than torch.

    Args:
        layers: From features to logits, in order.
        activation: A key of `NUMPY_ACTIVATIONS`, applied after each layer but the last.
    """

    def __init__(self, layers: Sequence[nn.Linear], activation: str) -> None:
        self._layers = list(layers)
        self._activate = NUMPY_ACTIVATIONS[activation]
        self._weights: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self.load(self.snapshot())

    def snapshot(self) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Copies of (weight transposed ``[in, out]``, bias ``[out]``) of each layer."""
        return [
            (
                np.array(layer.weight.detach().cpu().numpy().T, order="C", copy=True),
                np.array(layer.bias.detach().cpu().numpy(), copy=True),
            )
            for layer in self._layers
        ]

    def load(self, weights: list[tuple[NDArray[Any], NDArray[Any]]]) -> None:
        """Acts with `weights` from now on."""
        self._weights = weights

    def act(self, observations: NDArray[Any], noise: NDArray[np.float64], optimal: bool) -> Answer:
        """See `Acting.act`."""
        num_rows = len(observations)
        *hidden, (weight, bias) = self._weights
        features = observations.reshape(num_rows, -1).astype(weight.dtype, copy=False)
        for layer_weight, layer_bias in hidden:
            product = features @ layer_weight
            product += layer_bias
            features = self._activate(product)
        logits = features @ weight
        logits += bias
        logits -= logits.max(axis=1, keepdims=True)
        weights_of = np.exp(logits, dtype=np.float64)
        if optimal:
            actions = logits.argmax(axis=1)
            total = weights_of.sum(axis=1)
        else:
            cumulative = weights_of.cumsum(axis=1)
            total = cumulative[:, -1]
            actions = (cumulative <= (noise * total)[:, None]).sum(axis=1)
            np.minimum(actions, logits.shape[1] - 1, out=actions)
        log_probs = logits[np.arange(num_rows), actions] - np.log(total)
        return actions, log_probs.astype(np.float32)


class TorchActing:
    """Acts with a copy of the model, whatever it is, through the task's `get_actions`.

    Args:
        model: The learner's model.
        get_actions: ``(model, observations, optimal) -> Categorical | (actions, log-probabilities)``.
        device: Where the copy computes.
    """

    def __init__(
        self,
        model: nn.Module,
        get_actions: Callable[[nn.Module, Tensor, bool], Categorical | tuple[Tensor, Tensor]],
        device: torch.device,
    ) -> None:
        self._learning = model
        self._acting = copy.deepcopy(model).to(device).eval()
        self._acting.requires_grad_(requires_grad=False)
        self._get_actions = get_actions
        self._device = device

    def snapshot(self) -> list[Tensor]:
        """Copies of every parameter and buffer."""
        return [tensor.detach().clone() for tensor in self._learning.state_dict().values()]

    @torch.no_grad()
    def load(self, weights: list[Tensor]) -> None:
        """Acts with `weights` from now on."""
        for tensor, newest in zip(self._acting.state_dict().values(), weights, strict=True):
            tensor.copy_(newest)

    @torch.no_grad()
    def act(self, observations: NDArray[Any], noise: NDArray[np.float64], optimal: bool) -> Answer:
        """See `Acting.act`."""
        rows = torch.tensor(observations, device=self._device)
        chosen = self._get_actions(self._acting, rows, optimal)
        if isinstance(chosen, Categorical):
            actions = chosen.mode() if optimal else chosen.sample(torch.tensor(noise, device=self._device))
            log_probs = chosen.log_prob(actions)
        else:
            actions, log_probs = chosen
        return actions.cpu().numpy().astype(np.int64), log_probs.float().cpu().numpy()


class Policy:
    """The versions of the weights that act.

    Attributes:
        version: The version that acts: the number of the epoch after which it was published, 0 for the first weights.
        published: The newest version published.
    """

    def __init__(self, acting: Acting, *, optimal: bool, version: int = 0) -> None:
        self.version = self.published = version
        self._acting = acting
        self._optimal = optimal
        self._newest: Any = None

    def snapshot(self) -> Any:
        """Copies the learner's weights, in whatever thread, between updates."""
        return self._acting.snapshot()

    def publish(self, version: int, weights: Any) -> None:
        """Makes `weights`, a `snapshot`, the newest version. On the loop, as `activate`, so that the two never meet."""
        self._newest = weights
        self.published = version

    def activate(self) -> None:
        """Acts with the newest published version from now on. Called between batches."""
        if self.version != self.published:
            self._acting.load(self._newest)
            self._newest = None
            self.version = self.published

    def act(
        self, rows: tuple[NDArray[Any], NDArray[np.float64]]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
        """Answers a batch.

        Args:
            rows: Observations ``[B, *shape]`` and noise ``float64 [B]``.

        Returns:
            Actions ``int64 [B]``, their log-probabilities ``float32 [B]``, and the version that chose them ``int64 [B]``.
        """
        observations, noise = rows
        actions, log_probs = self._acting.act(observations, noise, self._optimal)
        return actions, log_probs, np.full(len(actions), self.version)
