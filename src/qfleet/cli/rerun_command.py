"""`qfleet rerun RUN`."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import tyro

from qfleet.cli.flag_types import FLAG_TYPES
from qfleet.cli.show import follow
from qfleet.runtime.finding_runs import RUN_HELP, find_run

if TYPE_CHECKING:
    from qfleet.runtime.environment_record import Difference
    from qfleet.runtime.run_directory import RunDirectory
    from qfleet.training.launched import LaunchedRun
    from qfleet.training.run import Run
    from qfleet.training.seeds import SeedsRun


@dataclasses.dataclass(frozen=True, kw_only=True)
class _RerunFlags:
    """Trains a run again, with the same config and seed in a new folder, and compares the results.

    Before it starts, it says what differs from when the run was first started: versions of packages, devices, flags of
    JAX and XLA, the git commit. At the end it says whether the last evaluation and the parameters are the same. The
    exit code is 1 if they differ where the same seed should give the same result.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help=RUN_HELP)]
    run_dir: str | None = None
    """Folder of the new run. The default is `runs/<env>-<preset>-<seed>-<time>`."""
    num_seeds_at_once: int | None = None
    """Number of seeds trained at the same time, if each has a process of its own, as for `qfleet train`."""
    trust: bool = False
    """Import modules (MODULE:NAME, of the environment or the agent's parts) that only the run's folder names, and join
    the Ray cluster at an address that only it names. Both run their code."""
    quiet: bool = False
    """Print only the comparison and errors."""


def run(arguments: Sequence[str]) -> int:
    """Trains the run that the flags name again, and compares the results."""
    flags = tyro.cli(_RerunFlags, prog="qfleet rerun", args=list(arguments), registry=FLAG_TYPES)
    run_dir = find_run(flags.run)
    from qfleet.api import iterate
    from qfleet.runtime.run_directory import RunDirectory
    from qfleet.training.rerunning import compare, config_to_rerun, what_differs

    before = RunDirectory.open(run_dir)
    config = config_to_rerun(before, flags.run_dir, trust=flags.trust)
    differences = what_differs(before)
    if not flags.quiet:
        print(_since_then(before, differences), flush=True)
    started: list[Run | LaunchedRun | SeedsRun] = []

    def start() -> "Run | LaunchedRun | SeedsRun":
        started.append(iterate(config, num_seeds_at_once=flags.num_seeds_at_once))
        return started[0]

    follow(start, quiet=flags.quiet)
    found = compare(before, started[0].directory)
    print(found.words)
    if found.is_same is not False:
        return 0
    if not config.topology.is_repeatable(config.agent):
        print(f"they need not be the same: in topology {config.topology.name}, as it is set, timing decides too")
        return 0
    if differences:
        print("what differs from then may be the reason: " + ", ".join(each.what for each in differences))
    return 1


def _since_then(before: "RunDirectory", differences: "Sequence[Difference] | None") -> str:
    """Returns a paragraph about what differs between the run's first start and now."""
    if differences is None:
        return f"{before.path} has no environment.json, so what differs from then isn't known"
    if not differences:
        return f"nothing that is recorded differs from when {before.path} was started"
    lines = [f"  {each.what}: {each.then} -> {each.now}" for each in differences]
    return "\n".join([f"what differs from when {before.path} was started:", *lines])
