"""Which process trains which trial, decided with made-up processes in place of those on Ray."""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from qfleet.config import ConfigError, RunFailed, TrainConfig
from qfleet.runtime.records import Progress
from qfleet.sweeps.batch import Outcome
from qfleet.sweeps.pool import MAX_LOSSES, Lost, Ready, TrialPool, Update

CONFIG = TrainConfig(env="CartPole-v1")
CHUNK = Update(
    Progress(
        env_steps=1, learner_steps=1, train_seconds=1.0, new_env_steps=1, new_learner_steps=1, num_episodes=0,
        episode_return_mean=None, episode_length_mean=None, q_mean=0.0, loss=None, td_error_mean=None, exploration=0.0,
    )
)  # fmt: skip
KILLED = Lost("was killed")


def ended(value: float = 1.0, stopped: str = "env steps") -> Update:
    return Update(outcome={"stopped": stopped, "eval_return_mean": value})


class MadeUpProcesses:
    """A cluster with room for a number of processes. What each trial's process tells is scripted."""

    def __init__(self, capacity: int, script: Callable[[int], list[Any]]) -> None:
        self.capacity, self.script = capacity, script
        self.starting: list[int] = []
        self.alive: set[int] = set()
        self.num_started = 0
        self.told: dict[int, collections.deque[Any]] = collections.defaultdict(collections.deque)
        self.training: dict[int, int] = {}
        self.begun: list[int] = []
        """Numbers of trials, in the order in which they began."""
        self.pruned: list[int] = []
        self.asked_to_stop: list[int] = []
        self.most_at_once = 0
        self.start_news: Callable[[], Any] = Ready

    def room(self) -> int:
        return self.capacity - len(self.alive)

    def start(self) -> int:
        self.num_started += 1
        self.starting.append(self.num_started)
        return self.num_started

    def train(self, process: int, number: int, config: TrainConfig) -> None:
        self.begun.append(number)
        self.training[process] = number
        self.told[process] = collections.deque(self.script(number))
        self.most_at_once = max(self.most_at_once, len(self.training))

    def go_on(self, process: int, *, prune: bool) -> None:
        if prune:
            self.pruned.append(self.training[process])
            self.told[process] = collections.deque([ended(stopped="callback")])

    def wait(self, seconds: float) -> list[tuple[int, Ready | Update | Lost]]:
        news: list[tuple[int, Any]] = []
        for process in self.starting[: self.capacity - len(self.alive)]:
            self.starting.remove(process)
            made = self.start_news()
            if made == Ready():
                self.alive.add(process)
            news.append((process, made))
        for process in list(self.training):
            told = self.told[process].popleft()
            if isinstance(told, Lost):
                self.alive.remove(process)
            if isinstance(told, Lost) or told.outcome is not None:
                del self.training[process]
            news.append((process, told))
        return news

    def ask_to_stop(self, process: int) -> None:
        self.asked_to_stop.append(self.training[process])
        self.told[process] = collections.deque([CHUNK, ended(stopped="interrupted")])

    def end(self, process: int) -> None:
        assert process not in self.training
        if process in self.starting:
            self.starting.remove(process)
        else:
            self.alive.remove(process)


class MadeUpTrials:
    """A sweep of some trials that keeps what it is told."""

    def __init__(self, num_trials: int) -> None:
        self._num_trials = num_trials
        self._numbers = iter(range(num_trials))
        self.outcomes: dict[int, Outcome] = {}
        self.reported: list[tuple[int, int, float]] = []
        self.shown: list[tuple[int, ...]] = []
        self.checkpoints = iter(int, 1)  # zeros without end
        self.on_end: Callable[[int, Outcome], None] = lambda number, outcome: None

    def num_left(self) -> int:
        return self._num_trials - len(self.outcomes)

    def next(self) -> tuple[int, TrainConfig] | None:
        number = next(self._numbers, None)
        return None if number is None else (number, CONFIG)

    def report(self, number: int, evaluation: int, mean: float) -> bool:
        self.reported.append((number, evaluation, mean))
        return mean < 0

    def saved_env_steps(self, number: int) -> int:
        return next(self.checkpoints)

    def show_under_way(self, configs: Mapping[int, TrainConfig]) -> None:
        self.shown.append(tuple(configs))

    def show(self, progress: Progress) -> None:
        self.shown.append((-1,))

    def end(self, number: int, outcome: Outcome) -> None:
        self.outcomes[number] = outcome
        self.on_end(number, outcome)


def train(
    processes: MadeUpProcesses,
    trials: MadeUpTrials,
    most: int | None = None,
    must_stop: Callable[[], bool] = lambda: False,
) -> None:
    TrialPool(processes, trials, most, must_stop).train()


def test_as_many_trials_train_as_there_is_room_for_and_none_waits_for_the_slowest() -> None:
    processes = MadeUpProcesses(3, lambda number: [CHUNK] * (30 if number == 1 else 3) + [ended(number)])
    trials = MadeUpTrials(8)
    train(processes, trials)
    assert processes.most_at_once == 3 and processes.begun == list(range(8))
    assert list(trials.outcomes)[-1] == 1 and len(trials.outcomes) == 8
    assert processes.num_started <= 4 and not processes.starting  # one more was asked for, and taken back
    assert trials.shown[:2] == [(0,), (-1,)]  # the first one alone, until it has trained


