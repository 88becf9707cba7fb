"""Batched acting with a version of the weights of its own. The only file of the sampling folder that knows torch.

The learner *publishes* the weights after an epoch; the rollout *activates* the newest published ones when an epoch opens. Between the
two, acting goes on with the weights it has, so that no action is ever chosen by half-updated ones.

Dimensions: B rows, A actions.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from aiorl.compute.compiler import compiled, compiling, row_buckets
from aiorl.compute.distributions import Categorical

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from aiorl.compute.config import CompilerConfig
    from aiorl.environments.spaces import ArraySpec

    Answer = tuple[NDArray[np.int64], NDArray[np.float32]]
    GetActions = Callable[[nn.Module, Tensor, bool], Categorical | tuple[Tensor, Tensor]]

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


_SERIAL_SIZE = 2**18
"""Multiplications up to which NumPy's BLAS takes one thread. With more it wakes its others, which then spin for 30 ms on the cores
that workers and the learner need: on two busy cores 256 rows by a 64 x 64 layer took 2 ms instead of 0.02."""


def block_rows(weight_size: int) -> int:
    """Rows that can be multiplied by a matrix of `weight_size` elements on one thread."""
    return max(1, _SERIAL_SIZE // weight_size)


def _product(rows: NDArray[Any], weight: NDArray[Any], out: NDArray[Any]) -> NDArray[Any]:
    """``rows @ weight``, ``[B, in]`` by ``[in, out]``, on one thread: block after block of rows, within one call."""
    block = block_rows(weight.size)
    if len(rows) <= block:
        return np.dot(rows, weight, out=out)
    whole = len(rows) // block * block
    blocks = (whole // block, block, -1)
    np.matmul(rows[:whole].reshape(blocks), weight, out=out[:whole].reshape(blocks))
    if whole < len(rows):
        np.dot(rows[whole:], weight, out=out[whole:])
    return out


class NumpyActing:
    """Acts with a stack of linear layers in NumPy: on a CPU, for small batches, several times faster than torch.

    Hidden layers are computed in arrays that are kept from call to call, so it serves one call at a time.

    Args:
        layers: From features to logits, in order.
        activation: A key of `NUMPY_ACTIVATIONS`, applied after each layer but the last.
    """

    def __init__(self, layers: Sequence[nn.Linear], activation: str) -> None:
        self._layers = list(layers)
        self._activate = NUMPY_ACTIVATIONS[activation]
        self._weights: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self._hidden: list[NDArray[Any]] = []  # of each hidden layer, rows of the largest batch so far
        self._rows = np.arange(0)  # as many
        self.load(self.snapshot())

    def snapshot(self) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Copies of (weight transposed ``[in, out]``, bias ``[out]``) of each layer; of the last ``[A, in]`` and ``[A, 1]``."""
        weights = [
            (
                np.array(layer.weight.detach().cpu().numpy().T, order="C", copy=True),
                np.array(layer.bias.detach().cpu().numpy(), copy=True),
            )
            for layer in self._layers
        ]
        weight, bias = weights[-1]
        weights[-1] = np.ascontiguousarray(weight.T), bias[:, None]
        return weights

    def load(self, weights: list[tuple[NDArray[Any], NDArray[Any]]]) -> None:
        """Acts with `weights` from now on."""
        self._weights = weights

    def act(self, observations: NDArray[Any], noise: NDArray[np.float64], optimal: bool) -> Answer:
        """See `Acting.act`."""
        num_rows = len(observations)
        if num_rows > len(self._rows):
            self._make_room(num_rows)
        *hidden, (weight, bias) = self._weights
        features = observations.reshape(num_rows, -1).astype(weight.dtype, copy=False)
        for (layer_weight, layer_bias), room in zip(hidden, self._hidden, strict=True):
            product = _product(features, layer_weight, room[:num_rows])
            product += layer_bias
            features = self._activate(product)
        # From here on an action per row, [A, B]: NumPy reduces a short first axis several times faster than a short last one.
        if weight.size * num_rows <= _SERIAL_SIZE:
            logits = np.dot(weight, features.T)
        else:
            logits = np.ascontiguousarray(
                _product(features, weight.T, np.empty((num_rows, len(weight)), weight.dtype)).T
            )
        logits += bias
        logits -= np.maximum.reduce(logits, axis=0)
        cumulative = np.add.accumulate(np.exp(logits, dtype=np.float64), axis=0)
        total = cumulative[-1]
        passed = cumulative[:-1] <= noise * total
        actions = logits.argmax(axis=0) if optimal else np.add.reduce(passed, axis=0, dtype=np.int64)
        log_probs = logits[actions, self._rows[:num_rows]] - np.log(total)
        return actions, log_probs.astype(np.float32)

    def _make_room(self, num_rows: int) -> None:
        """Above some 128 KB the allocator returns memory to the system each time, and faulting it in again costs half the call."""
        self._hidden = [np.empty((num_rows, len(bias)), bias.dtype) for _, bias in self._weights[:-1]]
        self._rows = np.arange(num_rows)


