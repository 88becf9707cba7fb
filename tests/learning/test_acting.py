"""Which back end acts, what becomes of compiling that fails, and which version answers a batch that computes in a thread."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from aiorl.compute.config import CompilerConfig
from aiorl.compute.device import Placement, TorchSettings
from aiorl.compute.distributions import Categorical
from aiorl.environments.spaces import ArraySpec, EnvironmentInfo
from aiorl.errors import ConfigError
from aiorl.learning.acting import Compilation, build_acting, in_its_place
from aiorl.models.base import Model
from aiorl.models.config import MLPConfig
from aiorl.models.mlp import MLP
from aiorl.sampling.policy import CompiledActing, NumpyActing, Policy, TorchActing
from aiorl.tasks.ppo import PPO
from tests.integration.running import run_to_end

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CPU = torch.device("cpu")
PATIENCE_S = 30.0
INFO = EnvironmentInfo(ArraySpec((4,), "float32"), ArraySpec((), "int64"), 3, "same_step", None)


def mlp(**options: Any) -> MLP:
    torch.manual_seed(0)
    return MLP(INFO, MLPConfig.model_validate({"hidden_sizes": (8,), **options}))


class Own(MLP):
    """Acts in a way of its own."""

    def policy(self, observations: Tensor) -> Categorical:
        return super().policy(observations * 1.0)


class OwnActions(PPO):
    """Chooses in a way of its own."""

    def get_actions(self, model: Any, observations: Tensor, optimal: bool) -> Categorical:
        chosen: Categorical = model.policy(observations)
        return chosen


class Breaking(PPO):
    """Cannot be compiled in one graph."""

    def get_actions(self, model: Any, observations: Tensor, optimal: bool) -> Categorical:
        torch._dynamo.graph_break()
        chosen: Categorical = model.policy(observations)
        return chosen


def compilation(**compiler: Any) -> Compilation:
    return Compilation(CompilerConfig(model=True, **compiler), INFO.observation, max_rows=16, optimal=False)


@pytest.fixture
def broken_compiler() -> Iterator[str]:
    """The name of a compiler back end that fails."""

    def fail(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler today\nsecond line")

    torch._dynamo.reset()
    torch._dynamo.register_backend(fail, name="broken")
    yield "broken"
    del torch._dynamo.backends.registry._COMPILER_FNS["broken"]
    torch._dynamo.reset()


# ---------------------------------------------------------------------- the choice
def test_numpy_acts_for_the_built_in_mlp_alone() -> None:
    assert isinstance(build_acting(mlp(), PPO(), CPU), NumpyActing)
    assert type(build_acting(Own(INFO, MLPConfig()), PPO(), CPU)) is TorchActing
    assert type(build_acting(mlp(), OwnActions(), CPU)) is TorchActing


def test_torch_acts_for_a_large_mlp() -> None:
    for hidden_sizes, back_end in (((256, 128), NumpyActing), ((256, 256), TorchActing)):
        large = MLP(INFO, MLPConfig.model_validate({"name": "mlp", "hidden_sizes": hidden_sizes}))
        assert type(build_acting(large, PPO(), CPU)) is back_end


def test_compiled_acting_is_used_where_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "aiorl"):
        acting = build_acting(mlp(), PPO(), CPU, compilation(backend="eager", fullgraph=True))
    assert isinstance(acting, CompiledActing)
    assert "acting was compiled by eager" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_where_compiling_fails_one_warning_says_so_and_acting_goes_on(
    broken_compiler: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(build_acting(mlp(), PPO(), CPU, compilation(backend=broken_compiler)), NumpyActing)
        assert type(build_acting(mlp(), OwnActions(), CPU, compilation(backend=broken_compiler))) is TorchActing
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2
    assert warnings[0].startswith("acting is not compiled: broken failed: ")
    assert "no compiler today" in warnings[0]
    assert "\n" not in warnings[0]


def test_a_graph_break_is_taken_where_it_is_not_refused() -> None:
    torch._dynamo.reset()  # what was compiled for another model of this class is used again, whatever the flag
    assert isinstance(build_acting(mlp(), Breaking(), CPU, compilation(backend="eager")), CompiledActing)


def test_a_graph_break_is_refused_where_that_is_asked_for() -> None:
    torch._dynamo.reset()
    with pytest.raises(ConfigError, match=r"trainer\.compiler\.fullgraph"):
        build_acting(mlp(), Breaking(), CPU, compilation(backend="eager", fullgraph=True))


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_acting_computes_the_policy_head_only(shared_trunk: bool) -> None:
    model = mlp(shared_trunk=shared_trunk)
    called: list[str] = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: called.append(name))  # the acting copy keeps the hooks
    acting = TorchActing(model, PPO().get_actions, CPU)
    acting.act(np.zeros((3, 4), np.float32), np.zeros(3), False)
    assert called == ["policy_trunk.0", "policy_head"]


def test_a_model_that_changes_its_observations_is_told() -> None:
    """They are not copied on their way to it, and are stored after it has acted."""

    class Scaling(Own):
        def policy(self, observations: Tensor) -> Categorical:
            return super().policy(observations.div_(2.0))

    acting = TorchActing(Scaling(INFO, MLPConfig()), PPO().get_actions, CPU)
    with pytest.raises(ValueError, match="changed its observations in place"):
        acting.act(np.ones((3, 4), np.float32), np.zeros(3), False)


# ---------------------------------------------------------------------- versions
class Held(Model):
    """Gives the bias as logits, and waits between its two actions while it is held."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))
        self.hold: Callable[[], None] = _never

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        twin = Held()
        twin.bias = nn.Parameter(self.bias.detach().clone())
        twin.hold = lambda: self.hold()
        return twin

    def policy(self, observations: Tensor) -> Categorical:
        first = self.bias[0].clone()
        self.hold()
        return Categorical(torch.stack((first, self.bias[1])).expand(len(observations), 2))

    def value(self, observations: Tensor) -> Tensor:
        return observations.sum(1)


