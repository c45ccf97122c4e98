"""The acting loop of host environments: which rows hold steps, and which episodes end where."""

from collections.abc import Sequence

import numpy as np

from qfleet.envs.host import HostStep
from qfleet.runtime.host_acting import HostActing


class ScriptedLane:
    """One lane whose steps end as a script says: "go", "end", "cut" or "fail"; observations number the rows."""

    def __init__(self, script: Sequence[str]) -> None:
        self._script, self.row = script, 0

    def reset(self, seed: int) -> np.ndarray:
        return np.array([[self.row]], np.float32)

    def send(self, action: np.ndarray) -> None:
        self.event = self._script[self.row]
        self.row += 1

    def recv(self) -> HostStep:
        terminated, truncated, failed = (np.array([self.event == name]) for name in ("end", "cut", "fail"))
        return HostStep(self.reset(0), np.ones(1, np.float32), terminated, truncated, failed)

    def close(self) -> None:
        pass


def rows_of(script: Sequence[str], **settings: int) -> list[tuple]:
    acting = HostActing(ScriptedLane(script), 0, **settings)
    assert acting.is_first[0]
    rows = []
    for number, _ in enumerate(script, start=1):
        acting.send(np.zeros(1, np.int32))
        row = acting.receive()
        assert acting.obs[0, 0] == number
        assert acting.is_first[0] == row.no_step[0]
        rows.append((bool(row.no_step[0]), row.returns, row.lengths, row.num_failures))
    return rows


def test_the_row_after_an_episode_holds_no_step_and_a_new_episode_begins_after_it() -> None:
    assert rows_of(["go", "end", "go", "go", "cut"]) == [
        (False, [], [], 0),
        (False, [2.0], [2], 0),
        (True, [], [], 0),
        (False, [], [], 0),
        (False, [2.0], [2], 0),
    ]


def test_a_failed_environment_loses_its_episode() -> None:
    assert rows_of(["go", "fail", "end"]) == [(False, [], [], 0), (True, [], [], 1), (False, [1.0], [1], 0)]


def test_a_limit_counts_the_rest_of_an_episode_as_another_without_a_row_between() -> None:
    assert rows_of(["go"] * 4, max_episode_steps=2) == [
        (False, [], [], 0),
        (False, [2.0], [2], 0),
        (False, [], [], 0),
        (False, [2.0], [2], 0),
    ]
