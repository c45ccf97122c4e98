"""`qfleet train ENV`: every field of the config is a flag."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from qfleet.cli.show import follow
from qfleet.cli.topology_flags import check_flags, replace_alias, value_of
from qfleet.cli.train_help import show_help
from qfleet.config import TOPOLOGIES, AgentConfig, TopologyConfig, TrainConfig
from qfleet.presets import make_config

DEFAULT_PRESET = "pqn"

_FLAT = tyro.conf.arg(name="")  # flags of the config's fields have no prefix

_TOPOLOGY_HELP = (
    "Where the run takes place. The default is the topology that suits the environment. "
    + " ".join(f"{name}: {kind.summary}." for name, kind in TOPOLOGIES.items())
    + " (`decentralised --exchange all-reduce` and `--exchange gossip` are earlier names of two of them.)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainFlags(TrainConfig):
    """Trains a deep Q-network, and writes everything about the run to its folder.

    The defaults are those of the preset, or the ones tuned for the environment: name the environment to see them.
    """

    env: tyro.conf.Positional[str]
    """Name of the environment to learn, as listed by `qfleet envs`."""
    preset: str = DEFAULT_PRESET
    """Preset that the defaults of the other settings come from, as listed by `qfleet presets`."""
    agent: Annotated[AgentConfig, _FLAT] = dataclasses.field(default_factory=AgentConfig)
    topology_name: Annotated[str, tyro.conf.arg(name="topology", metavar="NAME", help=_TOPOLOGY_HELP)] = "fused"
    quiet: bool = False
    """Print nothing but errors."""


def _flags_of(kind: type[TopologyConfig]) -> type[_TrainFlags]:
    """Returns one class with all flags of a run with this topology; as a field of its own it would be a subcommand."""
    topology = ("topology", Annotated[kind, _FLAT], dataclasses.field(default_factory=kind))
    flags = dataclasses.make_dataclass("_Flags", [topology], bases=(_TrainFlags,), frozen=True, kw_only=True)
    flags.__doc__ = _TrainFlags.__doc__
    return flags


_CONFIG_FIELDS = [field.name for field in dataclasses.fields(TrainConfig)]


def run(arguments: Sequence[str]) -> int:
    """Trains the run that the flags describe."""
    flags = parse(arguments)
    from qfleet.api import iterate

    return follow(lambda: iterate(config_of(flags)), quiet=flags.quiet)


def config_of(flags: _TrainFlags) -> TrainConfig:
    """Returns the config that the flags describe."""
    return TrainConfig(**{name: getattr(flags, name) for name in _CONFIG_FIELDS})


def parse(arguments: Sequence[str], prog: str = "qfleet train") -> _TrainFlags:
    """Returns the flags, with the defaults of the environment and the preset that they name.

    Args:
      arguments: arguments of the command.
      prog: name of the command in errors and in the help.
    """
    arguments = replace_alias(arguments)
    if {"-h", "--help"} & set(arguments):
        _show_help(arguments, prog)
    preset = value_of("--preset", arguments) or DEFAULT_PRESET
    topology = value_of("--topology", arguments)
    if arguments and not arguments[0].startswith("-"):
        return _parse(arguments, make_config(arguments[0], preset, topology), is_env_known=True, prog=prog)
    flags = _parse(arguments, make_config("ENV", preset, topology or "fused"), is_env_known=False, prog=prog)
    tuned = make_config(flags.env, preset, topology)
    return _parse(arguments, tuned, is_env_known=True, prog=prog)


def _show_help(arguments: Sequence[str], prog: str) -> None:
    """Shows all flags, with the defaults of the preset and environment that are named, and exits."""
    preset, topology = value_of("--preset", arguments) or DEFAULT_PRESET, value_of("--topology", arguments)
    is_env_known = not arguments[0].startswith("-")
    env, topology = (arguments[0], topology) if is_env_known else ("ENV", topology or "fused")
    show_help(make_config(env, preset, topology), prog)


def _parse(arguments: Sequence[str], config: TrainConfig, *, is_env_known: bool, prog: str) -> _TrainFlags:
    defaults = {name: getattr(config, name) for name in _CONFIG_FIELDS}
    if not is_env_known:
        defaults["env"] = tyro.MISSING
    check_flags(arguments, config.topology.name)
    flags = _flags_of(type(config.topology))
    parsed = tyro.cli(
        flags,
        prog=prog,
        args=list(arguments),
        default=flags(**defaults, topology_name=config.topology.name),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return parsed
