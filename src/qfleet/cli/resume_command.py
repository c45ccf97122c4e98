"""`qfleet resume RUN`."""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated

import tyro

from qfleet.cli.run_folder import RUN_HELP, find_run
from qfleet.cli.show import follow
from qfleet.cli.topology_flags import check_flags, replace_alias
from qfleet.config import TOPOLOGIES, TopologyConfig
from qfleet.config.topologies import check_topology_name, field_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ResumeFlags:
    """Continues a run from its newest checkpoint, as if it had never stopped.

    With --topology or any flag of a topology, such as --num-actors 8 or --num-envs 64, it continues in another place or
    in another size. Its lanes then begin new episodes, and the replay is divided anew over them.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help=RUN_HELP)]
    env_steps: int | None = None
    """Environment step at which the run ends, counted from its beginning. The default is the run's own."""
    checkpoint: int | None = None
    """Environment step of the checkpoint to continue from, instead of the newest; newer ones are set aside."""
    num_processes: int | None = None
    """Number of processes of an all-reduce or gossip run; lanes and replay are divided anew over them.
    This flag and the next three default to what the run began with."""
    coordinator: str | None = None
    """HOST:PORT of the first process of an all-reduce run, to start each process by hand.
    With `local`, all processes are started on this machine."""
    process_id: int | None = None
    """Number of the process to start here, from 0, if each is started by hand.
    Start the others with otherwise the same flags."""
    ray_address: str | None = None
    """Address of the Ray cluster that the processes run on."""
    quiet: bool = False
    """Print nothing but errors."""


_CONFIG = (tyro.conf.FlagCreatePairsOff,)


def run(arguments: Sequence[str]) -> int:
    """Continues the run that the flags name."""
    parsed = tyro.cli(
        _ResumeFlags, prog="qfleet resume", args=list(arguments), config=_CONFIG, return_unknown_args=True
    )
    flags, others = parsed
    run_dir = find_run(flags.run)
    from qfleet.api import resume

    start = functools.partial(
        resume,
        run_dir,
        env_steps=flags.env_steps,
        checkpoint=flags.checkpoint,
        topology=_topology_of(run_dir, others) if others else None,
        num_processes=flags.num_processes,
        coordinator=flags.coordinator,
        process_id=flags.process_id,
        ray_address=flags.ray_address,
    )
    return follow(start, quiet=flags.quiet)


def _topology_of(run_dir: str, arguments: list[str]) -> TopologyConfig:
    """Returns the topology that the flags describe; what they leave out is as the run began.

    Raises:
      ConfigError: if there is no such run or topology.
    """
    from qfleet.runtime.run_directory import RunDirectory

    recorded = RunDirectory.open(run_dir).config.topology
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--topology", default=recorded.name)
    chosen, flags = chooser.parse_known_args(replace_alias(arguments))
    check_topology_name(chosen.topology)
    check_flags(flags, chosen.topology)
    kind = TOPOLOGIES[chosen.topology]
    default = recorded
    if chosen.topology != recorded.name:
        default = kind(**({"num_envs": recorded.num_envs} if "num_envs" in field_names(kind) else {}))
    topology: TopologyConfig = tyro.cli(kind, prog="qfleet resume", args=flags, default=default, config=_CONFIG)
    return topology
