"""`qfleet resume RUN`."""

import argparse
import dataclasses
from collections.abc import Sequence

import tyro

from qfleet.cli.show import follow
from qfleet.config import TOPOLOGIES, ConfigError, TopologyConfig, check_suits, suggest, topology_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ResumeFlags:
    """Goes on with a run from its newest checkpoint, as if it had never stopped.

    With --topology or any flag of a topology, such as --num-actors 8 or --num-envs 64, it goes on elsewhere, or in
    another size: lanes begin new episodes, and the replay is divided anew over them.
    """

    run: tyro.conf.Positional[str]
    """The run's folder."""
    env_steps: int | None = None
    """A new end of the run, in environment steps from its beginning."""
    checkpoint: int | None = None
    """The environment step of another checkpoint than the newest; newer ones are set aside."""
    num_processes: int | None = None
    """Of a decentralised run: how many it goes on with; their lanes and replay are divided anew. By default those that
    it began with, as for the next three."""
    coordinator: str | None = None
    """HOST:PORT of its first process, to start each by hand; `local` starts all of them on this machine."""
    process_id: int | None = None
    """Of processes started by hand: which to start here, from 0. Start the others with the same flags else."""
    ray_address: str | None = None
    """Address of the Ray cluster that places its processes, or the parts of a fleet."""
    quiet: bool = False
    """Print nothing but errors."""


_CONFIG = (tyro.conf.FlagCreatePairsOff,)


def run(arguments: Sequence[str]) -> int:
    """Goes on with the run that the flags name."""
    parsed = tyro.cli(
        _ResumeFlags, prog="qfleet resume", args=list(arguments), config=_CONFIG, return_unknown_args=True
    )
    flags, others = parsed
    from qfleet.api import resume

    run = resume(
        flags.run,
        env_steps=flags.env_steps,
        checkpoint=flags.checkpoint,
        topology=_topology_of(flags.run, others) if others else None,
        num_processes=flags.num_processes,
        coordinator=flags.coordinator,
        process_id=flags.process_id,
        ray_address=flags.ray_address,
    )
    return follow(run, quiet=flags.quiet)


def _topology_of(run_dir: str, arguments: list[str]) -> TopologyConfig:
    """Returns the topology that the flags describe, over the one that the run began with.

    Raises:
      ConfigError: if there is no such run or topology.
    """
    from qfleet.runtime.run_directory import RunDirectory

    recorded = RunDirectory.open(run_dir).config.topology
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--topology", default=topology_name(recorded))
    chosen, flags = chooser.parse_known_args(arguments)
    if chosen.topology not in TOPOLOGIES:
        hint = suggest(chosen.topology, TOPOLOGIES)
        raise ConfigError(f"topology must be one of {', '.join(TOPOLOGIES)}, got {chosen.topology!r}.{hint}")
    for flag in flags:
        if flag.startswith("--"):
            check_suits(flag.removeprefix("--").partition("=")[0].replace("-", "_"), chosen.topology)
    kind = TOPOLOGIES[chosen.topology]
    default = recorded
    if not isinstance(recorded, kind):
        has_lanes = any(field.name == "num_envs" for field in dataclasses.fields(kind))
        default = kind(**({"num_envs": recorded.num_envs} if has_lanes else {}))  # type: ignore[arg-type]
    topology: TopologyConfig = tyro.cli(kind, prog="qfleet resume", args=flags, default=default, config=_CONFIG)
    return topology
