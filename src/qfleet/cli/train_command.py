"""`qfleet train ENV`: every field of the config is a flag."""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import tyro

from qfleet.cli.flag_types import FLAG_TYPES, read_flags
from qfleet.cli.show import follow
from qfleet.cli.topology_flags import replace_alias, take_mesh, topology_flags, value_of
from qfleet.config import TOPOLOGIES, AgentConfig, MeshConfig, TopologyConfig, TrainConfig
from qfleet.presets import make_config, make_explained_config

_FLAT = tyro.conf.arg(name="")  # flags of the config's fields have no prefix

_Env = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV")]

_TOPOLOGY_HELP = (
    "Where the run takes place. The default is the topology that suits the environment. "
    + " ".join(f"{name}: {kind.summary}." for name, kind in TOPOLOGIES.items())
    + " (`decentralised --exchange all-reduce` and `--exchange gossip` are earlier names of two of them.)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Help(TrainConfig):  # what the help is made from
    """Trains a deep Q-network, and writes everything about the run to its folder.

    The defaults are those of the preset, or the ones tuned for the environment: name the environment to see them.
    """

    env: _Env
    """Name of the environment to learn, as listed by `qfleet envs`."""
    preset: str = "custom"
    """Preset that the defaults of the other settings come from, as listed by `qfleet presets`.
    By default, preset and settings are chosen for the environment and the topology."""
    agent: Annotated[AgentConfig, _FLAT] = dataclasses.field(default_factory=AgentConfig)
    topology_name: Annotated[str, tyro.conf.arg(name="topology", metavar="NAME", help=_TOPOLOGY_HELP)] = "fused"
    quiet: bool = False
    """Print nothing but errors."""

    def __post_init__(self) -> None:
        """Checks nothing, because the environment may be missing."""


def _help_of(kind: type[TopologyConfig]) -> type[_Help]:
    """Returns one class with all flags of a run with this topology; as a field of its own it would be a subcommand."""
    topology = ("topology", Annotated[kind, _FLAT], dataclasses.field(default_factory=kind))
    flags = dataclasses.make_dataclass("_Flags", [topology], bases=(_Help,), frozen=True, kw_only=True)
    flags.__doc__ = _Help.__doc__
    return flags


def flag_kinds() -> dict[str, Any]:
    """Returns the types of all flags, by name: the settings of an agent, of a run and of all topologies."""
    kinds = {field.name: field.type for kind in (TrainConfig, AgentConfig) for field in dataclasses.fields(kind)}
    kinds |= {"env": typing.Required[_Env], "quiet": bool, **topology_flags()}
    del kinds["agent"]
    return kinds


class TrainRequest(NamedTuple):
    """What a command line asks for."""

    config: TrainConfig
    quiet: bool
    reason: str
    """Why the preset was chosen; empty if the user named it."""


def run(arguments: Sequence[str]) -> int:
    """Trains the run that the flags describe."""
    config, quiet, reason = parse(arguments)
    from qfleet.api import iterate

    return follow(iterate(config), quiet=quiet, reason=reason)


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
    quiet = given.pop("quiet", False)
    if mesh := take_mesh(given):
        given["mesh"] = MeshConfig(**mesh)
    env, preset = given.pop("env"), given.pop("preset", None)
    config, reason = make_explained_config(env, preset, given.pop("topology", None), **given)
    return TrainRequest(config, quiet, reason)


def _show_help(arguments: Sequence[str], prog: str) -> None:
    """Shows all flags, with the defaults of the preset and environment that are named, and exits."""
    preset, topology = value_of("--preset", arguments), value_of("--topology", arguments)
    if arguments[0].startswith("-"):
        config, env = make_config("ENV", preset, topology or "fused"), tyro.MISSING
    else:
        config = make_config(arguments[0], preset, topology)
        env = config.env
    kind = _help_of(type(config.topology))
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    default = kind(**fields | {"env": env}, topology_name=config.topology.name)
    tyro.cli(kind, prog=prog, args=["--help"], default=default, registry=FLAG_TYPES)
