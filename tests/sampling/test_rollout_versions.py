"""Every row of a rollout is reported with the version that chose it, also where batches compute in a thread."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from aiorl.compute.device import Placement, TorchSettings
from aiorl.environments.local import LocalGroup
from aiorl.environments.spaces import EnvironmentSpec
from aiorl.learning.acting import in_its_place
from aiorl.models.config import MLPConfig
from aiorl.models.mlp import MLP
from aiorl.sampling.batcher import MicroBatcher
from aiorl.sampling.channel import Channel
from aiorl.sampling.config import SamplingConfig
from aiorl.sampling.policy import NumpyActing, Policy, TorchActing
from aiorl.sampling.rollout import Rollout

if TYPE_CHECKING:
    from torch import Tensor

    from aiorl.sampling.trajectory import SealedEpoch

PATIENCE_S = 30.0


def get_actions(model: Any, observations: Tensor, optimal: bool) -> Any:
    return model.policy(observations)


@pytest.mark.anyio
@pytest.mark.parametrize("back_end", ["torch, in a thread or on the loop", "numpy, on the loop"])
@pytest.mark.parametrize("lag", [0, 1, 2])
async def test_log_probabilities_are_those_of_the_version_reported(lag: int, back_end: str) -> None:
    groups = [LocalGroup(EnvironmentSpec("CartPole-v1"), 4, 4 * index, 1, 0) for index in range(3)]
    config = SamplingConfig(num_epoch_samples=60, max_policy_lag=lag, max_wait_time=0.0)
    torch.manual_seed(0)
    model = MLP(groups[0].info, MLPConfig(name="mlp", hidden_sizes=(8,)))
    weights = {0: [tensor.clone() for tensor in model.state_dict().values()]}
    channel: Channel[SealedEpoch] = Channel(lag + 1)
    async with Placement("acting", TorchSettings(num_threads=1)) as place:
        if back_end.startswith("torch"):
            policy = Policy(TorchActing(model, get_actions, torch.device("cpu")), optimal=False)
            infer: Any = in_its_place(policy, place)
        else:
            policy = Policy(NumpyActing(model.policy_layers(), model.activation), optimal=False)
            infer = policy.act
        async with MicroBatcher(infer, max_batch_size=8, max_wait_time=0.0) as batcher:
            rollout = Rollout(
                groups, info=groups[0].info, config=config, batcher=batcher, policy=policy, channel=channel, seed=5
            )
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(rollout.run())
                seen: set[int] = set()
                for epoch in range(1, 16):
                    async with asyncio.timeout(PATIENCE_S):
                        sealed = await channel.get()
                    batch = sealed.gather()
                    sealed.release(rollout.pool)
                    for version in np.unique(batch.versions).tolist():
                        rows = batch.versions == version
                        expected = _log_probs(model, weights[version], batch.observations[rows], batch.actions[rows])
                        np.testing.assert_allclose(batch.log_probs[rows], expected, atol=1e-5)
                        seen.add(version)
                    with torch.no_grad():
                        for parameter in model.parameters():
                            parameter.add_(0.3 * torch.randn_like(parameter))
                    weights[epoch] = [tensor.clone() for tensor in model.state_dict().values()]
                    policy.publish(epoch, policy.snapshot())
                    rollout.learned(epoch)
                running.cancel()
    assert len(seen) >= 15 - 2 * lag


@torch.no_grad()
def _log_probs(model: MLP, weights: list[Tensor], observations: Any, actions: Any) -> Any:
    """Of `actions` under `weights`, which the model then holds no longer."""
    now = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(dict(zip(now, weights, strict=True)))
    found = model.policy(torch.tensor(observations)).log_prob(torch.tensor(actions)).numpy()
    model.load_state_dict(now)
    return found
