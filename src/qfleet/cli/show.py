"""What the terminal shows of a run."""

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qfleet.cli.streams import give_stdout_up
from qfleet.config import RunFailed, TopologyConfig
from qfleet.envs.names import module_in
from qfleet.runtime.activity import announced_to
from qfleet.runtime.progress import ProgressView, can_move_cursor

if TYPE_CHECKING:
    from qfleet.training.launched import LaunchedRun
    from qfleet.training.run import Run
    from qfleet.training.seeds import SeedsRun


def follow(start: "Callable[[], Run | LaunchedRun | SeedsRun]", *, quiet: bool, reason: str = "") -> int:
    """Starts a run, iterates over it until it ends, shows its progress, and returns the exit code.

    Args:
      start: starts the run.
      quiet: print nothing but errors.
      reason: what to say of the preset: why it was chosen, or how it was adapted.
    """
    with ProgressView(quiet=quiet) as view, announced_to(view.status):
        run = start()
        view.begin(run.config.env_steps)
        place = environments(run.backend, run.config.topology)
        preset = run.config.preset + (f" ({reason})" if reason else "")
        places = getattr(run, "places_in_words", "")
        if places:
            place = place.replace("in this process", "in its process")
        view.message(f"{run.config.env} ({place}) with {preset}, into {run.directory.path}")
        if places:
            view.message(places)
        try:
            for progress in run:
                view.update({"env_steps": progress.env_steps, **progress.metrics()})
        except RunFailed:
            if "seeds" in run.summary:  # some have failed, and the error tells which; the others haven't
                view.message(outcome(run.summary, str(run.directory.path)))
            raise
    view.message(outcome(run.summary, str(run.directory.path)))
    if view.is_unwritable:  # the run is as good without a reader
        give_stdout_up()
    elif run.summary["time_shares"] is not None and not quiet:
        print_time_shares(run.summary, run.config.topology.num_envs)
    return 0


@contextlib.contextmanager
def status_line() -> Iterator[None]:
    """Shows what is announced meanwhile in a line of the terminal, which vanishes afterwards.

    The line goes to stderr, because stdout is for the answer. There is none unless stderr is a terminal that can move
    its cursor.
    """
    if not can_move_cursor(sys.stderr):
        yield
        return
    shown = ""

    def show(activity: str) -> None:
        nonlocal shown
        if activity != shown:
            shown = activity
            print(f"\r\x1b[K{activity}", end="", file=sys.stderr, flush=True)

    with announced_to(show):
        try:
            yield
        finally:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def environments(backend: str, topology: TopologyConfig) -> str:
    """Returns the backend of a run's environments and where they are stepped: "gymnasium, 8 in this process"."""
    lanes = topology.describe_lanes(backend)
    return backend if backend == lanes else f"{backend}, {lanes}"


def outcome(summary: dict[str, Any], path: str) -> str:
    """Returns a few lines that say how a run ended, and what to do next."""
    returns = summary["eval_return_mean"]
    lines = [
        f"stopped: {summary['stopped']}, after {summary['env_steps']:,} environment steps and "
        f"{summary['learner_steps']:,} learner steps in {summary['wall_seconds']:.1f} s"
    ]
    between = summary.get("env_steps_between_episodes", 0)
    if between > 0.05 * summary["env_steps"]:
        lines.append(f"{between:,} of these steps only began an episode, and took no action")
    if returns is not None:
        lines.append(f"mean greedy return: {returns:.1f} {_evaluation_of(summary)}")
        lines += _confirmation_of(summary)
        lines += _best_of(summary)
    if summary.get("num_restarts"):
        repeated = summary.get("env_steps_repeated")
        again = "" if repeated is None else f", {repeated:,} environment steps repeated"
        lines.append(f"restarts: {summary['num_restarts']}{again}")
    if summary["num_seeds"] > 1:
        solved = [steps for steps in summary["solved_at_env_steps"] if steps is not None]
        for i, seed_returns in enumerate(summary["eval_returns"] or []):
            if not seed_returns:
                lines.append(f"  seed {summary['seed'] + i}: not evaluated")
                continue
            steps = summary["solved_at_env_steps"][i]
            when = f", reached --stop-return after {steps:,} environment steps" if steps is not None else ""
            lines.append(f"  seed {summary['seed'] + i}: {sum(seed_returns) / len(seed_returns):.1f}{when}")
        if solved:
            lines.append(f"{len(solved)} of {summary['num_seeds']} seeds reached --stop-return")
    if summary["num_videos"] or summary["num_video_failures"]:
        failed = f", {summary['num_video_failures']} failed" if summary["num_video_failures"] else ""
        folder = f"{path}/{summary['seeds'][0]['run']}" if "seeds" in summary else path
        lines.append(f"videos: {summary['num_videos']} in {folder}/videos{failed}")
    further = "" if summary["stopped"] == "interrupted" else f" --env-steps {2 * summary['env_steps']}"
    trust = " --trust" if module_in(summary["env"]) or summary.get("own_parts") else ""
    run = shlex.quote(path)
    evaluate = f"qfleet eval {run}{trust} | " if summary["env_steps"] else ""  # nothing is learned without a step
    lines.append(f"next: {evaluate}qfleet resume {run}{further}{trust}")
    if (report := Path(path) / "report.html").exists():
        lines.append(f"report: {report}")
    return "\n".join(lines)


