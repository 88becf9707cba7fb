"""``[task.environment]`` and ``[link]``: which environments, how many, where they step, and how they are reached.

Kept apart from the modules that a worker imports: a worker knows no pydantic.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from aiorl.section import MAY_DIFFER, MODULE_NAME, Breach, Section, TomlValue, not_yet, rule

# pydantic warns of a field named like a method of its metaclass (ABCMeta.register), which no instance sees.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message='Field name "register"', category=UserWarning)

    class EnvironmentConfig(Section):
        """The environments of a run."""

        id: str = Field(
            "CartPole-v1",
            min_length=1,
            description="A Gymnasium id (of EnvPool's own where that is the `vectorization_mode`), or `module:callable` that "
            "returns an environment, even one of coroutines.",
        )
        kwargs: Mapping[str, TomlValue] = Field(
            default_factory=dict, description="Keyword arguments of the environment's constructor."
        )
        wrappers: tuple[Annotated[str, Field(pattern=f"^{MODULE_NAME}$")], ...] = Field(
            (),
            description="Wrappers, innermost first, each `module:callable` that takes an environment and returns one; vector "
            'environments both, unless `vectorization_mode` is "sync".',
        )
        register: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")], ...] = Field(
            (), description="Modules to import before the environment is made, for example `ale_py`."
        )
        num_env_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
            1,
            description="Worker processes (or threads) that host environments; 0 = in the trainer's process; "
            '"auto" = measured at the start.',
        )
        envs_per_worker: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
            16, description='Environments that each worker hosts; "auto" = measured at the start.'
        )
        groups_per_worker: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], MAY_DIFFER] = Field(
            "auto",
            description="Groups into which a worker's environments are divided: one steps while another waits for its "
            'actions; "auto" = 2 for a worker of at least 2 environments, 1 in process; measured where the numbers of '
            "workers and environments both are.",
        )
        vectorization_mode: Literal["sync", "vector_entry_point", "envpool"] = Field(
            "sync",
            description="How a group's environments step: one after the other, by their own vectorised version, or by EnvPool "
            "(`aiorl[envpool]`).",
        )
        env_worker_mode: Annotated[Literal["process", "thread"], MAY_DIFFER] = Field(
            "process", description="Whether workers are processes or threads of the trainer's."
        )
        env_seed: int | None = Field(
            None,
            ge=0,
            le=2**63 - 1,
            description="Seed from which each environment's own is derived; none = the trainer's `seed`.",
        )
        env_cleanup_time: Annotated[float, MAY_DIFFER] = Field(
            5.0, ge=0.0, description="Seconds that workers are given to close before they are terminated."
        )
        max_steps: Annotated[int, MAY_DIFFER] = Field(
            1000, ge=1, description="Steps of a recorded clip at most; it does not truncate training."
        )
        reset_timeout: Annotated[float | None, MAY_DIFFER, not_yet("deadlines")] = Field(
            None,
            gt=0.0,
            description="Seconds after which a reset without an answer counts as a failure; none = no limit.",
        )
        step_timeout: Annotated[float | None, MAY_DIFFER, not_yet("deadlines")] = Field(
            None,
            gt=0.0,
            description="Seconds after which a step without an answer counts as a failure; none = no limit.",
        )
        on_worker_failure: Annotated[
            Literal["fail", "replace"], MAY_DIFFER, not_yet("replacing workers", "replace")
        ] = Field("fail", description="What follows when a worker fails: the run ends, or the worker is replaced.")
        launcher: Annotated[
            Literal["local", "command", "slurm", "ray"],
            MAY_DIFFER,
            not_yet("other launchers", "command", "slurm", "ray"),
        ] = Field("local", description="What starts the workers.")
        max_worker_rss_bytes: Annotated[int | None, MAY_DIFFER, not_yet("replacing workers")] = Field(
            None, ge=1, description="Resident memory in bytes above which a worker is replaced; none = no limit."
        )

        @rule("groups_per_worker", "envs_per_worker")
        def _every_group_has_an_environment(self) -> Breach | None:
            if "auto" in (self.groups_per_worker, self.envs_per_worker):
                return None
            if self.groups_per_worker <= self.envs_per_worker:  # type: ignore[operator] # neither is "auto"
                return None
            return f"is above envs_per_worker = {self.envs_per_worker}", 'lower it, or write "auto"'

        @property
        def is_auto(self) -> bool:
            """Whether the number of workers or of environments is to be measured at the start."""
            return "auto" in (self.num_env_workers, self.envs_per_worker)

        @property
        def num_envs(self) -> int | None:
            """Environments of all workers together, and as many in the trainer's process; None where that is not known yet."""
            if self.num_env_workers == "auto" or self.envs_per_worker == "auto":
                return None
            return max(1, self.num_env_workers) * self.envs_per_worker

        def numbers(self) -> tuple[int, int]:
            """``num_env_workers`` and ``envs_per_worker``.

            Raises:
                ValueError: One of them is "auto": it is measured before environments are started.
            """
            if self.num_env_workers == "auto" or self.envs_per_worker == "auto":
                raise ValueError('num_env_workers and envs_per_worker have to be numbers by now, not "auto"')
            return self.num_env_workers, self.envs_per_worker


class LinkConfig(Section):
    """The link between the trainer and its workers."""

    endpoint: Annotated[str, MAY_DIFFER] = Field(
        "auto",
        pattern=r"^(auto|ipc://.+|tcp://.+:(\d{1,5}|\*))$",
        description='Where the trainer listens, as `ipc://PATH` or `tcp://HOST:PORT`; "auto" = a private ipc '
        "socket, or loopback tcp where ipc is not to be had.",
    )
    key_dir: Annotated[str | None, MAY_DIFFER, not_yet("CURVE keys")] = Field(
        None, min_length=1, description="Folder of CURVE keys, which encrypt and authenticate the link; none = neither."
    )
