"""Checkpoints on disk: written whole or not at all, verified when read, never overwritten.

A checkpoint is a folder, ``<n>_step_<num_steps>``, where n counts the saves of a run; the highest n is the newest,
also when two saves fall on one step or a run went back to an older checkpoint. It holds

- ``model.safetensors``: the model's weights;
- ``training.pt``: optimizer, scheduler, counters and the rest, by ``torch.save``, read with ``weights_only=True``;
- ``manifest.json``: the format's number, and size and sha256 of the other two.

A save writes and fsyncs all of it in a folder called ``.saving_<name>``, renames that, and fsyncs the parent: whatever
kills it leaves the earlier checkpoints as they were, and at most a ``.saving_`` folder, which the next save removes.

| hand-off        | bound      | when it is full                                  |
|-----------------|------------|--------------------------------------------------|
| ``save``        | one save   | the next one waits                               |
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import itertools
import json
import logging
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 - the name of what torch raises when it refuses; nothing is unpickled
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from aiorl.errors import CheckpointCorrupt, CheckpointError, CheckpointMissing
from aiorl.learning.snapshot import Contents

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from aiorl.learning.snapshot import Snapshot

T = TypeVar("T")

logger = logging.getLogger(__name__)

FORMAT = 1
_MODEL, _TRAINING, _MANIFEST = "model.safetensors", "training.pt", "manifest.json"
_NAME = re.compile(r"(\d+)_step_\d+")
_SAVING, _DELETING = ".saving_", ".deleting_"


@dataclass(frozen=True)
class Loaded:
    """What was read, and where from; tensors are on the CPU.

    Optimizer and scheduler are both built before their states are loaded into them: building a scheduler sets the
    optimizer's learning rate.
    """

    path: Path
    contents: Contents


class CheckpointStore:
    """The checkpoints of one run.

    One store saves into a folder at a time (the run's folder is locked for that); any number may read beside it.

    Args:
        folder: The run's ``checkpoints`` folder; made by the first save, in the run's folder, which has to be there.
        only_most_recent: Keep the newest and its predecessor; else all.
    """

    def __init__(self, folder: Path, *, only_most_recent: bool) -> None:
        self.folder = folder
        self.only_most_recent = only_most_recent
        self._saving = asyncio.Lock()
        self._sound: dict[str, bool] = {}  # by name: what this store wrote, or read, or tried to

    async def save(self, snapshot: Snapshot) -> Path:
        """Write a snapshot in a thread of its own and return the checkpoint's folder.

        The snapshot is released when this ends, however it ends. Cancelled, the writing stops at the next file and its
        thread is joined first; what is on disk then is a whole checkpoint or none.

        Raises:
            CheckpointError: Nothing was saved: the disk is full, the folder cannot be written, or the like. Earlier
                checkpoints are untouched, and the next save starts afresh.
        """
        try:
            async with self._saving:
                contents = snapshot.contents
                abandoned = threading.Event()
                return await _joined(lambda: self._write(contents, abandoned), abandoned)
        finally:
            snapshot.release()

    def newest(self) -> Path | None:
        """The newest checkpoint's folder, unverified; None where there is none."""
        return next(iter(_saved(self.folder)), None)

    def load(self, path: Path | None = None) -> Loaded:
        """Read and verify a checkpoint; blocks (disk and hashing), so that a running loop calls it in a thread.

        Args:
            path: A checkpoint's folder; None for the newest that is sound: one that is not is named in a warning and
                the one before it is used.

        Raises:
            CheckpointMissing: There is none, or not this one.
            CheckpointCorrupt: This one, or every one, is not what was written.
        """
        return _load(path) if path is not None else _newest_sound(self.folder, _load, self._sound)

    def _write(self, contents: Contents, abandoned: threading.Event) -> Path:
        try:
            self.folder.mkdir(exist_ok=True)  # and no parent: a run whose folder was removed leaves no half of one
            self._sweep()
            newest = self.newest()
            number = int(newest.name.partition("_")[0]) + 1 if newest is not None else 1
            path = self.folder / f"{number:06d}_step_{contents.state['num_steps']}"
            temporary = self.folder / f"{_SAVING}{path.name}"
            try:
                _write_files(temporary, contents, abandoned)
                temporary.rename(path)
            except BaseException:  # no half-written folder stays, whatever happened; raised again
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            _fsync(self.folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            why = _cause(error) if self.folder.parent.exists() else f"{self.folder.parent} is gone"
            raise CheckpointError(f"cannot save a checkpoint in {self.folder}: {why}") from error
        self._sound[path.name] = True
        self._retain()
        return path

    def _sweep(self) -> None:
        """Remove what killed saves and killed removals left."""
        for path in self.folder.iterdir():
            if path.name.startswith((_SAVING, _DELETING)):
                shutil.rmtree(path, ignore_errors=True)

    def _retain(self) -> None:
        """Keep the newest two that are sound: a corrupt one is nothing to fall back on."""
        saved = _saved(self.folder)
        if not self.only_most_recent or len(saved) <= 2:
            return
        kept = list(itertools.islice(filter(self._is_sound, saved), 2))
        for path in saved:
            if path not in kept:
                doomed = self.folder / f"{_DELETING}{path.name}"
                try:
                    path.rename(doomed)  # at once, so that a reader sees a whole checkpoint or none
                    shutil.rmtree(doomed)
                except OSError as error:
                    logger.warning("cannot remove the old checkpoint %s: %s", path, error)

    def _is_sound(self, path: Path) -> bool:
        """Whether a checkpoint is what was written; an earlier run's is read through for it, once."""
        if path.name not in self._sound:
            try:
                manifest = _read_manifest(path)
                for name in manifest:
                    _read_verified(path, name, manifest)
            except CheckpointError as error:
                logger.warning("%s; it is removed, the one before it is kept", error)
                self._sound[path.name] = False
            else:
                self._sound[path.name] = True
        return self._sound[path.name]


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a model's weights, on the CPU; blocks.

    Args:
        path: A checkpoint's folder, a run's folder or its ``checkpoints`` (the newest sound one), or a
            ``.safetensors`` file.

    Raises:
        CheckpointMissing: There are none at that place.
        CheckpointCorrupt: What is there is not what was written.
    """
    return _weights(path, _load_weights, lambda file: _parse_weights(file, _read(file)))


def check_weights(path: str | Path) -> None:
    """Finds what keeps `load_weights` from reading that place, as far as sizes and headers tell: no tensor is read.

    Raises:
        CheckpointMissing: There are none at that place.
        CheckpointCorrupt: What is there is not what was written.
    """
    _weights(path, _look_into, _look_at_header)


def _weights(path: str | Path, of_checkpoint: Callable[[Path], T], of_file: Callable[[Path], T]) -> T:
    path = Path(path).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        return of_file(path)
    if (path / _MANIFEST).is_file():
        return of_checkpoint(path)
    for folder in (path / "checkpoints", path):
        if _saved(folder):
            return _newest_sound(folder, of_checkpoint, {})
    raise CheckpointMissing(f"{path} is no checkpoint, no run's folder with one, and no .safetensors file")


async def _joined(work: Callable[[], T], abandoned: threading.Event) -> T:
    """Run ``work`` in a thread of its own that never outlives this call; cancelled, ``abandoned`` asks it to stop."""
    loop = asyncio.get_running_loop()
    cancelled: asyncio.CancelledError | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="aiorl-checkpoint") as executor:
        future = loop.run_in_executor(executor, work)
        while not future.done():
            try:
                await asyncio.wait({future})
            except asyncio.CancelledError as error:
                abandoned.set()
                cancelled = error
    failure = future.exception()
    if cancelled is not None:
        if isinstance(failure, CheckpointError):
            logger.warning("%s", failure)
        raise cancelled
    return future.result()


class _Abandoned(Exception):
    """The save was cancelled."""


def _write_files(folder: Path, contents: Contents, abandoned: threading.Event) -> None:
    """Make the folder and write the three files, each fsynced."""

    def seal(path: Path) -> dict[str, Any]:
        _fsync(path)
        if abandoned.is_set():
            raise _Abandoned
        with path.open("rb") as file:
            return {"size_bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    folder.mkdir()
    training = {
        "optimizer": contents.optimizer,
        "scheduler": contents.scheduler,
        "state": contents.state,
        "extra": contents.extra,
        "exact": contents.exact,
    }
    # Through a file of Python's: its errors keep their cause, where torch's own say "unexpected pos 64 vs 0".
    with (folder / _TRAINING).open("wb") as file:
        torch.save(training, file)
    files = {_TRAINING: seal(folder / _TRAINING)}
    safetensors.torch.save_file(dict(contents.model), folder / _MODEL)
    (folder / _MODEL).chmod((folder / _TRAINING).stat().st_mode)  # safetensors writes 0600, whatever the umask
    files[_MODEL] = seal(folder / _MODEL)
    (folder / _MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n", encoding="utf-8")
    seal(folder / _MANIFEST)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: BaseException) -> str:
    """What the system said, from under what torch or safetensors made of it."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError) and below.strerror:
            return below.strerror
        below = below.__cause__ or below.__context__
    return str(error)


def _saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first; none where the folder is missing."""
    try:
        found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"cannot look for checkpoints in {folder}: {_cause(error)}") from error
    return sorted(found, key=lambda path: int(path.name.partition("_")[0]), reverse=True)


def _newest_sound(folder: Path, read: Callable[[Path], T], sound: dict[str, bool]) -> T:
    """``read`` of the newest checkpoint that is sound; which ones are not is written into ``sound``."""
    failures: list[CheckpointCorrupt] = []
    before: list[Path] | None = None
    while before != (saved := _saved(folder)):  # looked at again when a trainer saves and removes meanwhile
        for path in saved:
            try:
                return read(path)
            except CheckpointMissing:
                continue
            except CheckpointCorrupt as error:
                if sound.get(path.name, True):
                    logger.warning("%s; looking for the one before it", error)
                sound[path.name] = False
                failures.append(error)
        before = saved
    if failures:
        raise CheckpointCorrupt(f"no checkpoint in {folder} is sound; the newest: {failures[0]}") from failures[0]
    raise CheckpointMissing(f"there is no checkpoint in {folder}")


def _load(path: Path) -> Loaded:
    manifest = _read_manifest(path)
    model = _parse_weights(path, _read_verified(path, _MODEL, manifest))
    data = _read_verified(path, _TRAINING, manifest)
    try:
        training = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(training["exact"], bool):
            raise TypeError("exact is no bool")
        fields = {name: dict(training[name]) for name in ("optimizer", "scheduler", "state", "extra")}
    except UnpicklingError as error:
        raise CheckpointCorrupt(f"{path / _TRAINING} holds more than plain data and tensors, and is refused") from error
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, EOFError) as error:
        raise CheckpointCorrupt(f"{path / _TRAINING} is no checkpoint of aiorl: {error}") from error
    return Loaded(path, Contents(model=model, exact=training["exact"], **fields))


def _load_weights(path: Path) -> dict[str, Tensor]:
    return _parse_weights(path, _read_verified(path, _MODEL, _read_manifest(path)))


def _look_into(path: Path) -> None:
    size_bytes, _ = _read_manifest(path)[_MODEL]
    _look_at_header(path / _MODEL)
    found_bytes = (path / _MODEL).stat().st_size
    if found_bytes != size_bytes:
        raise CheckpointCorrupt(f"{path / _MODEL} has {found_bytes} bytes, where {size_bytes} were written")


def _look_at_header(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except OSError as error:
        raise CheckpointCorrupt(f"{path} cannot be read: {_cause(error)}") from error
    except SafetensorError as error:
        raise CheckpointCorrupt(f"{path} holds no weights in the safetensors format: {error}") from error


def _parse_weights(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointCorrupt(f"{path} holds no weights in the safetensors format: {error}") from error


def _read(path: Path) -> bytes:
    """A file's content, in one read, so that what is verified is what is parsed."""
    try:
        return path.read_bytes()
    except OSError as error:
        if not path.parent.exists():
            raise CheckpointMissing(f"there is no checkpoint {path.parent}") from error
        raise CheckpointCorrupt(f"{path} cannot be read: {_cause(error)}") from error


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of each file of a checkpoint."""
    data = _read(path / _MANIFEST)
    try:
        manifest = json.loads(data)
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, where this version of aiorl reads {FORMAT}")
        return {
            name: (manifest["files"][name]["size_bytes"], manifest["files"][name]["sha256"])
            for name in (_MODEL, _TRAINING)
        }
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointCorrupt(f"{path / _MANIFEST} is no manifest: {error!r}") from error


def _read_verified(path: Path, name: str, manifest: dict[str, tuple[int, str]]) -> bytes:
    data = _read(path / name)
    size_bytes, sha256 = manifest[name]
    if len(data) != size_bytes:
        raise CheckpointCorrupt(f"{path / name} has {len(data)} bytes, where {size_bytes} were written")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointCorrupt(f"{path / name} is not what was written: its sha256 differs")
    return data
