"""What can be found wrong with ``[task.environment]`` before anything starts, by making one environment and looking at it.

It is neither reset nor stepped: an environment that raises there is a worker's failure, no mistake in the configuration.
"""

from __future__ import annotations

import importlib
import traceback
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import gymnasium
from gymnasium.vector import VectorEnv

from aiorl.environments.make import close_anyhow, close_environment, load, make_environment, resolve
from aiorl.environments.spaces import describe
from aiorl.errors import ConfigError, Fault, UnsupportedSpace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiorl.environments.spaces import EnvironmentInfo, EnvironmentSpec

_TABLE: Final = "task.environment"


def preflight(spec: EnvironmentSpec) -> EnvironmentInfo:
    """Makes one environment, looks at it and closes it. Blocks, and imports: to be run in a thread that runs no loop.

    Raises:
        ConfigError: A fault on ``task.environment.id``, ``kwargs``, ``wrappers``, ``register`` or
            ``vectorization_mode``: a module that cannot be imported, an unknown environment, a constructor that raises,
            or spaces that cannot be used.
    """
    for index, module in enumerate(spec.register):
        with _translated(f"register[{index}]", module, "cannot be imported"):
            importlib.import_module(module)
    with _translated("id", spec.id, "cannot be imported"):
        construct = resolve(spec)
    for index, wrapper in enumerate(spec.wrappers):
        with _translated(f"wrappers[{index}]", wrapper, "cannot be imported"):
            load(wrapper)
    wants_vector = spec.vectorization_mode == "vector_entry_point"
    more: dict[str, Any] = {"num_envs": 1} if wants_vector else {}
    with _translated("id", spec.id, "cannot be constructed"):
        environment = make_environment(spec, construct, **more)
    try:
        if isinstance(environment, VectorEnv) != wants_vector:
            what, other = ("no vector", "sync") if wants_vector else ("a vector", "vector_entry_point")
            remedy = f'set vectorization_mode = "{other}"'
            raise ConfigError([_fault("id", spec.id, f"makes {what} environment", remedy)])
        with _translated("id", spec.id, "cannot be described"):
            return describe(environment)
    finally:
        close_anyhow(partial(close_environment, environment), spec.id)


def _fault(field: str, value: str, message: str, remedy: str = "") -> Fault:
    return Fault(f"{_TABLE}.{field}", message, f'"{value}"', remedy)


@contextmanager
def _translated(field: str, value: str, failing: str) -> Iterator[None]:
    """Turns whatever user code raises into a fault."""
    try:
        yield
    except ConfigError:
        raise
    except UnsupportedSpace as error:
        remedy = "choose another environment, or wrap this one"
        raise ConfigError([_fault(field, value, str(error), remedy)]) from error
    except gymnasium.error.UnregisteredEnv as error:
        remedy = "look at the id; an environment of another package also needs that package in `register`"
        raise ConfigError([_fault(field, value, f"is unknown to Gymnasium: {error}", remedy)]) from error
    except AttributeError as error:
        if not isinstance(error.name, str) or failing != "cannot be imported":
            raise ConfigError([_raised(field, value, failing, error)]) from error
        near = get_close_matches(error.name, dir(error.obj), n=1)
        remedy = f"did you mean {near[0]!r}?" if near else ""
        raise ConfigError([_fault(field, value, f"{failing}: {error}", remedy)]) from error
    except (Exception, SystemExit) as error:
        raise ConfigError([_raised(field, value, failing, error)]) from error


def _raised(field: str, value: str, failing: str, error: BaseException) -> Fault:
    """A fault that says what was raised, and where; on the keyword arguments where it is they that were refused."""
    line = traceback.format_exception_only(error)[-1].strip()
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = f"{failing}: {line} ({frame.filename}, line {frame.lineno})"
    if isinstance(error, TypeError) and "keyword argument" in str(error):
        return Fault(f"{_TABLE}.kwargs", message, remedy="give the arguments that the environment's constructor takes")
    return _fault(field, value, message)