def _never() -> None:
    pass


@pytest.mark.anyio
async def test_a_batch_that_computes_while_an_epoch_opens_is_answered_by_the_version_that_it_began_with() -> None:
    loop = asyncio.get_running_loop()
    begun, let_go = asyncio.Event(), threading.Event()

    def hold() -> None:
        loop.call_soon_threadsafe(begun.set)
        assert let_go.wait(PATIENCE_S)

    model = Held()
    policy = Policy(TorchActing(model, PPO().get_actions, CPU), optimal=False)
    rows = np.zeros((3, 4), np.float32), np.full(3, 0.9)
    async with Placement("acting", TorchSettings(num_threads=1)) as place, asyncio.TaskGroup() as tasks:
        infer = in_its_place(policy, place)
        model.hold = hold
        computing = tasks.create_task(_awaited(infer(rows)))
        await begun.wait()
        with torch.no_grad():
            model.bias.copy_(torch.tensor([3.0, 1.0]))
        policy.publish(1, policy.snapshot())
        policy.activate()
        assert policy.version == 1
        let_go.set()
        actions, log_probs, versions = await computing
        assert versions.tolist() == [0, 0, 0]
        assert actions.tolist() == [1, 1, 1]
        np.testing.assert_allclose(log_probs, np.log([0.5, 0.5, 0.5]), rtol=1e-6)
        model.hold = _never
        actions, log_probs, versions = await infer(rows)
        assert versions.tolist() == [1, 1, 1]
        assert actions.tolist() == [1, 1, 1]
        np.testing.assert_allclose(log_probs, np.full(3, -np.log1p(np.exp(2.0))), rtol=1e-6)


async def _awaited(answer: Any) -> Any:
    return await answer


@pytest.mark.anyio
async def test_large_weights_are_loaded_in_the_acting_thread() -> None:
    class Slow(TorchActing):
        threads: list[int] = []  # noqa: RUF012 - of this test alone

        def load(self, weights: Any) -> None:
            self.threads.append(threading.get_ident())
            until = time.thread_time() + 0.03
            while time.thread_time() < until:  # the length of the computation is what is tested
                pass
            super().load(weights)

    acting = Slow(mlp(), PPO().get_actions, CPU)
    policy = Policy(acting, optimal=False)
    rows = np.zeros((1, 4), np.float32), np.zeros(1)
    async with Placement("acting", TorchSettings(num_threads=1)) as place:
        infer = in_its_place(policy, place)
        for version in range(1, 9):
            policy.publish(version, policy.snapshot())
            policy.activate()
            _, _, versions = await infer(rows)
            assert versions.tolist() == [version]
    assert len(acting.threads) == 8
    assert threading.get_ident() not in acting.threads


# ---------------------------------------------------------------------- whole runs
def test_a_run_acts_compiled(tmp_path: Path) -> None:
    compiler = ("trainer.compiler.model=true", "trainer.compiler.backend=eager", "trainer.compiler.fullgraph=true")
    ended = run_to_end(tmp_path / "run", *compiler, "trainer.max_epochs=3", "task.environment.num_env_workers=1")
    assert ended.returncode == 0, ended.stderr
    printed = ended.stdout + ended.stderr
    assert "acting was compiled by eager" in printed
    assert "WARNING" not in printed


def test_a_run_without_a_compiler_acts_without_one_after_a_warning(tmp_path: Path) -> None:
    arguments = [
        *("trainer.compiler.model=true", "trainer.max_epochs=2", "trainer.sampling.num_epoch_samples=256"),
        *("task.environment.num_env_workers=0", "task.minibatch_size=128", "model.hidden_sizes=[8]"),
        *("logger.tensorboard=false", f"trainer.exp_dir={tmp_path / 'run'}"),
    ]
    ended = subprocess.run(
        [sys.executable, "-m", "aiorl", "run", *(part for each in arguments for part in ("--set", each))],
        env={**os.environ, "CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    printed = ended.stdout + ended.stderr
    assert printed.count("WARNING") == 1
    assert "acting is not compiled: inductor failed: InvalidCxxCompiler" in printed
