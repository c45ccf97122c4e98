"""`qfleet`: finds the command, runs it, and turns errors into one line and an exit code.

Exit codes: 0 done; 1 the run or the check failed; 2 bad input; 130 interrupted. Interrupting training that has begun
ends it cleanly, with exit code 0.
"""

import contextlib
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from qfleet.cli.streams import give_stdout_up, prepare_streams
from qfleet.config import ConfigError, RunFailed, suggest

# A module is imported only when its command is called, because the help text must not wait for JAX.
_COMMANDS = {
    "train": "train an agent in an environment",
    "eval": "evaluate what a run has learned",
    "report": "write the report of a run, or of several side by side, as one page for a browser",
    "dashboard": "show the reports of runs in a browser, as their metrics arrive",
    "serve": "answer observations with a policy's actions, over HTTP",
    "watch": "write videos of what a run has learned",
    "export": "write what a run has learned for other programs: weights, StableHLO, ONNX, a folder for a hub",
    "resume": "continue a run from its newest checkpoint",
    "sweep": "train with different settings, to find the best ones",
    "rerun": "train a run again, and say whether the result is the same",
    "diagnose": "say what is wrong with a run that doesn't learn",
    "doctor": "say whether this machine is ready for runs, and what to do if it isn't",
    "plan": "predict a run before it starts: its speed, its memory, and what limits it",
    "devices": "list the devices, or show what a run would keep on each of them",
    "envs": "list the environments",
    "check-env": "check that an environment keeps the contract that learning relies on",
    "presets": "list the presets",
    "zoo": "list the trained agents that come with qfleet",
}

_HELP = """\
usage: qfleet COMMAND ...

Deep Q-networks, trained fast by parallel and distributed computing.

{commands}

The flags of each command: qfleet COMMAND --help
Try: qfleet train CartPole-v1 --stop-return 475
Add --debug to any command to get a traceback with an error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
      argv: arguments. None means those of this process, which then ends with the command.
    """
    if argv is None:
        # Start-up makes half a million objects that stay. By default, Python would look for garbage among them at every
        # 700 new ones, which takes a tenth of the start-up's time.
        gc.set_threshold(10_000)
    code = _run_safely(list(sys.argv[1:] if argv is None else argv), is_process=argv is None)
    return end_process(code) if argv is None else code


def end_process(code: int) -> int:
    """Returns the exit code with which this process ends, or ends it at once if something in it goes on.

    XLA may still compile what was interrupted, in threads of its own or of ours. The end of Python would wait for ours,
    and destroy what the others use: then the process would crash. A tracker that hangs, which the run has given up, may
    make the end of Python wait for it as well.
    """
    signals, loggers = (sys.modules.get(f"qfleet.runtime.{name}") for name in ("signals", "loggers"))
    if (signals and signals.has_interrupted()) or (loggers and loggers.has_abandoned()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run_safely(arguments: list[str], *, is_process: bool) -> int:
    """Runs one command, turns what users can cause into a line and an exit code, and returns that.

    Args:
      arguments: the command and its flags.
      is_process: whether this process ends with the command.
    """
    prepare_streams()
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    try:
        _check_current_folder()
        code = _dispatch(arguments, is_process)
        sys.stdout.flush()  # here, where a failure has an exit code
        return code
    except BrokenPipeError:  # the reader of stdout has had enough, as in `qfleet envs | head -1`
        give_stdout_up()
        return 1
    except (ConfigError, RunFailed, OSError) as error:
        _give_up_a_full_stdout()
        if debug:
            traceback.print_exc()
        print(f"qfleet: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except ValueError as error:
        # JAX raises it when it is imported, if one of its variables holds something that it can't read.
        if debug or "jax_" not in str(error).lower():
            raise
        print(f"qfleet: error: JAX must understand its variables, got: {error}; unset it", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from qfleet.runtime.devices import lack_of_memory  # only here, because it imports JAX

        lack = lack_of_memory(error)
        if debug or lack is None:
            raise
        print(f"qfleet: error: {lack}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("qfleet: interrupted", file=sys.stderr)
        return 130


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the current folder must exist, and it was deleted; change to another one") from error


def _give_up_a_full_stdout() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        give_stdout_up()


def _dispatch(arguments: list[str], is_process: bool) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP.format(commands="\n".join(f"  {name:<9} {text}" for name, text in _COMMANDS.items())), end="")
        return 0
    if arguments[0] == "--version":
        from importlib import metadata

        print(metadata.version("qfleet"))
        return 0
    command, *rest = arguments
    if command not in _COMMANDS:
        raise ConfigError(
            f"the command must be one of {', '.join(_COMMANDS)}, got {command!r}.{suggest(command, _COMMANDS)}"
        )
    with _signals(command, is_process):
        return _run(command, rest)


def _signals(command: str, is_process: bool) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which signals ask the command to stop, if it is one that trains."""
    if command not in ("train", "resume", "rerun", "sweep"):
        return contextlib.nullcontext()
    from qfleet.runtime.signals import StopFlag

    return StopFlag(ends_process=is_process)


def _run(command: str, rest: list[str]) -> int:
    module = importlib.import_module(f"qfleet.cli.{command.replace('-', '_')}_command")
    code: int = module.run(rest)
    return code
