"""The epoch loop: sealed epochs in, published weights, records, reports and checkpoints out.

    channel ──► learner ──► policy (a new version) ──► rollout (the next epoch may open)
                   └──────► record, report, checkpoint

| loop           | consumes      | waits for, and who ends the wait                       | ends when                        |
|----------------|---------------|--------------------------------------------------------|----------------------------------|
| `Training.run` | sealed epochs | an epoch (rollout), the update (learner),              | a limit is met; stopped, and     |
|                |               | a place for its record (recorder)                      | nothing is open                  |
| a save         | one snapshot  | the checkpoint store's thread (the disk)               | it is on disk, or has failed     |

While a save is under way the next checkpoint waits for its buffers: the learner waits then, never the loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from aiorl.errors import AiorlError, ChannelClosed, CheckpointError
from aiorl.learning.optim import set_learning_rate
from aiorl.learning.records import record_of
from aiorl.learning.snapshot import Contents

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from aiorl.compute.device import Placement
    from aiorl.learning.checkpoint import CheckpointStore
    from aiorl.learning.config import ReinforcementLearningTrainerConfig
    from aiorl.learning.learner import Learner
    from aiorl.learning.snapshot import Buffers, Snapshot
    from aiorl.monitoring.metrics import EpisodeWindow, EpochRecord
    from aiorl.monitoring.sinks import Recorder
    from aiorl.sampling.batcher import BatcherStatistics, MicroBatcher
    from aiorl.sampling.channel import Channel
    from aiorl.sampling.policy import Policy
    from aiorl.sampling.rollout import Rollout
    from aiorl.sampling.trajectory import SealedEpoch
    from aiorl.tasks.base import Hooks, ReinforcementLearningTask, State

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Parts:
    """What the epoch loop works with; the trainer builds it."""

    config: ReinforcementLearningTrainerConfig
    state: State
    task: ReinforcementLearningTask
    hooks: Hooks
    window: EpisodeWindow
    learner: Learner
    placement: Placement
    policy: Policy
    batcher: MicroBatcher
    rollout: Rollout
    channel: Channel[SealedEpoch]
    recorder: Recorder
    store: CheckpointStore
    buffers: Buffers
    system: Callable[[], dict[str, float]]
    incarnation: int


class Training:
    """The epoch loop and what can be asked of it while it runs.

    Args:
        parts: What it works with.
        tasks: Owns the saves.
        report: Called with each epoch's record, on the loop.

    Attributes:
        parts: What it works with.
        given_up: Kept transitions of an epoch that was given up when the run was stopped.
        settings: What was changed while it ran: by TOML path, the value as configured and the one that was set. Part of checkpoints.
        last_step_at: ``time.perf_counter()`` after the last optimizer step.
    """

    def __init__(self, parts: Parts, tasks: asyncio.TaskGroup, report: Callable[[EpochRecord], None]) -> None:
        self.given_up = 0
        self.last_step_at = time.perf_counter()
        self.parts = parts
        self.settings: dict[str, list[Any]] = {}
        self._tasks = tasks
        self._report = report
        self._stop_reason: str | None = None
        self._reason: str | None = None  # why it ends, once that is certain
        self._give_up: asyncio.TimerHandle | None = None
        self._reserved = False  # the buffers of checkpoints are complete
        self._torn = False  # the last update was given up midway
        self._wanted: list[asyncio.Future[Path]] = []
        self._saves: set[asyncio.Task[None]] = set()
        self._failure: CheckpointError | None = None  # of the last save
        self._running = asyncio.Event()  # cleared by a pause
        self._running.set()
        self._epoch_lock = asyncio.Lock()  # held from an epoch's update to its end, and while a checkpoint is copied
        self._num_checkpoint_steps = parts.state.num_steps
        self._checkpointed_at = time.monotonic()
        self._started_at = time.monotonic()
        self._elapsed_before_s = parts.state.elapsed_time_s
        self._epoch_ended_at = self._started_at
        self._batches: BatcherStatistics = parts.batcher.statistics()
        self._noise_counts = parts.rollout.noise_counts()  # as of the last epoch's end

    # ------------------------------------------------------------------ the loop
    async def run(self) -> str:
        """Learns until a limit is met or `stop` is called; then checkpoints. Returns why it ended.

        Cancelling leaves at once, without a checkpoint.

        Raises:
            CheckpointError: The last checkpoint could not be written.
            Exception: What the learner, the task or a hook raised.
        """
        parts = self.parts
        first_epoch, first_step = parts.state.num_epochs, parts.state.num_steps
        try:
            await parts.hooks.call("on_training_start", parts.state)
            self._reason = self._limit() or await self._learn()
            parts.rollout.finish()
            self.given_up = parts.rollout.unlearned_rows()
            async with self._epoch_lock:
                self._save(await self._copy())
            await self._saved()
            if parts.state.num_epochs > first_epoch and parts.state.num_steps == first_step:
                logger.warning(
                    "nothing was learned: every optimizer step was skipped, since something in it was not finite"
                )
            await parts.hooks.call("on_training_end", parts.state)
            return self._reason
        finally:
            self._reason = self._reason or "failed"
            if self._give_up is not None:
                self._give_up.cancel()
            _fail(self._wanted)

    async def _learn(self) -> str:
        while True:
            try:
                sealed = await self.parts.channel.get()
            except ChannelClosed:
                return self._stop_reason or "stopped"
            reason = await self._epoch_when_running(sealed)
            if reason is not None:
                return reason

    async def _epoch_when_running(self, sealed: SealedEpoch) -> str | None:
        """`_epoch`, once no pause holds it back."""
        while True:
            await self._running.wait()
            async with self._epoch_lock:
                if self._running.is_set():
                    return await self._epoch(sealed)

    async def _epoch(self, sealed: SealedEpoch) -> str | None:
        """Learns one epoch. Returns why the run ends with it, or None."""
        parts, state = self.parts, self.parts.state
        await parts.hooks.call("on_epoch_start", state)
        update = await parts.learner.learn(sealed, parts.rollout.pool)
        self.last_step_at = time.perf_counter()
        for episode_return, length in zip(sealed.returns, sealed.lengths, strict=True):
            parts.window.add(episode_return, length)
        state.num_epochs = state.policy_version = sealed.epoch
        state.num_samples += sealed.num_transitions
        state.num_episodes += len(sealed.returns)
        state.elapsed_time_s = self._elapsed_before_s + time.monotonic() - self._started_at
        limits = parts.config
        state.update_progress(
            max_epochs=limits.max_epochs,
            max_steps=limits.max_steps,
            max_samples=limits.max_samples,
            max_seconds=limits.max_seconds,
        )
        self._torn = not update.complete
        if self._torn:
            return self._stop_reason or "stopped"
        parts.policy.publish(sealed.epoch, await parts.placement.call(parts.policy.snapshot))
        await parts.hooks.call("on_epoch_end", state)
        reason = self._limit()
        batches = parts.batcher.statistics()  # before the next epoch may begin to act
        self._noise_counts = parts.rollout.noise_counts()
        if reason is None:
            parts.rollout.learned(sealed.epoch)
        if not self._reserved:  # the optimizer has all its state since the first update
            await parts.placement.call(
                parts.buffers.reserve, parts.learner.model.state_dict(), parts.learner.optimizer.state_dict()
            )
            self._reserved = True
        started = time.perf_counter()
        snapshot = await self._copy() if self._due() else None
        checkpoint_s = time.perf_counter() - started if snapshot is not None else None
        now = time.monotonic()
        epoch_s, self._epoch_ended_at = now - self._epoch_ended_at, now
        before, self._batches = self._batches, batches
        record = record_of(parts, sealed, update, (before, batches), epoch_s=epoch_s, checkpoint_s=checkpoint_s)
        await parts.recorder.record(record)
        if snapshot is not None:
            self._save(snapshot)  # after the record, so that metrics.jsonl reaches at least as far
        self._report(record)
        state.num_epoch_steps = 0
        return reason

    def _limit(self) -> str | None:
        """The first limit that is met, in words."""
        state, config, window = self.parts.state, self.parts.config, self.parts.window
        if config.target_return is not None and window.is_full and window.return_mean >= config.target_return:
            return f"the mean return of 100 episodes reached target_return = {config.target_return:g}"
        counts: tuple[tuple[str, float, float | None], ...] = (
            ("max_samples", state.num_samples, config.max_samples),
            ("max_epochs", state.num_epochs, config.max_epochs),
            ("max_steps", state.num_steps, config.max_steps),
            ("max_seconds", state.elapsed_time_s, config.max_seconds),
        )
        for name, count, limit in counts:
            if limit is not None and count >= limit:
                return f"{name} = {limit:g} is reached"
        if self.parts.task.is_training_over(state):
            return "the task says that training is over"
        return None

    # ------------------------------------------------------------------ checkpoints
    def _due(self) -> bool:
        config = self.parts.config.checkpoint
        steps, seconds = config.save_every_n_steps, config.save_every_n_seconds
        return (
            bool(self._wanted)
            or (steps is not None and self.parts.state.num_steps - self._num_checkpoint_steps >= steps)
            or (seconds is not None and time.monotonic() - self._checkpointed_at >= seconds)
        )

    async def _copy(self) -> Snapshot:
        """Copies what a checkpoint holds. The learner waits where the one before is still being written."""
        parts = self.parts
        steps = parts.config.checkpoint.save_every_n_steps
        if steps is not None:
            self._num_checkpoint_steps = parts.state.num_steps // steps * steps
        self._checkpointed_at = time.monotonic()
        await parts.buffers.acquire()
        try:
            return await parts.placement.call(parts.buffers.copy, self._contents())
        except BaseException:  # a cancellation too gives the buffers back; raised again
            parts.buffers.give_up()
            raise

    def _save(self, snapshot: Snapshot) -> None:
        """Has a snapshot written beside training, for everybody who asked until now."""
        wanted, self._wanted = self._wanted, []
        save = self._tasks.create_task(self._write(snapshot, wanted), name="checkpoint")
        self._saves.add(save)
        save.add_done_callback(self._saves.discard)

    def _contents(self) -> Contents:
        parts = self.parts
        learner = parts.learner
        return Contents(
            model=learner.model.state_dict(),
            optimizer=learner.optimizer.state_dict(),
            scheduler=learner.scheduler.state_dict(),
            state=parts.state.state_dict(),
            extra={
                "episodes": parts.window.state_dict(),
                "noise_counts": torch.from_numpy(self._noise_counts),
                "incarnation": parts.incarnation,
                "settings": self.settings,
            },
            exact=not self._torn,
        )

    async def _write(self, snapshot: Snapshot, wanted: list[asyncio.Future[Path]]) -> None:
        """Writes a snapshot off the loop. What fails is logged, told to who asked, and tried again at the next checkpoint."""
        parts = self.parts
        try:
            await parts.recorder.flush()
            path = await parts.store.save(snapshot)
        except CheckpointError as error:
            logger.error("no checkpoint was written, training goes on: %s", error)  # noqa: TRY400 - it says its cause
            self._failure = error
            _fail(wanted, error)
        else:
            self._failure = None
            logger.info("checkpoint written: %s", path)
            for future in wanted:
                if not future.done():
                    future.set_result(path)
            await parts.hooks.call("on_after_save_checkpoint", parts.state)
        finally:
            snapshot.release()
            _fail(wanted)

    async def _saved(self) -> None:
        """Waits for the saves that are under way, and raises where the last one failed."""
        if self._saves:
            await asyncio.wait(self._saves)
        if self._failure is not None:
            raise self._failure

    async def _save_between_epochs(self) -> None:
        """A checkpoint for who asked during a pause: at once, or at the end of the update that is still under way."""
        async with self._epoch_lock:
            if self._wanted and self._reason is None:
                self._save(await self._copy())

    # ------------------------------------------------------------------ requests, on the loop
    @property
    def stopped(self) -> bool:
        """Whether the run ends, or ended, because `stop` was called."""
        return self._stop_reason is not None and self._reason in (None, self._stop_reason)

    def stop(self, reason: str) -> None:
        """Finishes the epoch that is sampled, within ``drain_timeout``, learns it, checkpoints and ends.

        Idempotent; nothing happens once the run is ending by itself.
        """
        if self._stop_reason is not None or self._reason is not None:
            return
        self._stop_reason = reason
        self._go_on()
        self.parts.rollout.finish()
        self._give_up = asyncio.get_running_loop().call_later(self.parts.config.drain_timeout, self._abandon)

    def _abandon(self) -> None:
        """The time for draining is over: what is sampled or learned now is given up."""
        logger.warning("the epoch under way was not finished within drain_timeout: it is given up")
        self.parts.channel.close()
        self.parts.learner.stop()

    def set_learning_rate(self, lr: float) -> None:
        """Learns with the base rate `lr` from now on; the schedule goes on from where it is."""
        set_learning_rate(self.parts.learner.optimizer, self.parts.learner.scheduler, lr)

    def reconfigure(self, config: ReinforcementLearningTrainerConfig) -> None:
        """Goes by `config` from now on; only limits, intervals and the clipping of gradients may differ."""
        self.parts.config = config
        self.parts.learner.reconfigure(config)

    async def pause(self) -> None:
        """Holds sampling and learning; returns when no step is outstanding and the update that was under way is done.

        So a paused run stands between two epochs. Nothing is held once the run is ending. Cancelling leaves it paused.
        """
        if self._stop_reason is not None or self._reason is not None:
            return
        self._running.clear()
        await self.parts.rollout.pause()
        async with self._epoch_lock:
            pass

    def resume(self) -> None:
        """Goes on after a pause."""
        self._go_on()

    def _go_on(self) -> None:
        self._running.set()
        self.parts.rollout.resume()

    async def save_checkpoint(self) -> Path:
        """A checkpoint at the next epoch end, or now while paused between epochs. Cancelling leaves it to be written.

        Raises:
            CheckpointError: It could not be written.
            AiorlError: The run ended before.
        """
        return await asyncio.shield(self.request_checkpoint())

    def request_checkpoint(self) -> asyncio.Future[Path]:
        """`save_checkpoint` without waiting."""
        future: asyncio.Future[Path] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody need ask what became of it
        if self._reason is not None:
            _fail([future])
        else:
            self._wanted.append(future)
            if self.parts.rollout.ledger.paused:
                self._tasks.create_task(self._save_between_epochs(), name="checkpoint of a paused run")
        return future


def _fail(futures: list[asyncio.Future[Path]], error: CheckpointError | None = None) -> None:
    """Tells who still waits for a checkpoint that there will be none."""
    for future in futures:
        if not future.done():
            future.set_exception(error or AiorlError("the run ended before the checkpoint was written"))
