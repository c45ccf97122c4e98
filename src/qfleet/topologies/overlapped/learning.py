"""The learner's side of an overlapped run: rows or rollouts come in, newer parameters come out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from qfleet.core.learner import LearnerState
from qfleet.core.replay import ReplayState, SavedReplay
from qfleet.core.updates import Losses
from qfleet.runtime.records import Sum
from qfleet.topologies.overlapped.programs import HostRow, Programs
from qfleet.topologies.overlapped.programs_on_mesh import ProgramsOnMesh


class _Pending(NamedTuple):
    """A row that isn't stored yet, and the learner steps that are due once it is."""

    row: HostRow
    key: jax.Array
    importance_exponent: Any
    num_updates: int


class Learning:
    """A learner with its replay, and the row that it stores and learns from next.

    Its programs run behind the host: a call returns while the program still runs, so the environments can step
    meanwhile. Whoever reads the parameters waits for them.
    """

    learner: LearnerState
    """The newest state."""
    replay: ReplayState | Any
    """The newest state; `()` without a replay."""
    learn: Callable[..., tuple]
    """`Programs.learn`, compiled."""
    losses_to_host: Callable[[Any], Any]
    """Copies sums of losses to the host."""

    def __init__(
        self, on_mesh: ProgramsOnMesh, programs: Programs, learner: LearnerState, replay: ReplayState | tuple[()]
    ) -> None:
        """Starts with no row. `learn` must be set before there is one.

        Args:
          on_mesh: brings rows to the devices.
          programs: the jitted programs.
          learner: the state to start from.
          replay: the state to start from; `()` without a replay.
        """
        self._on_mesh, self._programs, self.learner, self.replay = on_mesh, programs, learner, replay
        self.losses_to_host = jax.device_get
        self._pending: _Pending | None = None
        self._losses: list[tuple[Losses, int]] = []  # sums of losses, each with its number of learner steps

    @property
    def staleness(self) -> int:
        """Learner steps that parameters read now lack, because the row before them is still pending."""
        return self._pending.num_updates if self._pending else 0

    def restore_learner(self, learner: LearnerState) -> None:
        """Goes on from a checkpoint's learner, and forgets the pending row, which came after that checkpoint."""
        self.learner, self._pending = learner, None

    def add_row(self, row: HostRow, key: jax.Array, importance_exponent: Any, num_updates: int) -> None:
        """Takes a row, from which `learn_pending` will learn; there must be no other one pending."""
        assert self._pending is None
        self._pending = _Pending(row, key, importance_exponent, num_updates)

    def learn_pending(self) -> None:
        """Starts the program that stores the pending row and learns, if there is a row."""
        if self._pending is None:
            return
        row, key, exponent, num_updates = self._pending
        self._pending = None
        from_host = self._on_mesh.lanes_to_devices(row._replace(obs=(), carry=()))
        row = from_host._replace(obs=row.obs, carry=row.carry)
        self.learner, self.replay, losses = self.learn(
            self.learner, self.replay, row, key, exponent, np.int32(num_updates)
        )
        self._losses.append((losses, num_updates))

    def learn_from_rollout(self, rollout: tuple[Any, ...], key: jax.Array, num_updates: int) -> None:
        """Starts the program that learns from a rollout.

        Args:
          rollout: the arguments of `Programs.learn` between `learner` and `key`.
          key: key of this rollout's learner steps.
          num_updates: how many learner steps the program takes.
        """
        self.learner, losses = self.learn(self.learner, *rollout, key)
        self._losses.append((losses, num_updates))

    def sum_losses(self) -> tuple[Sum, Sum]:
        """Returns the losses and TD errors of the learner steps since the last call, added up."""
        losses, self._losses = self._losses, []
        num_updates = sum(n for _, n in losses)
        if not num_updates:
            return Sum(), Sum()
        sums = self.losses_to_host([each for each, _ in losses])
        loss, td_error = (Sum(float(np.sum(values)), num_updates) for values in zip(*sums, strict=True))
        return loss, td_error

    def saved_replay(self) -> SavedReplay:
        """Returns what a checkpoint holds of the replay."""
        replay = self.replay
        return SavedReplay(replay.ring, self._programs.replay_leaves(replay), replay.max_priority)

    def restore_replay(self, saved: SavedReplay, final_obs: Any, key: jax.Array) -> None:
        """Goes on from a checkpoint's replay.

        Args:
          saved: what `saved_replay` returned.
          final_obs: `[lanes, ...]`, the observations that its episodes had come to. They are stored as rows without a
            step, which closes the episodes. None if these are closed already.
          key: any key; no learner step is due, so it isn't used.
        """
        self.replay = self._programs.restore_replay(saved)
        if final_obs is None:
            return
        num_lanes = self._on_mesh.num_lanes
        nobody, everybody = np.zeros(num_lanes, bool), np.ones(num_lanes, bool)
        no_action, no_reward = np.zeros(num_lanes, np.int32), np.zeros(num_lanes, np.float32)
        carry = self._on_mesh.blank_memory().carry
        row = HostRow(final_obs, no_action, no_reward, nobody, nobody, everybody, carry=carry)
        self.add_row(row, key, np.float32(1), 0)
        self.learn_pending()
