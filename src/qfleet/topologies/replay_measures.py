"""What a replay tells about itself and about the episodes in it, read on the host without a compiled program."""

from typing import Any

import numpy as np

from qfleet.core.replay import NO_STEP, TERMINATED, TRUNCATED, ReplayState
from qfleet.core.replay.priorities import SumTree


class ReplayMeasures:
    """Measures a replay now and then. Rows that were stored since the last time are read once."""

    def __init__(self) -> None:
        self._num_read = 0  # rows that were ever inserted, by the last time

    def read(self, replay: ReplayState) -> dict[str, float]:
        """Returns the measures of a replay in one segment, by name. With seeds, its arrays have a leading axis.

        A process of several reads its own lanes. The replay stays as it is: no copy of its arrays is kept.

        Returns:
          `replay_size`: environment steps that the replay holds, over all lanes of one seed.
          `replay_age_mean`: their mean age, in environment steps.
          `reward_abs_max`: greatest absolute reward of the rows since the last time.
          `truncated_fraction`: share of the episodes that ended in these rows that a time limit ended; absent if none
            ended.
          `priority_mean`, `priority_max`: mean priority (to the power `priority_exponent`) of the transitions that can
            be drawn, and the one that new transitions enter with; absent if sampling is uniform.
        """
        ring, num_lanes = replay.ring, replay.ring.rows.outcome.shape[-1]
        size, cursor = (int(_first(x).flat[0]) for x in (ring.size, ring.cursor))
        inserted = int(_first(ring.insertions).flat[0])
        num_new = min((inserted - self._num_read) % 2**32, size)
        self._num_read = inserted
        measures = {"replay_size": float(size * num_lanes), "replay_age_mean": max(size - 1, 0) / 2 * num_lanes}
        reward_max, ends = 0.0, np.zeros(2, int)
        for reward, outcome in zip(_shares(ring.rows.reward), _shares(ring.rows.outcome), strict=True):
            rows = np.arange(cursor - num_new, cursor) % outcome.shape[-2]
            new = outcome[..., rows, :]
            ends += [np.count_nonzero(new == TERMINATED), np.count_nonzero(new == TRUNCATED)]
            steps = np.abs(reward[..., rows, :])[new != NO_STEP]
            reward_max = max(reward_max, float(np.max(steps, initial=0.0)))
        if num_new:
            measures["reward_abs_max"] = reward_max
        if ends.sum():
            measures["truncated_fraction"] = float(ends[1] / ends.sum())
        return measures | _of_priorities(replay)


def _of_priorities(replay: ReplayState) -> dict[str, float]:
    if not isinstance(replay.tree, SumTree):
        return {}
    total, count = (
        sum(float(share.sum()) for share in _shares(x)) for x in (replay.tree.levels[-1], replay.num_transitions)
    )
    priorities = {"priority_max": float(_first(replay.max_priority).max())}
    return priorities | ({"priority_mean": total / count} if count else {})


def _shares(array: Any) -> list[np.ndarray]:
    """Returns this process's shares of an array, without copies where they lie in the host's memory."""
    if isinstance(array, (np.ndarray, np.generic)):
        return [np.asarray(array)]
    return [np.asarray(shard.data) for shard in array.addressable_shards]


def _first(array: Any) -> np.ndarray:
    """Returns one device's copy or share of an array."""
    return _shares(array)[0]