def evaluation_in_words(
    num_episodes: int, *, num_different: int, num_cut: int, limit: int | None, exploration: float
) -> str:
    """Returns what a mean return was measured over: "over 100 episodes, 2 of them different".

    Args:
      num_episodes: number of episodes.
      num_different: how many of them differ from each other.
      num_cut: how many of them were cut short.
      limit: environment steps after which they were.
      exploration: probability of a random action.
    """
    words = f"over {num_episodes} episode{'s' if num_episodes > 1 else ''}"
    if exploration:
        words += f" with {100 * exploration:.4g}% random actions"
    if num_episodes > 1:
        words += ", all different" if num_different == num_episodes else f", {num_different} of them different"
    if num_cut:
        words += f", {num_cut} of {num_episodes} cut at {limit} steps"
    return words


def _evaluation_of(summary: dict[str, Any]) -> str:
    if summary["eval_returns"] is None:  # a checkpoint keeps only so many, so a resumed run may lack them
        return f"after {summary['eval_at_env_steps']:,} environment steps"
    words = evaluation_in_words(
        sum(map(len, summary["eval_returns"])),
        num_different=summary["eval_num_different"],
        num_cut=summary["eval_num_cut"],
        limit=summary["eval_episode_limit"],
        exploration=summary["eval_exploration"],
    )
    at = summary["eval_at_env_steps"]
    return words if at == summary["env_steps"] else f"{words}, after {at:,} environment steps"


def _confirmation_of(summary: dict[str, Any]) -> list[str]:
    """Returns a line that says so if the episodes that confirmed a return were the ones that had been played before."""
    seeds = [seed for seed, new in enumerate(summary["confirmed_by_new_episodes"], summary["seed"]) if new == 0]
    if not seeds:
        return []
    whose = "" if summary["num_seeds"] == 1 else f" of seed {', '.join(map(str, seeds))}"
    return [
        f"the episodes that confirm the return{whose} repeat earlier ones: the environment is deterministic, and the "
        f"return exact; --eval-exploration 0.001 would vary them"
    ]


def _best_of(summary: dict[str, Any]) -> list[str]:
    """Returns a line about the best evaluation if the run keeps its learner and the newest one is worse."""
    if summary.get("best_checkpoint") is None or not summary["best_eval_return_mean"] > summary["eval_return_mean"]:
        return []
    return [
        f"best: {summary['best_eval_return_mean']:.1f}, after {summary['best_eval_at_env_steps']:,} environment steps; "
        f"--checkpoint best uses that"
    ]


def print_time_shares(summary: dict[str, Any], num_envs: int) -> None:
    """Prints how the time of a profiled run was divided over its parts."""
    from rich.console import Console
    from rich.table import Table

    table = Table("part", box=None, pad_edge=False)
    for name in ("ms/row", "share"):
        table.add_column(name, justify="right")
    for part, share in summary["time_shares"].items():
        table.add_row(part, f"{summary['row_milliseconds'][part]:.3f}", f"{share:.1%}")
    print(f"\ntime of a row (one step of {num_envs} environments) in lock step, waiting for each part:")
    Console(highlight=False).print(table)
