"""One trial of a sweep: an ordinary run in a folder of its own, in this process."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qfleet.api import iterate, resume
from qfleet.config import ConfigError, RunFailed, TrainConfig
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.devices import lack_of_memory
from qfleet.runtime.records import Progress, mean
from qfleet.runtime.run_directory import SEEDS_FOLDER, RunDirectory
from qfleet.sweeps.directory import SweepDirectory
from qfleet.training.callbacks import RunControl
from qfleet.training.metadata import read_metadata
from qfleet.training.seed_summary import seeds_of

if TYPE_CHECKING:
    from qfleet.runtime.loggers import Logger
    from qfleet.training.launched import LaunchedRun
    from qfleet.training.run import Run
    from qfleet.training.seeds import SeedsRun

ENDS = ("env steps", "callback")
"""How a summary says that a run has ended by itself. Any other run goes on."""

PRUNED = "the sweep has stopped it early"
"""What the summary of a trial that was stopped early says."""


class Pruning:
    """Callback that reports each evaluation but the last one, and stops the run if the answer is yes."""

    def __init__(self, report: Callable[[int, float], bool]) -> None:
        self._report = report
        self._control: RunControl | None = None
        self.has_stopped = False
        """Whether it has stopped the run, which ends once it is asked for its next chunk."""

    def on_evaluation(self, control: RunControl, progress: Progress) -> None:
        """Reports the evaluation by its number, because trials may differ in their steps by a few."""
        number = progress.env_steps // control.config.eval_period_env_steps
        mean = progress.eval_return_mean
        is_last = progress.env_steps >= control.config.env_steps
        self._control = control
        if not is_last and mean is not None and self._report(number, mean):
            self.stop()

    def stop(self) -> None:
        """Stops the run. If the answer to a report comes later, call it then."""
        assert self._control is not None
        self.has_stopped = True
        self._control.stop(PRUNED)


def train_trial(
    directory: SweepDirectory,
    number: int,
    config: TrainConfig,
    *,
    pruning: Pruning | None,
    loggers: "Sequence[str | Logger]",
    on_progress: Callable[[Progress], None],
) -> dict[str, Any]:
    """Trains a trial to its end, and returns the summary of its run. It goes on if it has begun, from its checkpoint.

    Args:
      directory: the sweep's folder.
      number: the trial's number.
      config: the trial's config.
      pruning: what may stop it early.
      loggers: as for `train`.
      on_progress: told of each chunk.

    Raises:
      ConfigError: if it can't be trained with this config.
      RunFailed: if it fails.
    """
    callbacks = [] if pruning is None else [pruning]
    with failing_without_memory():
        run = start_trial(directory, number, config, {"callbacks": callbacks, "loggers": loggers})
        if isinstance(run, dict):
            return run
        for progress in run:
            on_progress(progress)
    return run.summary


@contextlib.contextmanager
def failing_without_memory() -> Iterator[None]:
    """Raises RunFailed if memory doesn't suffice, because other settings may need less."""
    try:
        yield
    except RuntimeError as error:  # of which RunFailed is one
        lack = None if isinstance(error, RunFailed) else lack_of_memory(error)
        if lack is None:
            raise
        raise RunFailed(lack) from error


def start_trial(
    directory: SweepDirectory, number: int, config: TrainConfig, arguments: dict[str, Any]
) -> "Run | LaunchedRun | SeedsRun | dict[str, Any]":
    """Returns the run of a trial, to iterate over, or the summary of one that has ended.

    Args:
      directory, number, config: as for `train_trial`.
      arguments: `callbacks`, `loggers` and others that both `iterate` and `resume` take.

    Raises:
      ConfigError: if it can't be trained with this config.
    """
    folder = directory.trial_folder(number)
    begun = begun_run(directory, number, config)
    if begun is None:
        # Reports of 3 MB each, of which few are looked at: `qfleet report` writes them at any time.
        return iterate(dataclasses.replace(config, run_dir=str(folder), report=False), **arguments)
    return outcome_of(begun) or resume(folder, trust=True, **arguments)


def begun_run(directory: SweepDirectory, number: int, config: TrainConfig) -> RunDirectory | None:
    """Returns the run of a trial if it has begun. What else is in its folder is deleted.

    Raises:
      ConfigError: if the folder holds a run with other settings.
    """
    folder = directory.trial_folder(number)
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # killed before the run had a config
        return None
    begun = RunDirectory.open(folder)
    wanted = dataclasses.replace(config, run_dir=None, report=False).with_schedule_lengths()
    if dataclasses.replace(begun.config, run_dir=None, report=False) != wanted:
        raise ConfigError(
            f"the run of trial {number} must have the trial's settings, got others in {directory.named(folder)}; "
            f"restore the folder from a copy, or delete it"
        )
    return begun


def checkpoints_of(directory: SweepDirectory, number: int) -> list[int]:
    """Returns the environment steps of the complete checkpoints of a trial, ascending."""
    return Checkpoints(directory.trial_folder(number) / "checkpoints", run_id=None).all()


def saved_env_steps(directory: SweepDirectory, number: int) -> int:
    """Returns the environment steps of a trial's newest checkpoint, the mean over seeds with runs of their own."""
    folder = directory.trial_folder(number)
    runs = list(folder.glob(f"{SEEDS_FOLDER}/[0-9]*/")) or [folder]
    return sum(max(Checkpoints(run / "checkpoints", run_id=None).all(), default=0) for run in runs) // len(runs)


def outcome_of(run: RunDirectory) -> dict[str, Any]:
    """Returns how a run has ended, as its summary says it or would have said it; nothing if it goes on."""
    summary = run.read_summary() or {}
    if summary.get("stopped") in ENDS:
        return summary
    if run.config.has_seed_processes:
        seeds = seeds_of(run.folder, run.config)
        if not all(seed.is_finished(run.config.env_steps, stop_return_holds=True) for seed in seeds):
            return {}
        return {"stopped": "env steps", "eval_return_mean": mean([seed.summary["eval_return_mean"] for seed in seeds])}
    with Checkpoints(run.checkpoints_path, run_id=run.run_id) as checkpoints:
        newest = checkpoints.latest()
        metadata = {} if newest is None else read_metadata(checkpoints, newest, run.config)
    if metadata.get("counters", {}).get("env_steps", 0) < run.config.env_steps:
        return {}
    if metadata.get("evaluated_at", 0) < metadata["counters"]["env_steps"]:
        return {}  # it goes on with its last evaluation
    return {"stopped": "env steps", **metadata["evaluation_rounds"]["newest"]}
