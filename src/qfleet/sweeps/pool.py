"""Decides which process on Ray trains which trial, and what becomes of a trial whose process is lost.

A process trains one trial after the other, so that the next one finds JAX started. This module knows nothing of Ray.
"""

import contextlib
import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

from qfleet.config import ConfigError, RunFailed, TrainConfig
from qfleet.runtime.records import Progress
from qfleet.sweeps.batch import Outcome
from qfleet.sweeps.trial import ENDS

logger = logging.getLogger("qfleet")

LISTEN_SECONDS = 0.5
"""Longest wait for news of the processes before a request to stop is looked for."""

MAX_LOSSES = 3
"""Number of times in a row that a trial is started again without a new checkpoint, or that a process can't start."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """News that a process has started, and waits for a trial."""


@dataclasses.dataclass(frozen=True)
class Update:
    """News of a trial under way. Its process then waits to be told to go on, or for another trial."""

    progress: Progress | None = None
    """The newest chunk."""
    evaluation: tuple[int, float] | None = None
    """Number and mean return of an evaluation that the study must hear of."""
    outcome: Outcome | None = None
    """How the trial has ended."""


@dataclasses.dataclass(frozen=True)
class Lost:
    """News that a process is gone."""

    cause: str
    """What happened to it, in words to follow its name, or the message of an error if `is_unfit`."""
    is_unfit: bool = False
    """Whether it couldn't start because trials can't be trained on its node."""


class Processes(Protocol):
    """The processes that train trials. Each is known by a number."""

    def room(self) -> int:
        """Returns for how many more processes there seems to be room now."""

    def start(self) -> int:
        """Asks for another process, which starts once there is room, and returns its number."""

    def train(self, process: int, number: int, config: TrainConfig) -> None:
        """Makes a process train a trial, or go on with it from its newest checkpoint."""

    def go_on(self, process: int, *, prune: bool) -> None:
        """Makes a process go on after an update; `prune` stops its trial early."""

    def wait(self, seconds: float) -> list[tuple[int, Ready | Update | Lost]]:
        """Waits at most this long for news, and returns all that is there."""

    def ask_to_stop(self, process: int) -> None:
        """Makes a process save its trial as soon as it can, and end it as interrupted."""

    def end(self, process: int) -> None:
        """Ends a process that trains nothing."""


class Trials(Protocol):
    """The trials of a sweep, as its study and view know them."""

    def num_left(self) -> int:
        """Returns how many trials haven't ended, those included that haven't begun."""

    def next(self) -> tuple[int, TrainConfig] | None:
        """Returns number and config of a trial to train now; None if each is under way or has ended."""

    def report(self, number: int, evaluation: int, mean: float) -> bool:
        """Notes an evaluation of a trial, and returns whether to stop the trial early."""

    def saved_env_steps(self, number: int) -> int:
        """Returns the environment steps of a trial's newest checkpoint, 0 if it has none."""

    def show_under_way(self, configs: Mapping[int, TrainConfig]) -> None:
        """Hears which trials are under way, one of them at least."""

    def show(self, progress: Progress) -> None:
        """Hears of a chunk of the first one of them."""

    def end(self, number: int, outcome: Outcome) -> None:
        """Notes how a trial has ended. What it raises ends the sweep."""


class _Trial(NamedTuple):
    number: int
    config: TrainConfig


