"""`qfleet train ENV`: every field of the config is a flag."""

import dataclasses
import functools
import shlex
import typing
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import tyro

from qfleet.cli.config_file import config_from_file, config_text, print_config, read_config_file, settings_of
from qfleet.cli.flag_types import FLAG_TYPES, LOG, read_flags
from qfleet.cli.show import follow
from qfleet.cli.streams import only_the_answer_on_stdout
from qfleet.cli.topology_flags import replace_alias, take_mesh, topology_flags, value_of
from qfleet.cli.train_help import show_help
from qfleet.config import AgentConfig, ConfigError, MeshConfig, TrainConfig
from qfleet.presets import make_config, make_explained_config

_Env = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV")]


def flag_kinds() -> dict[str, Any]:
    """Returns the types of all flags, by name: the settings of an agent, of a run and of all topologies."""
    kinds = {field.name: field.type for kind in (TrainConfig, AgentConfig) for field in dataclasses.fields(kind)}
    kinds |= {"env": typing.Required[_Env], "log": typing.Required[LOG], "quiet": bool, "num_seeds_at_once": int}
    kinds |= {"config": str, "print_config": bool, "trust": bool}
    kinds |= topology_flags()
    del kinds["agent"]
    return kinds


class TrainRequest(NamedTuple):
    """What a command line asks for."""

    config: TrainConfig
    log: tuple[str, ...]
    """Trackers to log to."""
    quiet: bool
    reason: str
    """What to say of the preset: why it was chosen, or how it was adapted. It may be empty."""
    num_seeds_at_once: int | None = None
    print_config: bool = False
    """Whether to print the config, in place of training."""


def run(arguments: Sequence[str]) -> int:
    """Trains the run that the flags describe, or prints its config."""
    with only_the_answer_on_stdout(_wants_config(arguments)):  # the environment's module may print when it is imported
        request = parse(arguments)
    if request.print_config:
        command = shlex.join(argument for argument in arguments if not _wants_config([argument]))
        print_config(config_text(request.config, f"`qfleet train {command}` would run", request.reason))
        return 0
    from qfleet.api import iterate

    start = functools.partial(iterate, request.config, loggers=request.log, num_seeds_at_once=request.num_seeds_at_once)
    return follow(start, quiet=request.quiet, reason=request.reason)


def parse(arguments: Sequence[str], prog: str = "qfleet train") -> TrainRequest:
    """Returns the run that the flags describe. What they leave out comes from the file, the preset or the environment.

    Args:
      arguments: arguments of the command.
      prog: name of the command in errors and in the help.

    Raises:
      ConfigError: if the flags don't go together, or the file that they name isn't one of settings.
      SystemExit: if a flag is unknown or its value can't be read, or after the help was shown.
    """
    if {"-h", "--help"} & set(arguments):
        _show_help(replace_alias(arguments), prog)
    kinds = flag_kinds()
    if value_of("--config", arguments) is not None:
        kinds["env"] = _Env  # the file may name it
    given = read_flags(kinds, arguments, prog)  # what is absent here comes from make_config
    path = given.pop("config", None)
    request = {name: given.pop(name) for name in ("log", "quiet", "num_seeds_at_once", "print_config") if name in given}
    trust = given.pop("trust", False)
    if path is not None:
        file = read_config_file(path)
        if config := config_from_file(file, given, trust=trust):
            return TrainRequest(config, reason="", **{"log": (), "quiet": False, **request})
        given = settings_of(file, given, trust=trust)
    elif trust:
        raise ConfigError("--trust must come with --config, because what flags name needs none; leave it out")
    if mesh := take_mesh(given):
        given["mesh"] = MeshConfig(**mesh)
    env, preset = given.pop("env"), given.pop("preset", None)
    config, reason = make_explained_config(env, preset, given.pop("topology", None), may_start_processes=True, **given)
    return TrainRequest(config, reason=reason, **{"log": (), "quiet": False, **request})


def _wants_config(arguments: Sequence[str]) -> bool:
    return any(argument.replace("_", "-") == "--print-config" for argument in arguments)


def _show_help(arguments: Sequence[str], prog: str) -> None:
    """Shows all flags, with the defaults of the preset and environment that are named, and exits."""
    preset, topology = value_of("--preset", arguments), value_of("--topology", arguments)
    is_env_known = not arguments[0].startswith("-")
    env, topology = (arguments[0], topology) if is_env_known else ("ENV", topology or "fused")
    show_help(make_config(env, preset, topology), prog, registry=FLAG_TYPES)
