"""Trains the trials that a study proposes, batch after batch, and tells it how each has ended.

Trials run in this process, unless the user wants them on Ray (`pool`): those of a batch that one program can train at
the same time, the others one after the other. A process for each would cost its start and the compilation of what
trials share: a tiny trial took 6 s so, and takes 2 s here. It also couldn't use functions of the program, such as an
environment's. Memory is no reason for it: it grew by less than 2 MiB per trial.
"""

import functools
import gc
import logging
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qfleet.config import ConfigError, RunFailed, TrainConfig
from qfleet.runtime.devices import clear_platform_errors, lack_of_memory
from qfleet.runtime.records import Progress
from qfleet.runtime.run_files import shortened
from qfleet.runtime.signals import StopFlag, StopRequested
from qfleet.sweeps.batch import Outcome, batches, default_at_once, train_batch
from qfleet.sweeps.directory import SweepDirectory
from qfleet.sweeps.pool import TrialPool
from qfleet.sweeps.records import TrialRecord, best_of
from qfleet.sweeps.space import Parameter, with_settings
from qfleet.sweeps.trial import ENDS, Pruning, saved_env_steps, train_trial

if TYPE_CHECKING:
    from qfleet.runtime.loggers import Logger
    from qfleet.sweeps.study import Study

logger = logging.getLogger("qfleet")

MAX_FAILURES = 3
"""Number of trials that may fail while none has come to its end. The others would fail too."""


class SweepView:
    """What is told how a sweep goes. This one ignores it."""

    def begin(self, directory: SweepDirectory, num_trials: int, records: Sequence[TrialRecord]) -> None:
        """Hears of the sweep's folder, the trials at which it ends, and those that it has already."""

    def begin_trials(self, trials: Sequence[TrialRecord], config: TrainConfig) -> None:
        """Hears of trials that begin or go on together, one of them at least, and of the config of the first."""

    def progress(self, progress: Progress) -> None:
        """Hears of a chunk of the first trial under way."""

    def end_trial(self, trial: TrialRecord, best: TrialRecord | None) -> None:
        """Hears of a trial that has ended, and of the best one until now."""