class TorchActing:
    """Acts with a copy of the model, whatever it is, through the task's `get_actions`.

    Args:
        model: The learner's model.
        get_actions: ``(model, observations, optimal) -> Categorical | (actions, log-probabilities)``.
        device: Where the copy computes.
    """

    def __init__(self, model: nn.Module, get_actions: GetActions, device: torch.device) -> None:
        self._learning = model
        self._acting = copy.deepcopy(model).to(device).eval()
        self._acting.requires_grad_(requires_grad=False)
        self._get_actions = get_actions
        self._device = device

    def snapshot(self) -> list[Tensor]:
        """Copies of every parameter and buffer."""
        return [tensor.detach().clone() for tensor in _tensors(self._learning)]

    @torch.no_grad()
    def load(self, weights: list[Tensor]) -> None:
        """Acts with `weights` from now on."""
        for tensor, newest in zip(_tensors(self._acting), weights, strict=True):
            tensor.copy_(newest)

    @torch.no_grad()
    def act(self, observations: NDArray[Any], noise: NDArray[np.float64], optimal: bool) -> Answer:
        """See `Acting.act`.

        Raises:
            ValueError: The model changed its observations in place; they are not copied on their way to it.
        """
        rows = _shared(observations)
        answer = self._choose(rows.to(self._device), _shared(noise).to(self._device), optimal)
        if rows._version:
            raise ValueError("the model changed its observations in place: let it work on a copy of them")
        return to_host(*answer)

    def _choose(self, observations: Tensor, noise: Tensor, optimal: bool) -> tuple[Tensor, Tensor]:
        """Actions ``int64 [B]`` and their log-probabilities ``float32 [B]``, on the device."""
        chosen = self._get_actions(self._acting, observations, optimal)
        if isinstance(chosen, Categorical):
            actions = chosen.mode() if optimal else chosen.sample(noise)
            log_probs = chosen.log_prob(actions)
        else:
            actions, log_probs = chosen
        return actions.long(), log_probs.float()


