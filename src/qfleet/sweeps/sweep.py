"""`qfleet.sweep`: trains trial after trial, and says which settings did best.

Trials run in this process, one after the other. A process for each would cost its start and the compilation of what
trials share: a tiny trial took 6 s so, and takes 2 s here. It also couldn't use functions of the program, such as an
environment's. Memory is no reason for it: it grew by less than 2 MiB per trial.
"""

import dataclasses
import gc
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qfleet.config import ConfigError, RunFailed, TrainConfig
from qfleet.config.encoding import encode
from qfleet.config.own_parts import check_parts_trusted, own_parts
from qfleet.config.values import show
from qfleet.envs.names import check_trusted
from qfleet.runtime.records import Progress
from qfleet.runtime.signals import StopFlag, StopRequested
from qfleet.sweeps.directory import SweepDirectory, SweepPlan, default_folder, digest_of
from qfleet.sweeps.records import TrialRecord, best_first, best_of
from qfleet.sweeps.results import write_results
from qfleet.sweeps.space import Parameter, read_space, texts_of, with_settings
from qfleet.sweeps.trial import Pruning, train_trial

if TYPE_CHECKING:
    from qfleet.runtime.loggers import Logger
    from qfleet.sweeps.study import Study

MAX_FAILURES = 3
"""Number of trials that may fail while none has come to its end. The others would fail too."""


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """What a sweep has found."""

    path: Path
    """The sweep's folder."""
    trials: tuple[TrialRecord, ...]
    """All trials, the best first."""
    config: TrainConfig | None
    """The config of the best trial, for `qfleet.train`; None if no trial is complete."""
    is_complete: bool
    """Whether the sweep has come to its end. Otherwise it was interrupted."""

    @property
    def best(self) -> TrialRecord | None:
        """The best trial, if any is complete."""
        return best_of(self.trials)


class SweepView:
    """What is told how a sweep goes. This one ignores it."""

    def begin(self, directory: SweepDirectory, num_trials: int, records: Sequence[TrialRecord]) -> None:
        """Hears of the sweep's folder, the trials at which it ends, and those that it has already."""

    def begin_trial(self, trial: TrialRecord, config: TrainConfig) -> None:
        """Hears of a trial that begins or goes on, and of its config."""

    def progress(self, progress: Progress) -> None:
        """Hears of a chunk of the trial under way."""

    def end_trial(self, trial: TrialRecord, best: TrialRecord | None) -> None:
        """Hears of a trial that has ended, and of the best one until now."""


