"""Clips: readable by others, whole or not there."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
from imageio_ffmpeg import count_frames_and_secs, get_ffmpeg_exe
from PIL import Image

from aiorl.errors import ConfigError
from aiorl.monitoring.video import record_episode, recording

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def bar(width: int, height: int = 48) -> NDArray[np.uint8]:
    """A white bar of a width on black."""
    frame = np.zeros((height, 64, 3), np.uint8)
    frame[:, :width] = 255
    return frame


def test_a_gif_holds_every_frame(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "clip.GIF"
    with recording(path, frames_per_s=10) as clip:
        for width in (0, 10, 64):
            clip.add(bar(width))
    with Image.open(path) as image:
        frames: Any = image
        assert (frames.n_frames, frames.info["duration"], frames.size) == (3, 100, (64, 48))
        for number, width in enumerate((0, 10, 64)):
            frames.seek(number)
            assert np.asarray(frames.convert("RGB")).tolist() == bar(width).tolist()


def test_a_gif_is_never_faster_than_players_allow(tmp_path: Path) -> None:
    with recording(tmp_path / "clip.gif", frames_per_s=1000) as clip:
        clip.add(bar(0))
        clip.add(bar(1))
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.info["duration"] == 20


def test_an_mp4_holds_every_frame_and_even_sizes(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with recording(path, frames_per_s=10) as clip:
        for width in (0, 32, 64):
            clip.add(bar(width, height=49))
    assert count_frames_and_secs(str(path)) == (3, pytest.approx(0.3))
    decode = [get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "gray", "-"]
    pixels = np.frombuffer(subprocess.run(decode, capture_output=True, check=True).stdout, np.uint8)
    assert pixels.reshape(3, 48, 64).mean(axis=(1, 2)) / 255 == pytest.approx([0.0, 0.5, 1.0], abs=0.03)


@pytest.mark.parametrize("name", ["clip.gif", "clip.mp4"])
def test_what_fails_leaves_no_file(tmp_path: Path, name: str) -> None:
    def fail() -> None:
        with recording(tmp_path / name, frames_per_s=10) as clip:
            clip.add(bar(3))
            raise RuntimeError("the simulator is gone")

    with pytest.raises(RuntimeError, match="the simulator is gone"):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "module"), [("clip.gif", "PIL.Image"), ("clip.mp4", "imageio_ffmpeg")])
def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with (
        pytest.raises(ConfigError, match=r'not installed; pip install "aiorl\[video\]"'),
        recording(tmp_path / name, frames_per_s=10),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            ConfigError, match=r"--video = .*clip\.gif: cannot be written: File exists: .*file; name another"
        ),
        recording(tmp_path / "file" / "clip.gif", frames_per_s=10),
    ):
        pass


class Strange:
    """Renders what it was given."""

    metadata: ClassVar[dict[str, Any]] = {}

    def __init__(self, picture: Any) -> None:
        self._picture = picture

    def reset(self, *, seed: int) -> tuple[int, dict[str, Any]]:
        return seed, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        return action, 0.0, False, False, {}

    def render(self) -> Any:
        if isinstance(self._picture, Exception):
            raise self._picture
        return self._picture


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (None, "renders NoneType, not an array"),
        (np.zeros((4, 4), np.uint8), "renders ndarray, not an array uint8 "),
        (RuntimeError("pygame is not installed"), r"cannot be rendered: pygame is not installed; pip install"),
    ],
)
def test_what_is_no_picture_is_a_fault(tmp_path: Path, picture: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        record_episode(tmp_path / "clip.gif", Strange(picture), lambda observation: observation, seed=1, max_steps=3)
    assert list(tmp_path.iterdir()) == []


def test_a_clip_ends_after_max_steps(tmp_path: Path) -> None:
    chosen: list[int] = []

    def choose(observation: int) -> int:
        chosen.append(observation)
        return observation + 1

    record_episode(tmp_path / "clip.gif", Strange(bar(5)), choose, seed=7, max_steps=3)
    assert chosen == [7, 8, 9]
