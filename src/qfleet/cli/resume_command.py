"""`qfleet resume RUN`."""

import dataclasses
import functools
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from qfleet.cli.flag_types import FLAG_TYPES, LOG, read_flags
from qfleet.cli.show import follow
from qfleet.cli.topology_flags import topology_flags, topology_with
from qfleet.config import TopologyConfig
from qfleet.config.checks import check_checkpoint, check_count
from qfleet.runtime.finding_runs import RUN_HELP, find_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ResumeFlags:
    """Continues a run from its newest checkpoint, as if it had never stopped.

    With --topology or any flag of a topology, such as --num-actors 8 or --num-envs 64, it continues in another place or
    in another size. Its lanes then begin new episodes, and the replay is divided anew over them.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help=RUN_HELP)]
    env_steps: int | None = None
    """Environment step at which the run ends, counted from its beginning. The default is the run's own."""
    stop_return: float | Literal["none"] | None = None
    """Mean greedy return at which the run ends, or `none`. The default is the run's own, unless it has been reached."""
    checkpoint: int | Literal["best"] | None = None
    """Environment step of the checkpoint to continue from, instead of the newest; newer ones are set aside.
    `best` is that of the best evaluation. It has no replay, so the run warms up anew there."""
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
    num_seeds_at_once: int | None = None
    """Number of seeds trained at the same time, if each has a process of its own, as for `qfleet train`."""
    trust: bool = False
    """Import modules (MODULE:NAME, of the environment or the agent's parts) that only the run's folder names, and join
    the Ray cluster at an address that only it names. Both run their code."""
    log: LOG = ()
    """Tracker to log to, as for `qfleet train`. Several if it is given several times."""
    quiet: bool = False
    """Print nothing but errors."""
    print_config: bool = False
    """Print the configuration that the run would go on with, as `qfleet train --print-config` does, and stop."""


def run(arguments: Sequence[str]) -> int:
    """Continues the run that the flags name."""
    flags, others = parse(arguments)
    run_dir = find_run(flags.run)
    from qfleet.runtime.run_directory import RunDirectory

    topology = topology_with(RunDirectory.open(run_dir).config.topology, others) if others else None
    if flags.print_config:
        return _print_config(flags, run_dir, topology)
    from qfleet.api import resume

    start = functools.partial(
        resume,
        run_dir,
        env_steps=flags.env_steps,
        stop_return=flags.stop_return,
        checkpoint=flags.checkpoint,
        topology=topology,
        num_processes=flags.num_processes,
        coordinator=flags.coordinator,
        process_id=flags.process_id,
        ray_address=flags.ray_address,
        loggers=flags.log,
        trust=flags.trust,
        num_seeds_at_once=flags.num_seeds_at_once,
    )
    return follow(start, quiet=flags.quiet)


def parse(arguments: Sequence[str]) -> tuple[_ResumeFlags, dict[str, Any]]:
    """Returns the command's own flags, and the settings of a topology that the others give.

    Raises:
      ConfigError: if a number is out of bounds.
      SystemExit: if a flag is unknown or its value can't be read, or after the help was shown.
    """
    if {"-h", "--help"} & set(arguments):
        tyro.cli(_ResumeFlags, prog="qfleet resume", args=["--help"], registry=FLAG_TYPES)
    own: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(_ResumeFlags)}
    kinds = topology_flags() | own | {name: typing.Required[own[name]] for name in ("run", "log")}
    given = read_flags(kinds, arguments, "qfleet resume")
    flags = _ResumeFlags(**{name: given.pop(name) for name in own if name in given})
    if flags.env_steps is not None:
        check_count("env_steps", flags.env_steps)
    check_checkpoint(flags.checkpoint)
    if flags.ray_address is not None and any(name.endswith("_node_labels") for name in given):
        given["ray_address"] = flags.ray_address  # labels need an address of a cluster
    return flags, given


def _print_config(flags: _ResumeFlags, run_dir: str, topology: TopologyConfig | None) -> int:
    from qfleet.cli.config_file import config_text, print_config
    from qfleet.runtime.run_directory import RunDirectory
    from qfleet.training.resuming import config_to_resume

    names = ("env_steps", "stop_return", "num_processes", "coordinator", "process_id", "ray_address")
    given = {name: getattr(flags, name) for name in names}
    config = config_to_resume(RunDirectory.open(run_dir).config, topology=topology, **given)
    print_config(config_text(config, f"run {run_dir} would go on with"))
    return 0
