"""`qfleet train ENV`: every field of the config is a flag."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from qfleet.cli.show import follow
from qfleet.cli.topology_flags import check_flags, replace_alias, value_of
from qfleet.config import TOPOLOGIES, AgentConfig, TopologyConfig, TrainConfig
from qfleet.presets import make_config

DEFAULT_PRESET = "pqn"

_FLAT = tyro.conf.arg(name="")  # its fields' flags have no prefix

_TOPOLOGY_HELP = (
    "Where it runs; by default what suits the environment. "
    + " ".join(f"{name}: {kind.summary}." for name, kind in TOPOLOGIES.items())
    + " (`decentralised --exchange all-reduce` and `--exchange gossip` are earlier names of two of them.)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainFlags(TrainConfig):
    """Trains a deep Q-network and leaves everything about it in a run directory.

    Defaults are those of the preset, tuned where the environment has tuned settings: name the environment to see them.
    """

    env: tyro.conf.Positional[str]
    """What to learn, as `qfleet envs` lists them."""
    preset: str = DEFAULT_PRESET
    """Where the settings below start from, as `qfleet presets` lists them."""
    agent: Annotated[AgentConfig, _FLAT] = dataclasses.field(default_factory=AgentConfig)
    topology_name: Annotated[str, tyro.conf.arg(name="topology", metavar="NAME", help=_TOPOLOGY_HELP)] = "fused"
    quiet: bool = False
    """Print nothing but errors."""


def _flags_of(kind: type[TopologyConfig]) -> type[_TrainFlags]:
    """Returns the flags of one topology: all in one class, or each topology's flags would be a subcommand."""
    topology = ("topology", Annotated[kind, _FLAT], dataclasses.field(default_factory=kind))
    flags = dataclasses.make_dataclass("_Flags", [topology], bases=(_TrainFlags,), frozen=True, kw_only=True)
    flags.__doc__ = _TrainFlags.__doc__
    return flags


_CONFIG_FIELDS = [field.name for field in dataclasses.fields(TrainConfig)]


def run(arguments: Sequence[str]) -> int:
    """Trains as the flags say."""
    flags = parse(arguments)
    from qfleet.api import iterate

    return follow(iterate(config_of(flags)), quiet=flags.quiet)


def config_of(flags: _TrainFlags) -> TrainConfig:
    """Returns the config that the flags describe."""
    return TrainConfig(**{name: getattr(flags, name) for name in _CONFIG_FIELDS})


def parse(arguments: Sequence[str], prog: str = "qfleet train") -> _TrainFlags:
    """Returns the flags, over the defaults of the environment and the preset that they name.

    Args:
      arguments: of the command.
      prog: what errors and the help call it.
    """
    arguments = replace_alias(arguments)
    preset = value_of("--preset", arguments) or DEFAULT_PRESET
    topology = value_of("--topology", arguments)
    if arguments and not arguments[0].startswith("-"):
        return _parse(arguments, make_config(arguments[0], preset, topology), is_env_known=True, prog=prog)
    flags = _parse(arguments, make_config("ENV", preset, topology or "fused"), is_env_known=False, prog=prog)
    tuned = make_config(flags.env, preset, topology)
    return _parse(arguments, tuned, is_env_known=True, prog=prog)


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
