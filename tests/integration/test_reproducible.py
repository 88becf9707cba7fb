"""`force_sync` twice with one seed: the same weights and the same metrics, to the bit."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from aiorl.monitoring.metrics import depends_on_clock
from tests.integration.running import metrics, run_to_end

if TYPE_CHECKING:
    from pathlib import Path


def _weights(exp_dir: Path) -> list[str]:
    files = sorted(exp_dir.glob("checkpoints/*/model.safetensors"))
    assert files
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def _steady(line: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on anything but the seed."""
    figures = {name: value for name, value in line["metrics"].items() if not depends_on_clock(name)}
    return {**figures, "epoch": line["epoch"], "num_samples": line["num_samples"]}


def test_force_sync_is_reproducible_to_the_bit(tmp_path: Path) -> None:
    lines = []
    for name in ("first", "second"):
        done = run_to_end(
            tmp_path / name,
            "trainer.sampling.force_sync=true",
            "task.environment.num_env_workers=2",
            "trainer.max_epochs=12",
            "trainer.checkpoint.only_save_most_recent=false",
        )
        assert done.returncode == 0, done.stderr
        lines.append([_steady(line) for line in metrics(tmp_path / name)])
    assert _weights(tmp_path / "first") == _weights(tmp_path / "second")
    assert lines[0] == lines[1]
    assert len(lines[0]) == 12


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    for seed in (1, 2):
        done = run_to_end(
            tmp_path / str(seed),
            "trainer.sampling.force_sync=true",
            "trainer.max_epochs=2",
            f"trainer.seed={seed}",
        )
        assert done.returncode == 0, done.stderr
    assert _weights(tmp_path / "1") != _weights(tmp_path / "2")