class SweepTraining:
    """The training of one sweep."""

    def __init__(
        self,
        directory: SweepDirectory,
        study: "Study",
        space: Sequence[Parameter],
        view: SweepView,
        loggers: "Sequence[str | Logger]",
        stop: StopFlag,
    ) -> None:
        """Trains nothing yet.

        Args:
          directory: the sweep's folder.
          study: proposes the trials.
          space: the settings that vary.
          view: is told how it goes.
          loggers: as for `train`, of each trial.
          stop: whether a signal has asked the sweep to stop.
        """
        self._directory, self._study, self._view, self._loggers, self._stop = directory, study, view, loggers, stop
        plan = directory.plan
        self._num_at_once = plan.trials_at_once or default_at_once(plan.config, space)
        self._prunes = plan.prune and not plan.config.has_seed_processes
        self._is_interrupted = False

    def train(self) -> bool:
        """Trains trials until there are enough, and returns whether there are; a signal ends it before.

        Raises:
          ConfigError: if the first trial can't be trained with its config.
          RunFailed: if too many have failed, and none has come to its end.
        """
        plan = self._directory.plan
        if plan.trials_on_ray is not None:
            return self._train_on_ray()
        while not self._must_stop:
            trials = self._study.begin(plan.num_trials, self._num_at_once)
            if not trials:
                return True
            records = {trial.number: trial for trial in trials}
            configs = {}
            for number, trial in records.items():
                try:
                    configs[number] = with_settings(plan.config, trial.settings)
                except ConfigError as error:
                    self.end(number, error)
            for numbers in batches(self._directory, configs):
                self._train_group({number: configs[number] for number in numbers}, records)
                if self._must_stop:
                    break
        return False

    @property
    def _must_stop(self) -> bool:
        return self._stop.requested or self._is_interrupted

    def _train_on_ray(self) -> bool:
        from qfleet.sweeps.remote import trial_processes  # here, because Ray is optional

        names = [each for each in self._loggers if isinstance(each, str)]
        try:
            with trial_processes(self._directory, names, prunes=self._prunes) as processes:
                most = self._directory.plan.trials_at_once
                TrialPool(processes, self, most, lambda: self._must_stop).train()
        except ConfigError:
            is_there = self._directory.journal_path.exists()  # otherwise the first trial was refused, and all with it
            if is_there and self._directory.is_new and not self._study.records:
                self._directory.discard()
            raise
        return not self._must_stop

    def num_left(self) -> int:
        """Returns how many trials haven't ended, those included that haven't begun."""
        return self._study.num_left(self._directory.plan.num_trials)

    def next(self) -> tuple[int, TrainConfig] | None:
        """Returns number and config of a trial to train now; None if each is under way or has ended.

        Raises:
          ConfigError, RunFailed: as `train` does.
        """
        plan = self._directory.plan
        while trials := self._study.begin(plan.num_trials):
            try:
                return trials[0].number, with_settings(plan.config, trials[0].settings)
            except ConfigError as error:
                self.end(trials[0].number, error)
        return None

    def report(self, number: int, evaluation: int, mean: float) -> bool:
        """Notes an evaluation of a trial, and returns whether to stop the trial early."""
        return self._study.report(number, evaluation, mean)

    def saved_env_steps(self, number: int) -> int:
        """Returns the environment steps of a trial's newest checkpoint."""
        return saved_env_steps(self._directory, number)

    def show_under_way(self, configs: Mapping[int, TrainConfig]) -> None:
        """Tells the view which trials are under way."""
        records = self._study.records
        self._view.begin_trials([records[number] for number in configs], next(iter(configs.values())))

    def show(self, progress: Progress) -> None:
        """Tells the view of a chunk of the first one of them."""
        self._view.progress(progress)

    def _train_group(self, configs: Mapping[int, TrainConfig], records: Mapping[int, TrialRecord]) -> None:
        """Trains trials in one program if they are several, or one after the other where that can't be."""
        left = list(configs)
        if len(left) > 1:
            self._view.begin_trials([records[number] for number in left], configs[left[0]])
            left = self._train_in_one_program(configs)
            gc.collect()
        for number in left:
            if self._must_stop:
                return
            self._view.begin_trials([records[number]], configs[number])
            self._train_alone(number, configs[number])
            gc.collect()  # what the run held, such as its replay, before the next one makes its own

    def _train_in_one_program(self, configs: Mapping[int, TrainConfig]) -> list[int]:
        """Trains trials in one program, and returns those that must be trained one after the other instead."""
        from qfleet.training.assembly import make_parts_of_trials  # imports JAX

        too_large: list[int] = []

        def end(number: int, outcome: Outcome) -> None:
            if isinstance(outcome, RunFailed) and lack_of_memory(outcome):
                too_large.append(number)
            else:
                self.end(number, outcome)

        try:
            with clear_platform_errors():
                parts = dict(zip(configs, make_parts_of_trials(list(configs.values())), strict=True))
        except ConfigError as error:
            logger.warning("%d trials are trained one after the other: %s", len(configs), error)
            return list(configs)
        train_batch(
            self._directory,
            configs,
            parts,
            prunings={number: self._pruning(number) for number in configs} if self._prunes else {},
            loggers=self._loggers,
            on_progress=self._view.progress,
            on_end=end,
            stop=self._stop,
        )
        return too_large

    def _train_alone(self, number: int, config: TrainConfig) -> None:
        try:
            outcome: Outcome = train_trial(
                self._directory,
                number,
                config,
                pruning=self._pruning(number) if self._prunes else None,
                loggers=self._loggers,
                on_progress=self._view.progress,
            )
        except StopRequested:  # before the run had made its folder
            return
        except (ConfigError, RunFailed) as error:
            outcome = error
        self.end(number, outcome)

    def _pruning(self, number: int) -> Pruning:
        return Pruning(functools.partial(self._study.report, number))

    def end(self, number: int, outcome: Outcome) -> None:
        """Tells the study and the view how a trial has ended, unless it was interrupted.

        Raises:
          ConfigError, RunFailed: as `train` does.
        """
        if isinstance(outcome, Mapping):
            if outcome.get("stopped") not in ENDS:
                self._is_interrupted = True
                return
            self._tell(number, outcome)
        else:
            self._tell_failure(number, outcome)
        records = self._study.records
        self._view.end_trial(records[number], best_of(records))

    def _tell(self, number: int, summary: Mapping[str, Any]) -> None:
        mean = summary.get("eval_return_mean")
        if summary["stopped"] == "callback":
            self._study.tell(number, "pruned")
        elif mean is None:
            self._study.tell(number, "failed", error="its last evaluation has no returns")
        else:
            self._study.tell(number, "complete", float(mean))

    def _tell_failure(self, number: int, error: ConfigError | RunFailed) -> None:
        directory = self._directory
        if isinstance(error, ConfigError) and number == 0 and not directory.trial_folder(0).exists():
            if directory.is_new:
                directory.discard()
            raise error
        self._study.tell(number, "failed", error=str(error))
        records = self._study.records
        failed = sum(record.state == "failed" for record in records)
        has_ended = sum(record.state != "under way" for record in records)
        if failed == has_ended and failed >= MAX_FAILURES:
            raise all_failed(directory, records) from error


def all_failed(directory: SweepDirectory, records: Sequence[TrialRecord]) -> RunFailed:
    """Returns the error of a sweep of which all trials that have ended have failed."""
    failed = [record for record in records if record.state == "failed"]
    further = f"qfleet sweep --resume {shlex.quote(str(directory.path))} --trials {len(failed) + MAX_FAILURES}"
    causes = sorted({record.error for record in failed if record.error})
    return RunFailed(
        f"all {len(failed)} trials of the sweep that have ended have failed: {shortened('; '.join(causes), 500)}. They "
        f"aren't trained again; `{further}` tries others with other settings, and another --run-dir begins anew"
    )