def sweep(
    config: TrainConfig,
    params: Mapping[str, Any],
    *,
    trials: int = 50,
    prune: bool = True,
    loggers: "Sequence[str | Logger]" = (),
) -> SweepResult:
    """Trains with different settings, and returns which of them reached the highest return.

    A trial's result is the mean return of its last evaluation, over all episodes of all seeds (`config.num_seeds`).
    Optuna proposes settings that look promising after the trials so far. A sweep survives whatever ends its process:
    the same call goes on with it, without a trial that has ended, and with the one that was under way from its newest
    checkpoint.

    Args:
      config: config of all trials, but for the settings that vary. `config.run_dir` is the sweep's folder; by default
        one in `runs/` that the same call finds again.
      params: how settings of the agent or the topology, or `env_steps`, vary: by their names, a range such as
        "1e-4..1e-2:log" or "8..64", or a list of values.
      trials: number of trials. Fewer are trained if all settings vary over lists that have fewer combinations.
      prune: stop a trial early if it does worse than the median of the others at the same evaluation. Trials whose
        seeds have processes of their own aren't stopped early.
      loggers: as for `train`, of each trial.

    Raises:
      ConfigError: on bad input, before any work starts, if another process goes on with this sweep, or without the
        extra `sweep`.
      RunFailed: if the first three trials fail.
      KeyboardInterrupt: if a signal asks the sweep to stop, once the trial under way has a checkpoint.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"`config` must be a TrainConfig, got {show(config)}; make one with qfleet.make_config")
    texts = texts_of(params)
    request = digest_of(encode(dataclasses.replace(config, run_dir=None)), texts, prune)
    result = run_sweep(open_sweep(config, texts, trials, prune=prune, request=request), loggers=loggers)
    if not result.is_complete:
        raise KeyboardInterrupt(f"a signal has stopped the sweep; the same call goes on with {result.path}")
    return result


def open_sweep(
    config: TrainConfig, texts: Mapping[str, str], trials: int, *, prune: bool, request: str
) -> SweepDirectory:
    """Returns the locked folder of the sweep that these arguments describe, which is made if there is none.

    Args:
      config, trials, prune: as for `sweep`.
      texts: what varies, as `texts_of` returns it.
      request: digest of what the user asked for. The same one finds the sweep that it began.

    Raises:
      ConfigError: on bad input, or if another process goes on with this sweep.
    """
    _import_study()
    read_space(config, texts)
    path = default_folder(config.env, request) if config.run_dir is None else Path(config.run_dir)
    return SweepDirectory.create_or_open(
        path, SweepPlan(dataclasses.replace(config, run_dir=None), texts, trials, prune, request)
    )


def reopen_sweep(path: Path, trials: int | None, *, trust: bool) -> SweepDirectory:
    """Returns the locked folder of a sweep that has begun.

    Args:
      path: its folder.
      trials: another number of trials at which it ends.
      trust: whether the user trusts modules that only the sweep's folder names.

    Raises:
      ConfigError: if it isn't a sweep's folder, a module isn't trusted, or another process goes on with the sweep.
    """
    _import_study()
    directory = SweepDirectory.open(path, trials)
    try:
        check_trusted(directory.plan.config.env, path, trust=trust)
        check_parts_trusted(own_parts(directory.plan.config.agent), path, trust=trust)
    except BaseException:
        directory.release()
        raise
    return directory


def _import_study() -> "type[Study]":
    """Imports Optuna, which is an extra, and returns what uses it."""
    try:
        from qfleet.sweeps.study import Study
    except ImportError as error:
        raise ConfigError(f"a sweep needs Optuna ({error}); pip install 'qfleet[sweep]'") from error
    return Study


def run_sweep(
    directory: SweepDirectory, *, loggers: "Sequence[str | Logger]" = (), view: SweepView | None = None
) -> SweepResult:
    """Trains the trials that a sweep lacks, and gives up its folder's lock.

    Raises:
      ConfigError: if its first trial can't be trained with its config.
      RunFailed: if the first three trials fail.
    """
    plan, view = directory.plan, view or SweepView()
    try:
        space = read_space(plan.config, plan.params)
        study = _import_study()(
            directory.journal_path,
            space,
            seed=plan.config.seed,
            num_evaluations=plan.config.env_steps // plan.config.eval_period_env_steps,
        )
        view.begin(directory, min(plan.num_trials, study.num_combinations or plan.num_trials), study.records)
        with StopFlag() as stop:
            is_complete = _train(directory, study, view, loggers, stop)
        return _result(directory, study, space, is_complete=is_complete)
    finally:
        directory.release()


def _train(
    directory: SweepDirectory, study: "Study", view: SweepView, loggers: "Sequence[str | Logger]", stop: StopFlag
) -> bool:
    """Trains trials until there are enough, and returns whether there are; a signal ends it before."""
    plan = directory.plan
    prunes = plan.prune and not plan.config.has_seed_processes
    while not stop.requested:
        trial = study.begin(plan.num_trials)
        if trial is None:
            return True
        try:
            config = with_settings(plan.config, trial.settings)
            view.begin_trial(trial, config)
            summary = train_trial(
                directory,
                trial.number,
                config,
                pruning=Pruning(study.report) if prunes else None,
                loggers=loggers,
                on_progress=view.progress,
            )
        except StopRequested:  # before the run had made its folder
            return False
        except (ConfigError, RunFailed) as error:
            _tell_failure(directory, study, trial, error)
        else:
            if summary["stopped"] == "interrupted":
                return False
            _tell(study, summary)
        gc.collect()  # what the run held, such as its replay, before the next one makes its own
        records = study.records
        view.end_trial(records[trial.number], best_of(records))
    return False


def _tell(study: "Study", summary: Mapping[str, Any]) -> None:
    mean = summary.get("eval_return_mean")
    if summary["stopped"] == "callback":
        study.tell("pruned")
    elif mean is None:
        study.tell("failed", error="its last evaluation has no returns")
    else:
        study.tell("complete", float(mean))


def _tell_failure(
    directory: SweepDirectory, study: "Study", trial: TrialRecord, error: ConfigError | RunFailed
) -> None:
    """Notes that a trial has failed.

    Raises:
      ConfigError: if it is the first one, whose config a run refuses. Nothing has been trained then.
      RunFailed: if too many have failed, and none has come to its end.
    """
    if isinstance(error, ConfigError) and trial.number == 0 and not directory.trial_folder(0).exists():
        if directory.is_new:
            directory.discard()
        raise error
    study.tell("failed", error=str(error))
    records = study.records
    failed = sum(record.state == "failed" for record in records)
    if failed == len(records) and failed >= MAX_FAILURES:
        again = f"`qfleet sweep --resume {shlex.quote(str(directory.path))}` tries further ones"
        raise RunFailed(f"all {failed} trials of the sweep have failed, the last one so: {error}. {again}") from error


def _result(directory: SweepDirectory, study: "Study", space: Sequence[Parameter], *, is_complete: bool) -> SweepResult:
    """Returns what a sweep has found, after writing it to its folder."""
    records = best_first(study.records)
    best = best_of(records)
    config = None if best is None else with_settings(directory.plan.config, best.settings)
    write_results(directory, space, records, config, study.importances())
    return SweepResult(directory.path, tuple(records), config, is_complete)
