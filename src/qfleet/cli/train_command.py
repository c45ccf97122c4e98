"""`qfleet train ENV`: every field of the config is a flag."""

import dataclasses
import functools
import typing
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import tyro

from qfleet.cli.flag_types import FLAG_TYPES, LOG, read_flags
from qfleet.cli.show import follow
from qfleet.cli.topology_flags import replace_alias, take_mesh, topology_flags, value_of
from qfleet.cli.train_help import show_help
from qfleet.config import AgentConfig, MeshConfig, TrainConfig
from qfleet.presets import make_config, make_explained_config

_Env = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV")]


def flag_kinds() -> dict[str, Any]:
    """Returns the types of all flags, by name: the settings of an agent, of a run and of all topologies."""
    kinds = {field.name: field.type for kind in (TrainConfig, AgentConfig) for field in dataclasses.fields(kind)}
    kinds |= {"env": typing.Required[_Env], "log": typing.Required[LOG], "quiet": bool, "num_seeds_at_once": int}
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


def run(arguments: Sequence[str]) -> int:
    """Trains the run that the flags describe."""
    config, log, quiet, reason, num_seeds_at_once = parse(arguments)
    from qfleet.api import iterate

    start = functools.partial(iterate, config, loggers=log, num_seeds_at_once=num_seeds_at_once)
    return follow(start, quiet=quiet, reason=reason)


def parse(arguments: Sequence[str], prog: str = "qfleet train") -> TrainRequest:
    """Returns the run that the flags describe. What they leave out comes from the preset and the environment.

    Args:
      arguments: arguments of the command.
      prog: name of the command in errors and in the help.

    Raises:
      ConfigError: if the flags don't go together.
      SystemExit: if a flag is unknown or its value can't be read, or after the help was shown.
    """
    if {"-h", "--help"} & set(arguments):
        _show_help(replace_alias(arguments), prog)
    given = read_flags(flag_kinds(), arguments, prog)  # what is absent here comes from make_config
    quiet, log = given.pop("quiet", False), given.pop("log", ())
    num_seeds_at_once = given.pop("num_seeds_at_once", None)
    if mesh := take_mesh(given):
        given["mesh"] = MeshConfig(**mesh)
    env, preset = given.pop("env"), given.pop("preset", None)
    config, reason = make_explained_config(env, preset, given.pop("topology", None), may_start_processes=True, **given)
    return TrainRequest(config, log, quiet, reason, num_seeds_at_once)


def _show_help(arguments: Sequence[str], prog: str) -> None:
    """Shows all flags, with the defaults of the preset and environment that are named, and exits."""
    preset, topology = value_of("--preset", arguments), value_of("--topology", arguments)
    is_env_known = not arguments[0].startswith("-")
    env, topology = (arguments[0], topology) if is_env_known else ("ENV", topology or "fused")
    show_help(make_config(env, preset, topology), prog, registry=FLAG_TYPES)
