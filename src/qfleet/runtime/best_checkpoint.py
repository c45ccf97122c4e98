"""The checkpoint of a run's best evaluation, which no newer one displaces.

    checkpoints/best/<env_steps>/    as any other checkpoint, but with the learner alone

It is small, whatever the size of the replay, because a run may save one at each of its evaluations. The one before is
deleted only once the new one is complete.
"""

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qfleet.runtime import checkpoint_files as files
from qfleet.runtime.checkpoint_trees import PyTree
from qfleet.runtime.checkpoints import Checkpoints

RETURN_MEAN = "return_mean"
"""Name of the mean return of the evaluation, in the metadata. Of two checkpoints, the greater one is the best."""


class BestCheckpoint(Checkpoints):
    """The checkpoint of a run's best evaluation. There is one, except while it is being replaced."""

    def __init__(self, checkpoints: str | os.PathLike[str], *, run_id: str | None, is_keeper: bool = True) -> None:
        """Neither reads nor writes anything yet.

        Args:
          checkpoints: folder of the run's checkpoints.
          run_id, is_keeper: as for `Checkpoints`.
        """
        self._others = Path(checkpoints).absolute()
        super().__init__(self._others / files.BEST, keep=1, run_id=run_id, is_keeper=is_keeper)

    def latest(self) -> int | None:
        """Returns the environment steps of the best checkpoint, or None if there is none."""
        existing = self.all()
        return max(existing, key=self._return_mean) if len(existing) > 1 else next(iter(existing), None)

    def _return_mean(self, env_steps: int) -> float:
        with contextlib.suppress(files.CheckpointError, TypeError, ValueError):  # a damaged one can't be the best
            return float(self.read_metadata(env_steps)[RETURN_MEAN])
        return float("-inf")

    def check_exists(self) -> int:
        """Returns the environment steps of the best checkpoint.

        Raises:
          CheckpointError: if there is none.
        """
        best = self.latest()
        if best is None:
            raise files.CheckpointError(
                f"`best` means the checkpoint of the best evaluation, got none in {self._directory}; a run keeps it "
                f"from its first evaluation on, unless checkpoint_best is off: leave --checkpoint out for the newest"
            )
        return best

    def save_learner(self, env_steps: int, learner: PyTree, metadata: Mapping[str, Any]) -> bool:
        """Saves the learner in the background, in place of the best one so far, and returns whether it does.

        It doesn't where the best one is of the same environment step: that would have to be moved away first, and then
        a process that is killed meanwhile would leave none.

        Args:
          env_steps: environment steps done so far, over all lanes.
          learner: the learner state.
          metadata: as for `Checkpoints.save`, with `RETURN_MEAN`.

        Raises:
          CheckpointWriteError: if this or the previous save couldn't be written.
        """
        if env_steps in self.all():
            return False
        self.save(env_steps, {"learner": learner}, metadata)
        return True

    def promote(self) -> int:
        """Puts a copy among the run's other checkpoints, to go on from, and returns its environment steps.

        If the run has a checkpoint of the same learner steps there already, that one stays, because it is whole.

        Raises:
          CheckpointError: if there is no best checkpoint, or it is damaged.
        """
        best = self.check_exists()
        source, target = self._directory / str(best), self._others / str(best)
        index = files.read_index(source, ["learner"], self._run_id)
        if best in files.list_checkpoints(self._others):
            with contextlib.suppress(files.CheckpointError, KeyError, TypeError):  # damaged, so the copy replaces it
                there = files.read_index(target, ["learner"], self._run_id)["metadata"]["counters"]
                if there["learner_steps"] == index["metadata"]["counters"]["learner_steps"]:
                    return best
            files.set_aside(target, self._run_id)
        files.make_directory(self._others)
        files.copy(source, target)
        return best

    def _open(self, env_steps: int | None, items: Iterable[str]) -> tuple[Path, dict[str, Any]]:
        return super()._open(self.check_exists() if env_steps is None else env_steps, items)

    def _delete_old(self) -> None:
        files.delete_all_but(self._directory, self._index["env_steps"], self._run_id)
