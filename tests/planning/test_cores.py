"""Tasks share cores as threads do, and links carry one transfer at a time."""

import pytest

from qfleet.planning.cores import Clock, Cores, Link


def ends(num_cores: float, tasks: list[tuple[float, float, float]], **options: float) -> list[float]:
    """Returns when each task ends; tasks are given by the time when they begin, their work and their width."""
    clock, found = Clock(), [0.0] * len(tasks)
    cores = Cores(clock, num_cores, **options)

    def begin(i: int, work: float, width: float) -> None:
        def end() -> None:
            found[i] = clock.now

        clock.after(tasks[i][0], lambda: cores.run(work, width, end))

    for i, (_, work, width) in enumerate(tasks):
        begin(i, work, width)
    while clock.step():
        pass
    return found


def test_a_task_alone_takes_its_work() -> None:
    assert ends(2, [(0.0, 3.0, 1.0)]) == [3.0]


def test_a_task_of_two_threads_takes_half_as_long() -> None:
    assert ends(2, [(0.0, 3.0, 2.0)]) == [1.5]


def test_two_tasks_share_a_core() -> None:
    """For 2 s both have half of the core; the longer one then has it for the second that is left."""
    assert ends(1, [(0.0, 1.0, 1.0), (0.0, 2.0, 1.0)]) == pytest.approx([2.0, 3.0])


def test_a_task_that_comes_later_slows_the_first_one() -> None:
    assert ends(1, [(0.0, 2.0, 1.0), (1.0, 0.5, 1.0)]) == pytest.approx([2.5, 2.0])


def test_three_threads_on_two_cores_have_two_thirds_each() -> None:
    assert ends(2, [(0.0, 2.0, 1.0), (0.0, 2.0, 1.0), (0.0, 2.0, 1.0)]) == pytest.approx([3.0, 3.0, 3.0])


def test_cores_are_busy_once_none_is_idle() -> None:
    clock = Clock()
    cores = Cores(clock, 2)
    seen = [cores.are_busy]
    for _ in range(2):
        cores.run(1.0, 1.0, lambda: None)
        seen.append(cores.are_busy)
    assert seen == [False, False, True]


def test_a_faster_core_takes_less() -> None:
    assert ends(1, [(0.0, 3.0, 1.0)], speed=2.0) == [1.5]


def test_a_link_sends_one_after_the_other() -> None:
    clock, source, targets = Clock(), Link(100.0), [Link(1000.0), Link(50.0)]
    seconds = [Link.transfer(clock, source, target, 200, 0.5) for target in targets]
    assert seconds == [2.0 + 0.5, 2.0 + 4.0 + 0.5]