class CompiledActing(TorchActing):
    """Acts as `TorchActing` does, from observations to actions in one function compiled by torch.

    A batch is padded to the next of a few numbers of rows, so that the compiled function sees few shapes; what it answers to
    the rows added is cut off. Where it is compiled for dynamic shapes only batches below the smallest of these are padded.

    Args:
        model: As in `TorchActing`.
        get_actions: As in `TorchActing`.
        device: As in `TorchActing`.
        compiler: How to compile.
        observation: Of one row.
        max_rows: Of the largest batch; a larger one is computed in parts.
    """

    def __init__(
        self,
        model: nn.Module,
        get_actions: GetActions,
        device: torch.device,
        *,
        compiler: CompilerConfig,
        observation: ArraySpec,
        max_rows: int,
    ) -> None:
        super().__init__(model, get_actions, device)
        self._buckets = row_buckets(max_rows)
        self._dynamic = compiler.dynamic
        self._compiled = compiled(self._choose, compiler)
        self._observations = np.zeros((max_rows, *observation.shape), observation.dtype)
        self._noise = np.zeros(max_rows)

    def warm_up(self, optimal: bool) -> None:
        """Compiles for every number of rows that will be. Takes seconds for each, in the thread and settings that it is called in.

        Raises:
            Exception: What the compiler raised.
        """
        with compiling():
            for num_rows in self._buckets:
                self.act(self._observations[:num_rows], self._noise[:num_rows], optimal)

    @torch.no_grad()
    def act(self, observations: NDArray[Any], noise: NDArray[np.float64], optimal: bool) -> Answer:
        """See `Acting.act`."""
        largest = self._buckets[-1]
        if len(observations) <= largest:
            return self._act(observations, noise, optimal)
        starts = range(0, len(observations), largest)
        parts = [self._act(observations[at : at + largest], noise[at : at + largest], optimal) for at in starts]
        actions, log_probs = zip(*parts, strict=True)
        return np.concatenate(actions), np.concatenate(log_probs)

    def _act(self, observations: NDArray[Any], noise: NDArray[np.float64], optimal: bool) -> Answer:
        num_rows = len(observations)
        self._observations[:num_rows] = observations
        self._noise[:num_rows] = noise
        padded = self._buckets[bisect_left(self._buckets, num_rows)]
        if self._dynamic:
            padded = max(num_rows, self._buckets[0])
        rows = torch.from_numpy(self._observations[:padded]).to(self._device)
        numbers = torch.from_numpy(self._noise[:padded]).to(self._device)
        actions, log_probs = to_host(*self._compiled(rows, numbers, optimal))
        return actions[:num_rows], log_probs[:num_rows]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _shared(array: NDArray[Any]) -> Tensor:
    """The array as a tensor, without a copy where it may be written to: torch has no tensors that may not."""
    return torch.from_numpy(array) if array.flags.writeable else torch.tensor(array)


def to_host(actions: Tensor, log_probs: Tensor) -> Answer:
    """Both in one transfer, since each waits for the device: float64 holds either exactly."""
    if actions.device.type == "cpu":
        return actions.numpy(), log_probs.numpy()
    together = torch.stack((actions.double(), log_probs.double())).cpu().numpy()
    return together[0].astype(np.int64), together[1].astype(np.float32)


class Policy:
    """The versions of the weights that act.

    `publish` and `activate` are called on the loop, `load` and `act` wherever batches are computed, one call at a time: a batch that
    computes in a thread while another version is activated is answered wholly by the weights that it began with.

    Attributes:
        version: The version that was activated last, which the next batch is answered by: the number of the epoch after which it was
            published, 0 for the first weights.
        published: The newest version published.
    """

    def __init__(self, acting: Acting, *, optimal: bool, version: int = 0) -> None:
        self.version = self.published = version
        self._acting = acting
        self._optimal = optimal
        self._newest: Any = None
        self._activated: deque[tuple[int, Any]] = deque(maxlen=1)  # for the acting thread to take
        self._versions = np.full(1, version)  # of the weights that are loaded, repeated

    def snapshot(self) -> Any:
        """Copies the learner's weights, in whatever thread, between updates."""
        return self._acting.snapshot()

    def publish(self, version: int, weights: Any) -> None:
        """Makes `weights`, a `snapshot`, the newest version. On the loop, as `activate`, so that the two never meet."""
        self._newest = weights
        self.published = version

    def activate(self) -> None:
        """Acts with the newest published version from the next batch on."""
        if self.version != self.published:
            self._activated.append((self.published, self._newest))
            self._newest = None
            self.version = self.published

    @property
    def must_load(self) -> bool:
        """Whether a version was activated and not loaded yet."""
        return bool(self._activated)

    def load(self) -> None:
        """Loads the version that was activated. `act` does so itself; apart from it, it can be given another place to run in."""
        if self._activated:
            version, weights = self._activated.pop()
            self._acting.load(weights)
            self._versions = np.full(len(self._versions), version)

    def act(
        self, rows: tuple[NDArray[Any], NDArray[np.float64]]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
        """Answers a batch.

        Args:
            rows: Observations ``[B, *shape]`` and noise ``float64 [B]``.

        Returns:
            Actions ``int64 [B]``, their log-probabilities ``float32 [B]``, and the version that chose them ``int64 [B]``, which is
            not to be written to.
        """
        self.load()
        observations, noise = rows
        if len(noise) > len(self._versions):
            self._versions = np.full(len(noise), self._versions[0])
        actions, log_probs = self._acting.act(observations, noise, self._optimal)
        return actions, log_probs, self._versions[: len(noise)]
