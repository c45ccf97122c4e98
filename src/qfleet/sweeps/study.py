"""What proposes settings and judges trials: Optuna, which is asked and told, and writes down each step in a journal.

Only this module knows Optuna. Its journal is read again whenever a sweep goes on, so nothing is lost that was told.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from qfleet.config import ConfigError
from qfleet.runtime.run_files import open_regular, shortened
from qfleet.sweeps.records import WARMUP_SHARE, TrialRecord
from qfleet.sweeps.space import Choices, Parameter, Range, combinations

TRIALS_BEFORE_PRUNING = 5
"""Number of complete trials from which on others are stopped early; Optuna's default."""

_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "under way",
    TrialState.WAITING: "under way",
}

_ERROR = "error"


class Study:
    """The trials of a sweep, in a journal on disk that no other process writes to meanwhile."""

    def __init__(self, journal: Path, space: Sequence[Parameter], *, seed: int, num_evaluations: int) -> None:
        """Reads the journal, or begins it.

        Args:
          journal: its file.
          space: the settings that vary.
          seed: seed of what is proposed. The same seed and results give the same proposals.
          num_evaluations: number of evaluations of a trial.

        Raises:
          ConfigError: if the journal holds something else.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._seed = space, seed
        self._combinations = combinations(space)
        try:
            _drop_torn_line(journal)
            self._study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(journal), _NoLock(str(journal)))),
                study_name="sweep",
                direction="maximize",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(TRIALS_BEFORE_PRUNING, int(WARMUP_SHARE * num_evaluations)),
            )
        except Exception as error:  # Optuna may raise anything at a line that it hasn't written
            raise ConfigError(
                f"a sweep's journal must hold what the sweep has written, got {journal} "
                f"({type(error).__name__}: {shortened(str(error), 200)}); restore it from a copy, or sweep into "
                f"another folder"
            ) from error
        self._under_way: dict[int, optuna.trial.Trial] = {}

    @property
    def records(self) -> list[TrialRecord]:
        """All trials, in the order in which they began."""
        return [self._record(trial) for trial in self._study.get_trials(deepcopy=False)]

    @property
    def num_combinations(self) -> int | None:
        """Number of trials that differ, if every setting is varied over a list; otherwise None."""
        return None if self._combinations is None else len(self._combinations)

    def num_left(self, num_trials: int) -> int:
        """Returns how many trials haven't ended, those included that haven't begun.

        Args:
          num_trials: number of trials at which the sweep ends.
        """
        trials = self._study.get_trials(deepcopy=False)
        num_under_way = sum(not trial.state.is_finished() for trial in trials)
        return num_under_way + max(0, min(num_trials, self.num_combinations or num_trials) - len(trials))

    def begin(self, num_trials: int, num_at_once: int = 1) -> list[TrialRecord]:
        """Returns the trials to train now: those that another process had under way, or new ones; none if none is left.

        Args:
          num_trials: number of trials at which the sweep ends.
          num_at_once: most trials that are returned. Their settings are chosen before any of them has a result.
        """
        trials = self._study.get_trials(deepcopy=False)
        limit = min(num_trials, self.num_combinations or num_trials)
        left = [each.number for each in trials if not each.state.is_finished() and each.number not in self._under_way]
        numbers = left or range(len(trials), limit)
        return [self._begin(number, limit) for number in numbers[:num_at_once]]

    def _begin(self, number: int, limit: int) -> TrialRecord:
        trials = self._study.get_trials(deepcopy=False)
        self._study.sampler = self._sampler(number, limit - number, trials)
        # One that was under way may lack settings, if the process was killed in the middle of proposing them.
        is_new = number == len(trials)
        trial = self._study.ask() if is_new else optuna.trial.Trial(self._study, trials[number]._trial_id)
        for parameter in self._space:
            _suggest(trial, parameter)
        self._under_way[number] = trial
        return self._record(self._study.get_trials(deepcopy=False)[number])

    def report(self, number: int, step: int, value: float) -> bool:
        """Notes an evaluation of a trial under way, and returns whether to stop the trial early.

        Args:
          number: number of the trial.
          step: number of the evaluation. One that was noted before, by a process that was killed, is left as it was.
          value: its mean return.
        """
        trial = self._under_way[number]
        known = self._study.get_trials(deepcopy=False)[trial.number].intermediate_values
        if step in known or not math.isfinite(value):
            return False
        trial.report(value, step)
        return trial.should_prune()

    def tell(
        self, number: int, state: Literal["complete", "pruned", "failed"], value: float | None = None, error: str = ""
    ) -> None:
        """Ends a trial under way.

        Args:
          number: number of the trial.
          state: how it ended.
          value: mean return of its last evaluation, if it is complete.
          error: why it failed.
        """
        trial = self._under_way.pop(number)
        if error:
            trial.set_user_attr(_ERROR, error)
        number_of = {words: code for code, words in _STATES.items() if code.is_finished()}
        self._study.tell(number, value, state=number_of[state])

    def importances(self) -> dict[str, float]:
        """Returns how much of the difference between trials each setting explains, in [0, 1], the greatest first.

        It is PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255). Empty if there are too few complete trials to say, or
        all of them have the same result.
        """
        complete = [record.value for record in self.records if record.state == "complete"]
        if len(self._space) < 2 or len(complete) < TRIALS_BEFORE_PRUNING or len(set(complete)) < 2:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is experimental in some versions
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            found = optuna.importance.get_param_importances(self._study, evaluator=evaluator)
        return {name: float(share) for name, share in found.items() if math.isfinite(share)}

    def _sampler(self, number: int, num_left: int, trials: Sequence[FrozenTrial]) -> BaseSampler:
        """Returns what proposes the settings of a trial: what is left of all combinations if they are few, or TPE.

        Each trial has a sampler with a seed of its own, because one whose stream began anew with each process would
        propose the first trials again.
        """
        if self._combinations is not None:
            tried = [{name: trial.params.get(name) for name in trial.params} for trial in trials[:number]]
            untried = [each for each in self._combinations if each not in tried]
            if untried and len(untried) <= num_left:
                return _OneCombination(untried[0])
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is experimental in some versions
            # The settings of the trials under way count as bad ones, so that a batch doesn't try the same twice.
            return TPESampler(seed=seed, constant_liar=True)

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        known = [each for each in self._space if each.name in trial.params]
        chosen = {each.name: trial.params[each.name] for each in known}
        return TrialRecord(
            number=trial.number,
            state=_STATES[trial.state],
            settings={each.name: each.value_of(chosen[each.name]) for each in known},
            texts={name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in chosen.items()},
            value=trial.value if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) else None,
            error=trial.user_attrs.get(_ERROR, ""),
        )


def _suggest(trial: optuna.trial.Trial, parameter: Parameter) -> None:
    """Makes the study choose a setting of a trial, unless it has."""
    if isinstance(parameter, Choices):
        trial.suggest_categorical(parameter.name, list(parameter.values))
    elif parameter.is_whole:
        trial.suggest_int(parameter.name, int(parameter.low), int(parameter.high), log=parameter.is_log)
    else:
        assert isinstance(parameter, Range)
        trial.suggest_float(parameter.name, parameter.low, parameter.high, log=parameter.is_log)


def _drop_torn_line(journal: Path) -> None:
    """Cuts off what a process that was killed has written of a line. The next line would be appended to it."""
    try:
        with open_regular(journal) as file:
            content = file.read()
    except FileNotFoundError:
        return
    if not content.endswith(b"\n"):
        with journal.open("r+b") as torn:
            torn.truncate(content.rfind(b"\n") + 1)


class _OneCombination(BaseSampler):
    """Proposes one combination of settings."""

    def __init__(self, combination: Mapping[str, str]) -> None:
        self._combination = combination

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self._combination[param_name]


class _NoLock(JournalFileOpenLock):
    """Lock of a journal that needs none, because the sweep's folder is locked. A killed process leaves nothing."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        """Does nothing, because nothing was locked."""
