"""What can be found wrong with ``[task.environment]`` before anything starts, by making one environment and looking at it.

It is neither reset nor stepped: an environment that raises there is a worker's failure, no mistake in the configuration.
"""

from __future__ import annotations

import importlib
import traceback
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final

import gymnasium
from gymnasium.vector import VectorEnv

from aiorl.environments.make import load, make_environment, resolve, wrapped
from aiorl.environments.spaces import describe
from aiorl.environments.specimen import look_at_one
from aiorl.errors import ConfigError, Fault, UnsupportedSpace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiorl.environments.spaces import EnvironmentInfo, EnvironmentSpec

_TABLE: Final = "task.environment"


def preflight(spec: EnvironmentSpec, *, num_env_workers: int = 0, env_cleanup_time: float = 5.0) -> EnvironmentInfo:
    """Makes one environment, looks at it and closes it. Blocks, while all user code runs in a daemon thread.

    Args:
        spec: Of the environment.
        num_env_workers: Processes or threads that are to host such environments; 0 = the trainer's own loop.
        env_cleanup_time: Seconds that closing may take; then it is left to itself with a warning.

    Raises:
        ConfigError: A fault on ``task.environment.id``, ``kwargs``, ``wrappers``, ``register`` or ``num_env_workers``:
            a module that cannot be imported, an unknown environment, a constructor that raises, spaces that cannot be
            used, or an awaitable environment that is to be hosted by workers.
    """
    info = look_at_one(lambda: _make(spec), lambda it: _look(spec, it), name=spec.id, env_cleanup_time=env_cleanup_time)
    if info.is_awaitable and num_env_workers > 0:
        what = f"{spec.id} is awaitable, and only the trainer's own loop hosts such environments"
        raise ConfigError([Fault(f"{_TABLE}.num_env_workers", what, str(num_env_workers), "set it to 0")])
    return info


def _make(spec: EnvironmentSpec) -> Any:
    for index, module in enumerate(spec.register):
        with _translated(f"register[{index}]", module, "cannot be imported"):
            importlib.import_module(module)
    with _translated("id", spec.id, "cannot be imported"):
        construct = resolve(spec)
    for index, wrapper in enumerate(spec.wrappers):
        with _translated(f"wrappers[{index}]", wrapper, "cannot be imported"):
            load(wrapper)
    if spec.is_vector and "num_envs" in spec.kwargs:
        remedy = "leave it out: the groups say how many, by envs_per_worker and groups_per_worker"
        raise ConfigError([Fault(f"{_TABLE}.kwargs.num_envs", "is not for the configuration to set", None, remedy)])
    with _translated("id", spec.id, "cannot be constructed"):
        environment = make_environment(replace(spec, wrappers=()), construct)
    remedy = ""
    if spec.is_vector:
        remedy = (
            f'with vectorization_mode = "{spec.vectorization_mode}" it wraps a whole vector environment, as those of '
        )
        remedy += "gymnasium.wrappers.vector do"
    for index, wrapper in enumerate(spec.wrappers):
        with _translated(f"wrappers[{index}]", wrapper, "cannot wrap this environment", remedy):
            environment = wrapped(environment, wrapper)
    return environment


def _look(spec: EnvironmentSpec, environment: Any) -> EnvironmentInfo:
    if isinstance(environment, VectorEnv) != spec.is_vector:
        what, other = ("no vector", "sync") if spec.is_vector else ("a vector", "vector_entry_point")
        remedy = f'set vectorization_mode = "{other}"'
        raise ConfigError([_fault("id", spec.id, f"makes {what} environment", remedy)])
    with _translated("id", spec.id, "cannot be described"):
        return describe(environment)


def _fault(field: str, value: str, message: str, remedy: str = "") -> Fault:
    return Fault(f"{_TABLE}.{field}", message, f'"{value}"', remedy)


@contextmanager
def _translated(field: str, value: str, failing: str, remedy: str = "") -> Iterator[None]:
    """Turns whatever user code raises into a fault; the remedy is that of what is not known better."""
    try:
        yield
    except ConfigError:
        raise
    except UnsupportedSpace as error:
        what = "choose another environment, or wrap this one"
        raise ConfigError([_fault(field, value, str(error), what)]) from error
    except gymnasium.error.UnregisteredEnv as error:
        what = "look at the id; an environment of another package also needs that package in `register`"
        raise ConfigError([_fault(field, value, f"is unknown to Gymnasium: {error}", what)]) from error
    except AttributeError as error:
        if not isinstance(error.name, str) or failing != "cannot be imported":
            raise ConfigError([_raised(field, value, failing, error, remedy)]) from error
        near = get_close_matches(error.name, dir(error.obj), n=1)
        what = f"did you mean {near[0]!r}?" if near else ""
        raise ConfigError([_fault(field, value, f"{failing}: {error}", what)]) from error
    except BaseException as error:
        raise ConfigError([_raised(field, value, failing, error, remedy)]) from error


def _raised(field: str, value: str, failing: str, error: BaseException, remedy: str) -> Fault:
    """A fault that says what was raised, and where; on the keyword arguments where it is they that were refused."""
    line = traceback.format_exception_only(error)[-1].strip()
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = f"{failing}: {line} ({frame.filename}, line {frame.lineno})"
    if field == "id" and isinstance(error, TypeError) and "keyword argument" in str(error):
        return Fault(f"{_TABLE}.kwargs", message, remedy="give the arguments that the environment's constructor takes")
    return _fault(field, value, message, remedy)
