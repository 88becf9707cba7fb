"""Every example does what it says, as a process of its own, without a warning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

EXPECTED = {
    "custom_environment.py": "mean return",
    "custom_task.py": "mean return of the last 100 episodes: ",
    "embed.py": 'GET / -> {"status": "running"',
    "microbatcher.py": "requests in ",
}


def test_every_example_is_executed() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_runs(tmp_path: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert EXPECTED[name] in done.stdout
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
