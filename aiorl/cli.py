"""The command line: ``python -m aiorl VERB``, and ``aiorl VERB``.

===========  ==========================================================================================================
exit status  when
===========  ==========================================================================================================
0            finished
1            the run failed: the first cause is on standard error, with the worker's traceback where it was a worker
2            usage or configuration: nothing was started
128 + n      signal n stopped it, after a run was drained
===========  ==========================================================================================================

What a verb was asked for goes to standard output; messages, the log and progress go to standard error. Each verb
imports what it needs when it is called, since ``--help`` has to be quick.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
import threading
from contextlib import ExitStack, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, NoReturn

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number

import aiorl
from aiorl.errors import AiorlError, CheckpointMissing, ConfigError, Fault, RunFolderError, UnsupportedSpace
from aiorl.streams import Loudness, open_standard_streams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiorl.config import Config
    from aiorl.evaluation import Evaluation
    from aiorl.runs import Run
    from aiorl.standalone import RunResult

FINISHED: Final = 0
FAILED: Final = 1
USAGE: Final = 2

_MISUSES = (ConfigError, UnsupportedSpace, RunFolderError, CheckpointMissing)

app = App(
    name="aiorl",
    help="An asyncio-native reinforcement-learning trainer.",
    help_format="plaintext",
    version=lambda: aiorl.__version__,
    version_flags=["--version"],
    help_flags=["--help", "-h"],
    default_parameter=Parameter(negative="", show_default=False),
    result_action="return_value",
    exit_on_error=False,
)


_NORMAL = Loudness()

Overrides = Annotated[tuple[str, ...], Parameter(name="--set", consume_multiple=False)]


@app.command(sort_key=1, usage="Usage: aiorl run [OPTIONS] CONFIG")
def run(
    config: Path | None = None,
    /,
    *,
    set_: Overrides = (),
    resume: Literal["auto", "never", "must"] = "auto",
    repl: bool = False,
    loudness: Loudness = _NORMAL,
) -> int:
    """Train.

    Args:
        config: A TOML file; left out, the defaults and what --set says.
        set_: Override a setting, as in --set optimizer.lr=1e-3. May be repeated.
        resume: With a trainer.exp_dir that holds a checkpoint: auto goes on from it, never refuses to, must refuses to
            start anew.
        repl: Open a console beside the run, with run in scope and top-level await. Leaving it stops the run.
        loudness: How much goes to standard error.
    """
    loudness.apply()
    return _train(_load_named(config, set_), config, set_, resume, with_console=repl, quiet=loudness.quiet)


@app.command(name="repl", sort_key=4, usage="Usage: aiorl repl [OPTIONS] [CONFIG]")
def repl_(config: Path | None = None, /, *, set_: Overrides = (), loudness: Loudness = _NORMAL) -> int:
    """Train with a console beside the run: run in scope, top-level await. Leaving it stops the run.

    Args:
        config: A TOML file; left out, the defaults.
        set_: Override a setting, as in --set optimizer.lr=1e-3. May be repeated.
        loudness: How much goes to standard error.
    """
    loudness.apply()
    return _train(_load(config, set_), config, set_, "auto", with_console=True, quiet=True)


@app.command(sort_key=2, usage="Usage: aiorl check [OPTIONS] [CONFIG]")
def check(
    config: Path | None = None, /, *, set_: Overrides = (), schema: bool = False, loudness: Loudness = _NORMAL
) -> int:
    """Validate a configuration, try whether a run could start, and print the configuration with every default.

    Args:
        config: A TOML file; left out, the defaults.
        set_: Override a setting, as in --set optimizer.lr=1e-3. May be repeated.
        schema: Print the JSON schema of configurations instead, from which editors complete.
        loudness: How much goes to standard error.
    """
    loudness.apply()
    from aiorl.config import json_schema, to_toml

    if not schema or config is not None or set_:
        resolved = _load(config, set_)
        from aiorl.preparation import check as preflight  # torch: not before the configuration is known to be sound

        preflight(resolved)
        if not schema:
            print(to_toml(resolved), end="")
    if schema:
        print(json.dumps(json_schema(), indent=2))
    return FINISHED


@app.command(name="eval", sort_key=3)
def eval_(
    run_folder: Annotated[Path, Parameter(name="RUN")],
    /,
    *,
    episodes: Annotated[int, Parameter(validator=Number(gte=1), show_default=True)] = 100,
    sample: bool = False,
    video: Path | None = None,
    json_: Annotated[bool, Parameter(name="--json")] = False,
    loudness: Loudness = _NORMAL,
) -> int:
    """Play the newest checkpoint of a run. The last line that is printed is one JSON object.

    Args:
        run_folder: The run's folder, for example runs/cartpole/run_0.
        episodes: How many episodes.
        sample: Draw actions from the policy instead of taking the most probable one.
        video: Record the first episode into this .gif or .mp4.
        json_: Print the JSON object alone.
        loudness: How much goes to standard error.
    """
    loudness.apply()
    _import_as(run_folder)
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame looks for a screen, although it renders into memory
    from aiorl.evaluation import evaluate

    evaluation = evaluate(run_folder, episodes=episodes, optimal=not sample, video=video)
    if not json_:
        print(_told(evaluation))
        if video is not None:
            print(f"the first episode is in {_shown(video)}")
    print(evaluation.to_json())
    return FINISHED


@app.command(sort_key=5, usage="Usage: aiorl bench [OPTIONS] CONFIG")
def bench(
    config: Path | None = None,
    /,
    *,
    set_: Overrides = (),
    seconds: Annotated[float, Parameter(validator=Number(gt=0), show_default=True)] = 15.0,
    json_: Annotated[bool, Parameter(name="--json")] = False,
    loudness: Loudness = _NORMAL,
) -> int:
    """Measure what this machine could do with a configuration, part by part, and what holds it back.

    Args:
        config: A TOML file; left out, the defaults and what --set says.
        set_: Override a setting, as in --set optimizer.lr=1e-3. May be repeated.
        seconds: Of measuring; opening and closing what is measured takes some more.
        json_: Print one JSON object as the last line.
        loudness: How much goes to standard error.
    """
    loudness.apply()
    resolved = _load_named(config, set_)
    from aiorl.bench.command import run_bench
    from aiorl.bench.report import as_json, as_text

    found = run_bench(resolved, seconds=seconds)
    if isinstance(found, signal.Signals):
        return 128 + found
    print(as_text(found))
    if json_:
        print(as_json(found))
    return FINISHED


def main() -> NoReturn:
    """Runs the verb that the command line names, and exits."""
    open_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that lines come when they are written, in a pipe too
    status = _status(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the status is decided: no traceback out of Python's own shutdown
    if threading.active_count() > 1:  # as where `eval` was interrupted in a constructor
        from aiorl.compute.threads import held_up, leave

        if held_up():
            leave(status)
    sys.exit(status)


def _status(arguments: Sequence[str]) -> int:
    """Runs a verb. What aiorl raises on purpose becomes a message and a status; anything else keeps its traceback."""
    try:
        if not arguments:
            app.help_print([])
            return USAGE
        status: int | None = app(arguments)
    except CycloptsError:  # it has been printed
        return USAGE
    except AiorlError as error:
        print("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return USAGE if isinstance(error, _MISUSES) else FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # as in `aiorl check | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush does not fail too
        return 128 + signal.SIGPIPE
    return status or FINISHED


# ---------------------------------------------------------------------- run and repl
def _load(path: Path | None, overrides: Sequence[str]) -> Config:
    """The configuration, with its folder and the working folder on the import path, for ``module:Name``."""
    if path is not None:
        _import_from(path.absolute().parent)
    _import_from(Path.cwd())
    from aiorl.config import load_config

    return load_config(path, overrides)


def _load_named(path: Path | None, overrides: Sequence[str]) -> Config:
    """The same, where neither a file nor an override is a slip of the hand rather than a wish for the defaults."""
    if path is None and not overrides:
        raise ConfigError([Fault("CONFIG", "is missing", remedy="name a TOML file, or write at least one --set")])
    return _load(path, overrides)


def _import_from(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _import_as(run_folder: Path) -> None:
    """Puts the working folder on the import path, and after everything else what was on it when the run was made."""
    _import_from(Path.cwd())
    with suppress(OSError, ValueError, LookupError):
        recorded = json.loads((run_folder / "provenance.json").read_text(encoding="utf-8"))["import_path"]
        sys.path.extend(folder for folder in recorded if folder not in sys.path)


def _train(
    config: Config,
    path: Path | None,
    overrides: Sequence[str],
    resume: Literal["auto", "never", "must"],
    *,
    with_console: bool,
    quiet: bool,
) -> int:
    """Runs to the end, and tells how it ended and what to type next."""
    from aiorl.monitoring.progress import Goals, ProgressDisplay
    from aiorl.standalone import run as run_to_end

    trainer = config.trainer
    limits = {field.name: getattr(trainer, field.name) for field in fields(Goals)}
    display = (
        None if with_console or quiet else ProgressDisplay(config.logger, name=trainer.exp_name, goals=Goals(**limits))
    )
    folder: Path | None = None

    def opened(run: Run) -> None:
        nonlocal folder
        folder = run.folder
        print(f"run folder: {_shown(folder)}")
        if trainer.target_return is None and not any(limits.values()):
            print("no limit is set, so that it goes on until it is stopped")
        if display is not None:
            run.add_listener(display.update)

    def leave() -> None:
        shown.close()
        print("stopped at once")

    try:
        with ExitStack() as shown:
            if display is not None:
                shown.enter_context(display)
            beside = _converse if with_console else None
            result = run_to_end(config, resume=resume, opened=opened, beside=beside, leaving=leave)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run is over and on disk: nothing is left to interrupt
    except AiorlError as error:
        if folder is not None:
            error.add_note(f"what it left is in {_shown(folder)}")
            if any(folder.glob("checkpoints/*/manifest.json")):
                error.add_note(f"from its last checkpoint: {_resuming(path, overrides, folder)}")
        raise
    _tell_outcome(result, _resuming(path, overrides, result.folder))
    return FINISHED if result.signal is None else 128 + result.signal


async def _converse(run: Run) -> None:
    """A console beside the run."""
    import asyncio

    from aiorl.monitoring.console import interact

    async def tell_end() -> None:
        outcome = await run.wait()
        print(f"the run has ended, {outcome.reason}; exit() leaves the console")

    async with asyncio.TaskGroup() as tasks:
        telling = tasks.create_task(tell_end(), name="tell the run's end")
        await interact({"run": run, "aiorl": aiorl}, banner=_BANNER)
        telling.cancel()


def _tell_outcome(result: RunResult, resuming: str) -> None:
    outcome = result.outcome
    if outcome is None:
        print("stopped at once")
        return
    state = outcome.state
    rate = outcome.num_new_samples / outcome.wall_s if outcome.wall_s > 0 else 0.0
    mean = outcome.episode_return_mean
    print(
        f"ended, {outcome.reason}: {state.num_samples} samples in {outcome.wall_s:.1f} s ({rate:.0f} per second), "
        f"{state.num_episodes} episodes, mean return {'unknown' if mean is None else f'{mean:.2f}'}"
    )
    if result.signal is None:
        print(f"next: {_program()} eval {shlex.quote(_shown(result.folder))}")
    else:
        print(f"to go on: {resuming}")


def _resuming(path: Path | None, overrides: Sequence[str], folder: Path) -> str:
    """The command that goes on with a run."""
    kept = [override for override in overrides if override.partition("=")[0].strip() != "trainer.exp_dir"]
    sets = [part for each in (*kept, f"trainer.exp_dir={_shown(folder)}") for part in ("--set", each)]
    return f"{_program()} {shlex.join(['run', *([str(path)] if path is not None else []), *sets])}"


def _program() -> str:
    return "aiorl" if Path(sys.argv[0]).name == "aiorl" else "python -m aiorl"


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


# ---------------------------------------------------------------------- messages
def _told(evaluation: Evaluation) -> str:
    how = "greedy actions" if evaluation.optimal else "sampled actions"
    return (
        f"{_shown(evaluation.checkpoint)}, trained on {evaluation.num_samples} samples\n"
        f"{evaluation.episodes} episodes with {how}: return {evaluation.return_mean:.2f} ± {evaluation.return_std:.2f}, "
        f"from {evaluation.returns.min():.2f} to {evaluation.returns.max():.2f}; "
        f"mean length {evaluation.lengths.mean():.1f}; {evaluation.wall_s:.1f} s"
    )


_BANNER: Final = """\
The run goes on while you type. Try
    run.statistics()
    await run.pause(), await run.resume(), await run.save_checkpoint()
    run.set("optimizer.lr", 1e-4)
exit() or Ctrl-D stops the run, with a checkpoint."""