class TrialPool:
    """Trains the trials of a sweep in many processes. When one trial ends, its process gets the next one at once."""

    def __init__(self, processes: Processes, trials: Trials, most: int | None, must_stop: Callable[[], bool]) -> None:
        """Starts nothing yet.

        Args:
          processes: where the trials are trained.
          trials: what to train.
          most: most trials under way at the same time; None for as many as there is room for.
          must_stop: returns whether a signal has asked the sweep to stop.
        """
        self._processes, self._trials, self._most, self._must_stop = processes, trials, most, must_stop
        self._starting: list[int] = []
        self._idle: list[int] = []
        self._under_way: dict[int, _Trial] = {}
        """Trials by the processes that train them."""
        self._waiting: deque[_Trial] = deque()
        """Trials whose processes were lost."""
        self._losses: dict[int, tuple[int, int]] = {}
        """Newest checkpoint of each of these trials, and how often in a row it was the newest one at a loss."""
        self._asked_to_stop: set[int] = set()
        self._shown: list[_Trial] = []
        self._num_failed_starts = 0
        self._has_trained = False
        """Whether any trial has trained. Before that, the first one is alone: the others may not be able to, either."""
        self._failure: ConfigError | RunFailed | None = None

    def train(self) -> None:
        """Trains until no trial is left, or all that are under way have saved after a signal or a failure.

        Raises:
          ConfigError: if a trial can't be trained on Ray, or as `Trials.end` raises it.
          RunFailed: if processes can't start any more, or as `Trials.end` raises it.
        """
        while self._under_way or not (self._is_stopping or self._trials.num_left() == 0):
            if not self._is_stopping:
                with self._failure_noted():
                    self._begin_trials()
                    self._fit_processes()
            for process in self._under_way.keys() - self._asked_to_stop if self._is_stopping else ():
                self._processes.ask_to_stop(process)
                self._asked_to_stop.add(process)
            self._show_under_way()
            for process, news in self._processes.wait(LISTEN_SECONDS):
                with self._failure_noted():
                    self._hear(process, news)
        if self._failure is not None:
            raise self._failure

    @property
    def _is_stopping(self) -> bool:
        return self._failure is not None or self._must_stop()

    @contextlib.contextmanager
    def _failure_noted(self) -> Iterator[None]:
        """Keeps the first failure until all trials under way have saved."""
        try:
            yield
        except (ConfigError, RunFailed) as error:
            self._failure = self._failure or error

    def _begin_trials(self) -> None:
        """Gives each idle process a trial, or ends it if no trial is left that could begin."""
        while self._idle and (self._has_trained or not self._under_way):
            trial = self._waiting.popleft() if self._waiting else self._trials.next()
            process = self._idle.pop()
            if trial is None:
                self._processes.end(process)
            else:
                self._under_way[process] = _Trial(*trial)
                self._processes.train(process, *trial)

    def _fit_processes(self) -> None:
        """Asks for processes while trials could use more, and takes back what was asked for in vain.

        One more is asked for even if there seems to be no room, because a node may join the cluster.
        """
        num_useful = min(self._trials.num_left(), self._most or self._trials.num_left())
        num_wanted = num_useful - len(self._starting) - len(self._idle) - len(self._under_way)
        for _ in range(min(-num_wanted, len(self._starting))):
            self._processes.end(self._starting.pop())
        if num_wanted <= 0:
            return
        if self._num_failed_starts < MAX_LOSSES:
            num_now = max(1, self._processes.room()) - len(self._starting)
            self._starting += [self._processes.start() for _ in range(min(num_wanted, num_now))]
        elif not (self._starting or self._idle or self._under_way):
            raise RunFailed(
                f"the sweep has no process left on Ray, and {MAX_LOSSES} in a row could not start; see the warnings, "
                f"mend the cluster, and give the same command again"
            )

    def _show_under_way(self) -> None:
        trials = sorted(self._under_way.values(), key=lambda trial: trial.number)
        if trials and trials != self._shown:
            self._shown = trials
            self._trials.show_under_way({trial.number: trial.config for trial in trials})

    def _hear(self, process: int, news: Ready | Update | Lost) -> None:
        match news:
            case Ready():
                self._starting.remove(process)
                self._idle.append(process)
                self._num_failed_starts = 0
            case Update():
                self._hear_of_trial(process, news)
            case Lost():
                self._hear_of_loss(process, news)

    def _hear_of_trial(self, process: int, update: Update) -> None:
        trial = self._under_way[process]
        self._has_trained = True
        prune = update.evaluation is not None and self._trials.report(trial.number, *update.evaluation)
        if update.progress is not None and self._shown and trial == self._shown[0]:
            self._trials.show(update.progress)
        outcome = update.outcome
        if outcome is None:
            self._processes.go_on(process, prune=prune)
            return
        del self._under_way[process]
        if isinstance(outcome, Mapping) and outcome.get("stopped") not in ENDS and not self._is_stopping:
            self._processes.end(process)  # somebody else has asked it to stop, such as a node that is shut down
            self._take_up_again(trial, "was asked to stop")
            return
        self._idle.append(process)
        self._trials.end(trial.number, outcome)

    def _hear_of_loss(self, process: int, lost: Lost) -> None:
        if process in self._under_way:
            self._take_up_again(self._under_way.pop(process), lost.cause)
        elif process in self._idle:
            self._idle.remove(process)
        else:
            self._starting.remove(process)
            self._num_failed_starts += 1
            if lost.is_unfit and not self._has_trained:
                raise ConfigError(lost.cause)
            logger.warning("a process for trials could not start: %s", lost.cause)

    def _take_up_again(self, trial: _Trial, cause: str) -> None:
        """Puts a trial first in the queue, unless it was lost too often. After a signal, the next command takes it."""
        if self._is_stopping:
            return
        newest = self._trials.saved_env_steps(trial.number)
        before, num_losses = self._losses.get(trial.number, (newest, 0))
        num_losses = num_losses + 1 if newest == before else 1
        self._losses[trial.number] = newest, num_losses
        if num_losses > MAX_LOSSES:
            words = f"its process {cause}, the last of {num_losses} times in a row without a new checkpoint"
            self._trials.end(trial.number, RunFailed(words))
            return
        logger.warning("trial %d goes on in another process from step %d: its process %s", trial.number, newest, cause)
        self._waiting.append(trial)
