"""Clips of environments being played, as ``.gif`` or ``.mp4``, written with what the extra ``video`` installs.

Dimensions: H height and W width of a frame, in pixels.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from aiorl.errors import ConfigError, Fault

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL.Image import Image

_INSTALL: Final = 'pip install "aiorl[video]"'

_SHORTEST_GIF_FRAME_MS: Final = 20  # players slow down what is to be shown for less


def record_episode(path: Path, environment: Any, choose: Callable[[Any], int], *, seed: int, max_steps: int) -> None:
    """Plays an environment's first episode and records it, the state after its last step included.

    Args:
        path: See `recording`.
        environment: Renders ``rgb_array``; its ``metadata["render_fps"]`` says how fast the clip is shown.
        choose: The action for an observation.
        seed: Of the reset.
        max_steps: After which the clip ends at the latest.

    Raises:
        ConfigError: It cannot be rendered, or what `recording` raises.
    """
    frames_per_s = float(environment.metadata.get("render_fps") or 30)
    with recording(path, frames_per_s=frames_per_s) as clip:
        observation, _ = environment.reset(seed=seed)
        clip.add(_frame(environment, path))
        for _ in range(max_steps):
            observation, _, terminated, truncated, _ = environment.step(choose(observation))
            clip.add(_frame(environment, path))
            if terminated or truncated:
                break


def _frame(environment: Any, path: Path) -> NDArray[np.uint8]:
    try:
        frame = environment.render()
    except Exception as error:
        raise unrenderable(path, f"cannot be rendered: {error}", _INSTALL) from error
    if not (isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3):
        raise unrenderable(path, f"renders {type(frame).__name__}, not an array uint8 [height, width, 3]")
    return frame


def unrenderable(path: Path, message: str, remedy: str = "") -> ConfigError:
    """The error that no clip can be made, because of what the message says of the environment."""
    return _fault(path, f"the environment {message}", remedy)


class Clip(Protocol):
    """A clip that is being recorded."""

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Adds a frame, uint8 ``[H, W, 3]``; all are of one size."""

    def close(self, *, complete: bool) -> None:
        """Writes what has not been written yet, where the clip is complete, and lets go of everything."""


@contextmanager
def recording(path: Path, *, frames_per_s: float) -> Iterator[Clip]:
    """A clip to add frames to, which lies under ``path`` when the context is left, and does not if it fails.

    Blocks on the disk. A ``.gif`` is held in memory until then, a byte per pixel; an ``.mp4`` is not.

    Args:
        path: Ends in ``.gif`` or ``.mp4``; an earlier file is replaced.
        frames_per_s: How fast to show it.

    Raises:
        ConfigError: Another ending, a library that is not installed, or a file that cannot be written.
    """
    kinds: dict[str, Callable[[Path, float], Clip]] = {".gif": _Gif, ".mp4": _Mp4}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise _fault(path, "is neither a .gif nor an .mp4", "name one of these")
    try:
        clip = kind(path, frames_per_s)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except ImportError as error:
        raise _fault(path, f"cannot be written: {error.name} is not installed", _INSTALL) from error
    except OSError as error:
        raise _fault(path, f"cannot be written: {error.strerror}: {error.filename}", "name another file") from error
    try:
        yield clip
        clip.close(complete=True)
    except BaseException:  # no torn clip stays, whatever happened; raised again
        clip.close(complete=False)
        with suppress(OSError):
            path.unlink()
        raise


def _fault(path: Path, message: str, remedy: str) -> ConfigError:
    return ConfigError([Fault("--video", message, str(path), remedy)])


class _Gif:
    """Frames of 256 colours, each with a palette of its own."""

    def __init__(self, path: Path, frames_per_s: float) -> None:
        from PIL.Image import Quantize, fromarray

        self._as_image = fromarray
        self._method = Quantize.FASTOCTREE  # 2 ms a frame of 600 by 400, where the default takes 11
        self._path = path
        self._frame_ms = max(_SHORTEST_GIF_FRAME_MS, round(1000 / frames_per_s))
        self._frames: list[Image] = []

    def add(self, frame: NDArray[np.uint8]) -> None:
        self._frames.append(self._as_image(frame).quantize(method=self._method))

    def close(self, *, complete: bool) -> None:
        frames, self._frames = self._frames, []
        if not complete or not frames:
            return
        first, *others = frames
        first.save(self._path, format="GIF", save_all=True, append_images=others, duration=self._frame_ms, loop=0)


class _Mp4:
    """H.264, in colours that every player shows, encoded by ffmpeg while frames come."""

    def __init__(self, path: Path, frames_per_s: float) -> None:
        from imageio_ffmpeg import write_frames

        self._write_frames = write_frames
        self._path = path
        self._frames_per_s = frames_per_s
        self._encoder: Generator[None, Any, None] | None = None

    def add(self, frame: NDArray[np.uint8]) -> None:
        height, width = (size & ~1 for size in frame.shape[:2])  # the format has no odd sizes
        if self._encoder is None:
            self._encoder = self._write_frames(
                str(self._path), (width, height), fps=self._frames_per_s, macro_block_size=2
            )
            self._encoder.send(None)
        self._encoder.send(np.ascontiguousarray(frame[:height, :width]))

    def close(self, *, complete: bool) -> None:
        if self._encoder is not None:
            self._encoder.close()
