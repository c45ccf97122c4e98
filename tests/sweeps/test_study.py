"""The study goes on from whatever a killed process has left of its journal."""

import os
from pathlib import Path

import pytest

from qfleet.config import ConfigError
from qfleet.sweeps.records import best_first, bests_so_far
from qfleet.sweeps.space import Choices, Parameter, Range
from qfleet.sweeps.study import Study

SPACE: list[Parameter] = [
    Range("learning_rate", 1e-4, 1e-2, is_log=True, is_whole=False),
    Range("n_step", 1, 8, is_log=False, is_whole=True),
    Choices("double", {"yes": True, "no": False}),
]


def open_study(journal: Path, space: list[Parameter] = SPACE) -> Study:
    return Study(journal, space, seed=0, num_evaluations=8)


def train(study: Study, num_trials: int) -> None:
    """Trains trials of which n_step alone decides the result."""
    while trials := study.begin(num_trials):
        study.tell(trials[0].number, "complete", float(trials[0].settings["n_step"]))


def test_wherever_a_process_is_killed_the_study_goes_on_with_the_same_trial(tmp_path: Path) -> None:
    journal = tmp_path / "journal.log"
    train(open_study(journal), 2)
    before = journal.read_bytes()
    open_study(journal).begin(3)
    content = journal.read_bytes()
    for length in range(len(before), len(content) + 1, 13):
        journal.write_bytes(content[:length])
        study = open_study(journal)
        (trial,) = study.begin(3)
        assert trial.number == 2
        assert 1e-4 <= trial.settings["learning_rate"] <= 1e-2 and trial.settings.keys() == trial.texts.keys()
        study.tell(2, "complete", 1.0)
        assert not open_study(journal).begin(3)
        assert [record.state for record in open_study(journal).records] == ["complete"] * 3


def test_proposals_do_not_depend_on_restarts_and_do_not_repeat(tmp_path: Path) -> None:
    whole, restarted = tmp_path / "whole", tmp_path / "restarted"
    train(open_study(whole), 12)
    for number in range(1, 13):
        train(open_study(restarted), number)
    records = open_study(whole).records
    assert open_study(restarted).records == records
    assert len({record.settings["learning_rate"] for record in records}) == 12


def test_what_is_worse_than_the_median_is_stopped_but_not_too_early(tmp_path: Path) -> None:
    study = open_study(tmp_path / "journal.log")
    for number in range(5):
        study.begin(9)
        assert not any(study.report(number, step, 10.0 * step) for step in range(1, 8))
        study.tell(number, "complete", 80.0)
    study.begin(9)
    assert [study.report(5, step, 1.0) for step in (1, 2)] == [False, True]
    assert not study.report(5, 2, 1.0)  # which was reported, before a kill for example
    assert not study.report(5, 3, float("nan"))
    study.tell(5, "pruned")
    pruned = study.records[5]
    assert (pruned.state, pruned.value) == ("pruned", 1.0)


def test_a_batch_is_proposed_before_any_result_and_goes_on_as_a_whole(tmp_path: Path) -> None:
    study = open_study(tmp_path / "journal.log")
    first = study.begin(40, 16)
    assert [trial.number for trial in first] == list(range(16))
    assert len({trial.settings["learning_rate"] for trial in first}) == 16
    for trial in first[:10]:
        study.tell(trial.number, "complete", float(trial.settings["n_step"]))
    restarted = open_study(tmp_path / "journal.log")
    assert restarted.begin(40, 16) == first[10:]
    for trial in first[10:]:
        restarted.tell(trial.number, "complete", 1.0)
    second = restarted.begin(20, 16)
    assert [trial.number for trial in second] == [16, 17, 18, 19]
    assert len({trial.settings["learning_rate"] for trial in [*first, *second]}) == 20
    lists: list[Parameter] = [Choices("n_step", {"1": 1, "3": 3, "5": 5})]
    (a, b, c) = open_study(tmp_path / "lists.log", lists).begin(9, 16)
    assert {a.settings["n_step"], b.settings["n_step"], c.settings["n_step"]} == {1, 3, 5}


def test_lists_are_tried_in_every_combination_once(tmp_path: Path) -> None:
    space: list[Parameter] = [
        Choices("n_step", {"1": 1, "3": 3, "5": 5}),
        Choices("double", {"yes": True, "no": False}),
    ]
    for number in (1, 4, 50):
        train(open_study(tmp_path / "journal.log", space), number + 3)
    records = open_study(tmp_path / "journal.log", space).records
    assert len(records) == 6
    train(open_study(tmp_path / "other.log", space), 50)
    found = {tuple(record.texts.values()) for record in open_study(tmp_path / "other.log", space).records}
    assert len(found) == 6


def test_the_setting_that_decides_is_the_most_important(tmp_path: Path) -> None:
    study = open_study(tmp_path / "journal.log")
    assert study.importances() == {}
    train(study, 12)
    importances = study.importances()
    assert next(iter(importances)) == "n_step" and importances.keys() == {each.name for each in SPACE}
    assert sum(importances.values()) == pytest.approx(1.0)


def test_the_best_come_first_and_failures_last(tmp_path: Path) -> None:
    study = open_study(tmp_path / "journal.log")
    for number, value in enumerate((1.0, 3.0, 2.0)):
        study.begin(5)
        study.tell(number, "complete", value)
    study.begin(5)
    study.tell(3, "failed", error="no memory")
    study.begin(5)
    records = best_first(study.records)
    assert [record.number for record in records] == [1, 2, 0, 3, 4]
    assert records[3].error == "no memory" and records[4].state == "under way"
    assert list(bests_so_far(study.records)) == [(0, 1.0), (1, 3.0), (2, 3.0)]


@pytest.mark.parametrize("line", ["[]", '{"op_code": 999}', "noise", 10_000 * "["])
def test_a_journal_with_a_line_of_something_else_is_refused(line: str, tmp_path: Path) -> None:
    journal = tmp_path / "journal.log"
    train(open_study(journal), 2)
    with journal.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ConfigError, match=r"journal must hold what the sweep has written, got .*journal.log .*restore"):
        open_study(journal)


def test_a_journal_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ConfigError, match="journal must hold what the sweep has written"):
            open_study(path)
