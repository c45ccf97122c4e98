"""When and how a run's checkpoints are saved: on the way, where a failure may pass, and at the end."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import jax

from qfleet.config import ConfigError
from qfleet.envs.failures import describe
from qfleet.runtime.activity import announce
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.base import StateIsLost, Topology

logger = logging.getLogger("qfleet")


class Saving:
    """Saves the checkpoints of one run."""

    def __init__(
        self,
        topology: Topology,
        checkpoints: Checkpoints,
        notes: Callable[[], dict[str, Any]],
        warn: Callable[[str, str], None],
    ) -> None:
        """Saves nothing yet.

        Args:
          topology: whose state is saved.
          checkpoints: the run's checkpoints.
          notes: returns the metadata of a checkpoint, apart from what the topology says about itself.
          warn: logs and notes a warning, given what it is about and its text.
        """
        self._topology, self._checkpoints, self._notes, self._warn = topology, checkpoints, notes, warn

    def save(self) -> None:
        """Begins to save a checkpoint. If the state is lost for the moment, that is a warning."""
        announce("saving")
        topology = self._topology
        try:
            state = topology.state  # must come first: a fleet continues meanwhile, and this fixes what counts
        except StateIsLost as error:
            logger.warning("there is no checkpoint at environment step %d: %s", topology.env_steps, error)
            return
        self._checkpoints.save(topology.env_steps, state, self._metadata())

    def save_if_possible(self) -> None:
        """Saves on the way. A disk that is full now may have room at the next time."""
        try:
            self.save()
        except (OSError, ConfigError) as error:  # a folder that can't be read, or another run's checkpoint
            if jax.process_count() > 1:  # several processes can only save together
                raise
            self._warn("saving", f"{error}. The run goes on, and the next checkpoint tries again")

    def save_at_end(self) -> None:
        """Saves the last checkpoint, and returns when it is complete.

        Raises:
          OSError: if it can't be written.
        """
        with contextlib.suppress(OSError):  # of an earlier checkpoint, which must not prevent this one
            self._checkpoints.wait()
        self.save()
        self._checkpoints.wait()

    def save_after_failure(self) -> None:
        """Saves what is sound after the run has failed, unless several processes would have to do so together."""
        if jax.process_count() > 1:
            return
        try:
            self.save()
            self._checkpoints.wait()
        except Exception as error:
            logger.warning("what the run has learned since its newest checkpoint is lost: %s", describe(error))

    def newest(self) -> int | None:
        """Returns the environment steps of the newest checkpoint, None if there is none or the folder can't be read."""
        try:
            return self._checkpoints.latest()
        except ConfigError as error:  # the error under way matters more
            logger.warning("%s", error)
            return None

    def _metadata(self) -> dict[str, Any]:
        return {"counters": self._topology.counters, "layout": self._topology.layout, **self._notes()}
