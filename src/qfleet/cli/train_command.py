"""`qfleet train ENV`: every field of the config is a flag."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal, cast

import tyro

from qfleet.cli.show import follow
from qfleet.config import (
    EXPLORATION_SCHEDULE,
    TOPOLOGIES,
    ActorLearnerConfig,
    AgentConfig,
    DecentralisedConfig,
    FusedConfig,
    OverlappedConfig,
    ParameterServerConfig,
    TrainConfig,
    check_suits,
    topology_name,
)
from qfleet.presets import make_config

DEFAULT_PRESET = "pqn"

_FLAT = tyro.conf.arg(name="")  # its fields' flags have no prefix


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
    topology_name: Annotated[
        Literal["fused", "overlapped", "decentralised", "actor-learner", "parameter-server"],
        tyro.conf.arg(name="topology"),
    ] = "fused"
    """Where it runs. fused: acting and learning in one compiled program, for environments written in JAX. overlapped:
    the others step in threads or processes while the learner learns. decentralised: either, in several processes.
    actor-learner: either, many actors and one learner on Ray. parameter-server: either, many workers send gradients
    to a server on Ray."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FusedFlags(_TrainFlags):
    __doc__ = _TrainFlags.__doc__
    topology: Annotated[FusedConfig, _FLAT] = dataclasses.field(default_factory=FusedConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OverlappedFlags(_TrainFlags):
    __doc__ = _TrainFlags.__doc__
    topology: Annotated[OverlappedConfig, _FLAT] = dataclasses.field(default_factory=OverlappedConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DecentralisedFlags(_TrainFlags):
    __doc__ = _TrainFlags.__doc__
    topology: Annotated[DecentralisedConfig, _FLAT] = dataclasses.field(default_factory=DecentralisedConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ActorLearnerFlags(_TrainFlags):
    __doc__ = _TrainFlags.__doc__
    topology: Annotated[ActorLearnerConfig, _FLAT] = dataclasses.field(default_factory=ActorLearnerConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ParameterServerFlags(_TrainFlags):
    __doc__ = _TrainFlags.__doc__
    topology: Annotated[ParameterServerConfig, _FLAT] = dataclasses.field(default_factory=ParameterServerConfig)


# Or each topology's flags would be a subcommand.
_FLAGS = {
    "fused": _FusedFlags,
    "overlapped": _OverlappedFlags,
    "decentralised": _DecentralisedFlags,
    "actor-learner": _ActorLearnerFlags,
    "parameter-server": _ParameterServerFlags,
}

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
    preset = _value_of("--preset", arguments) or DEFAULT_PRESET
    topology = _value_of("--topology", arguments)
    if arguments and not arguments[0].startswith("-"):
        return _parse(arguments, make_config(arguments[0], preset, topology), is_env_known=True, prog=prog)
    flags = _parse(arguments, make_config("ENV", preset, topology or "fused"), is_env_known=False, prog=prog)
    return _parse(
        arguments, make_config(flags.env, preset, topology), is_env_known=True, prog=prog
    )  # which may be tuned


def _parse(arguments: Sequence[str], config: TrainConfig, *, is_env_known: bool, prog: str) -> _TrainFlags:
    defaults = {name: getattr(config, name) for name in _CONFIG_FIELDS}
    if not is_env_known:
        defaults["env"] = tyro.MISSING
    name = topology_name(config.topology)
    flags = _FLAGS[name]
    of_topologies = (field.name for kind in TOPOLOGIES.values() for field in dataclasses.fields(kind))
    for setting in (*of_topologies, *EXPLORATION_SCHEDULE):
        flag = f"--{setting.replace('_', '-')}"
        if any(argument == flag or argument.startswith(f"{flag}=") for argument in arguments):
            check_suits(setting, name)  # of one that isn't there tyro would only say so
    parsed = tyro.cli(
        flags,
        prog=prog,
        args=list(arguments),
        default=flags(**defaults, topology_name=name),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return cast(_TrainFlags, parsed)


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """Returns the value of a flag before the whole is parsed, for other flags' defaults depend on it."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return None
