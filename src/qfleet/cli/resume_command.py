"""`qfleet resume RUN`."""

import dataclasses
from collections.abc import Sequence

import tyro

from qfleet.cli.show import follow


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ResumeFlags:
    """Goes on with a run from its newest checkpoint, as if it had never stopped."""

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
    """Address of the Ray cluster that places its processes."""
    quiet: bool = False
    """Print nothing but errors."""


def run(arguments: Sequence[str]) -> int:
    """Goes on with the run that the flags name."""
    flags = tyro.cli(_ResumeFlags, prog="qfleet resume", args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,))
    from qfleet.api import resume

    run = resume(
        flags.run,
        env_steps=flags.env_steps,
        checkpoint=flags.checkpoint,
        num_processes=flags.num_processes,
        coordinator=flags.coordinator,
        process_id=flags.process_id,
        ray_address=flags.ray_address,
    )
    return follow(run, quiet=flags.quiet)