@pytest.mark.parametrize(("most", "num_trials", "expected"), [(2, 8, 2), (None, 2, 2), (1, 3, 1)])
def test_no_more_processes_are_asked_for_than_trials_can_use(most: int | None, num_trials: int, expected: int) -> None:
    processes = MadeUpProcesses(5, lambda number: [CHUNK, ended()])
    train(processes, MadeUpTrials(num_trials), most)
    assert processes.most_at_once == expected and processes.num_started == expected


def test_a_node_that_joins_later_trains_too() -> None:
    processes = MadeUpProcesses(1, lambda number: [CHUNK] * 4 + [ended()])
    trials = MadeUpTrials(6)
    trials.on_end = lambda number, outcome: setattr(processes, "capacity", 2)
    train(processes, trials)
    assert processes.most_at_once == 2


def test_an_evaluation_is_reported_and_the_answer_stops_the_trial() -> None:
    evaluated = [CHUNK, Update(CHUNK.progress, (1, 3.0)), Update(CHUNK.progress, (2, -3.0)), CHUNK, ended()]
    processes, trials = MadeUpProcesses(1, lambda number: list(evaluated)), MadeUpTrials(1)
    train(processes, trials)
    assert trials.reported == [(0, 1, 3.0), (0, 2, -3.0)] and processes.pruned == [0]
    assert trials.outcomes[0] == ended(stopped="callback").outcome


def test_a_trial_whose_process_is_lost_is_taken_up_again() -> None:
    tries: collections.Counter[int] = collections.Counter()

    def script(number: int) -> list[Any]:
        tries[number] += 1
        return [CHUNK, KILLED] if number == 1 and tries[1] <= MAX_LOSSES else [CHUNK, ended()]

    processes, trials = MadeUpProcesses(2, script), MadeUpTrials(4)
    train(processes, trials)
    assert tries[1] == MAX_LOSSES + 1 and all(isinstance(each, dict) for each in trials.outcomes.values())


def test_a_trial_that_is_lost_again_and_again_has_failed() -> None:
    processes, trials = MadeUpProcesses(1, lambda number: [CHUNK, KILLED if number == 0 else ended()]), MadeUpTrials(2)
    train(processes, trials)
    assert processes.begun == [0] * (MAX_LOSSES + 1) + [1]
    assert "its process was killed, the last of 4 times in a row" in str(trials.outcomes[0])


def test_losses_between_which_a_trial_gets_on_are_no_failure() -> None:
    tries = iter([[CHUNK, KILLED]] * 9 + [[ended()]])
    processes, trials = MadeUpProcesses(1, lambda number: next(tries)), MadeUpTrials(1)
    trials.checkpoints = iter(range(100))
    train(processes, trials)
    assert trials.outcomes == {0: ended().outcome}


def test_a_trial_that_somebody_else_has_stopped_goes_on_in_another_process() -> None:
    tries = iter([[CHUNK, ended(stopped="interrupted")], [CHUNK, ended()]])
    processes, trials = MadeUpProcesses(1, lambda number: next(tries)), MadeUpTrials(1)
    train(processes, trials)
    assert trials.outcomes == {0: ended().outcome} and processes.num_started == 2


def test_a_signal_stops_all_trials_after_their_checkpoints() -> None:
    processes, trials = MadeUpProcesses(3, lambda number: [CHUNK] * 1000), MadeUpTrials(5)
    train(processes, trials, must_stop=lambda: len(processes.training) == 3 or bool(processes.asked_to_stop))
    assert sorted(processes.asked_to_stop) == [0, 1, 2]
    assert trials.outcomes == dict.fromkeys(range(3), ended(stopped="interrupted").outcome)


def test_a_failure_that_ends_the_sweep_lets_the_other_trials_save() -> None:
    processes = MadeUpProcesses(2, lambda number: [CHUNK, Update(outcome=RunFailed("no"))] if number else [CHUNK] * 99)
    trials = MadeUpTrials(5)

    def raise_failure(number: int, outcome: Outcome) -> None:
        if isinstance(outcome, RunFailed):
            raise RunFailed("all have failed")

    trials.on_end = raise_failure
    with pytest.raises(RunFailed, match="all have failed"):
        train(processes, trials)
    assert processes.asked_to_stop == [0] and not processes.training


def test_a_cluster_that_cannot_train_trials_is_one_error() -> None:
    processes, trials = MadeUpProcesses(2, lambda number: [ended()]), MadeUpTrials(5)
    processes.start_news = lambda: Lost("a node lacks the folder", is_unfit=True)
    with pytest.raises(ConfigError, match="a node lacks the folder"):
        train(processes, trials)
    assert not processes.begun


def test_processes_that_fail_to_start_again_and_again_end_the_sweep(caplog: pytest.LogCaptureFixture) -> None:
    processes, trials = MadeUpProcesses(1, lambda number: [ended()]), MadeUpTrials(5)
    processes.start_news = lambda: KILLED
    with pytest.raises(RunFailed, match="3 in a row could not start"):
        train(processes, trials)
    assert processes.num_started == MAX_LOSSES and caplog.text.count("could not start: was killed") == MAX_LOSSES


def test_an_unfit_node_that_joins_later_costs_no_trial() -> None:
    processes, trials = MadeUpProcesses(1, lambda number: [CHUNK] * 9 + [ended()]), MadeUpTrials(3)

    def join_unfit(number: int, outcome: Outcome) -> None:
        processes.capacity, processes.start_news = 2, lambda: Lost("a node lacks the folder", is_unfit=True)

    trials.on_end = join_unfit
    train(processes, trials)
    assert len(trials.outcomes) == 3 and processes.num_started <= 2 + MAX_LOSSES
