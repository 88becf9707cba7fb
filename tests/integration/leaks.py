"""What leaks a kilobyte for every tick of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiorl.tasks.ppo import PPO

if TYPE_CHECKING:
    from aiorl.tasks.base import State

LEAKED: list[bytes] = []


class LeakingTask(PPO):
    """Leaks in the trainer: it is asked after each tick whether the epoch is over."""

    def epoch_is_over(self, state: State) -> bool:
        LEAKED.append(bytes(1024))
        return False
