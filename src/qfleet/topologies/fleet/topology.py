"""Base class of the topologies whose processes run on Ray and are coordinated by a director in this process."""

import contextlib
import functools
import importlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qfleet.config import ActorPool, TrainConfig
from qfleet.core.agent import make_agent
from qfleet.core.learner import LearnerState, init_from_seed, make_learner
from qfleet.core.memory import memory_shapes
from qfleet.core.replay import SavedReplay, num_ring_rows
from qfleet.core.types import Network, stored_spec
from qfleet.envs.host import HostEnv
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.evaluation import Episodes, never
from qfleet.topologies.base import Layout, StateIsLost, Topology
from qfleet.topologies.evaluator import Evaluator
from qfleet.topologies.fleet.replay_shard import make_whole_replay
from qfleet.topologies.footprint import Footprint, batch_shapes, make_footprint
from qfleet.topologies.mesh import REPLICATED
from qfleet.topologies.restoring import resharded_replay, saved_replay

if TYPE_CHECKING:
    from qfleet.topologies.fleet.director import Director


class OnRay(Topology):
    """A topology of processes on Ray. This process coordinates them, and plays the episodes of evaluations."""

    _director: "Director[Any]"

    def __init__(self, config: TrainConfig, env: InGraphEnv | HostEnv, network: Network, pool: ActorPool) -> None:
        """Checks what all topologies on Ray require.

        Args:
          config: of the run.
          env: to learn.
          network: that all processes build from the config, too.
          pool: the processes that act.

        Raises:
          ConfigError: if Ray isn't installed.
        """
        importlib.import_module("qfleet.topologies.fleet.cluster")  # raises ConfigError if Ray isn't installed
        self._config, self._pool, self._env = config, pool, env
        self._agent = make_agent(network, config.agent, env.spec.frame_stack)
        self._stored_spec = stored_spec(env.spec, network.to_storage_layout)
        learner = make_learner(self._agent, config.agent)
        self._init = functools.partial(init_from_seed, learner, self._agent)
        self._shapes: LearnerState = jax.eval_shape(self._init, np.uint32(0))
        self._has_replay = config.agent.replay != "none" and config.checkpoint_replay
        self.env_steps = 0
        """Environment steps when the director was last asked; the processes go on meanwhile."""
        self.learner_steps = 0
        """Learner steps at the same time."""
        self._evaluator = Evaluator(config, env, self._agent)

    def footprint(self) -> Footprint:
        """Returns what all processes keep together. If they run on one machine, this is what that machine must hold."""
        carry_size, agent, num_lanes = self._agent.carry_size, self._config.agent, self._pool.num_lanes
        memory = memory_shapes(self._agent.memory, self._stored_spec, num_lanes)
        replay = jax.eval_shape(make_whole_replay(self._config, self._pool, self._stored_spec, carry_size).init)
        return make_footprint(
            {"data": 1, "model": 1},
            tuple(jax.local_devices()[:1]),
            learner=(self._shapes, jax.tree.map(lambda x: REPLICATED, self._shapes)),
            lanes=((), REPLICATED),
            replay=(replay, jax.tree.map(lambda x: REPLICATED, replay)),
            batch=(batch_shapes(self._stored_spec, agent, num_lanes, 1, memory.carry), REPLICATED),
            evaluation=(self._evaluator.shapes(self._config.eval_episodes), REPLICATED),
        )

    def start(self) -> float:
        """Starts all processes, and returns the wall time until those are ready that the run needs, in seconds.

        Raises:
          ConfigError: if the cluster can't be reached, or has no room for the processes.
        """
        started = time.perf_counter()
        self._director.checkpoints_path = self.checkpoints_path
        try:
            self._director.start()
        except BaseException:  # also Ctrl-C, because otherwise a local Ray would stay until this process ends
            self.close()
            raise
        return time.perf_counter() - started

    def prepare_evaluation(self) -> None:
        """Makes the lanes of evaluations, if the environment isn't written in JAX."""
        self._evaluator.start()

    def evaluate(
        self,
        num_episodes: int,
        batch: int = 0,
        *,
        max_episode_steps: int | None = None,
        should_stop: Callable[[], bool] = never,
    ) -> Episodes | None:
        """Returns episodes of the newest parameters, `[1, num_episodes]`, while the other processes go on.

        Learning rests from the second batch on, so that the parameters that confirm a return are the ones that a
        checkpoint will hold.

        Args: as for `Topology.evaluate`. This process plays all episodes.
        """
        if batch:
            with contextlib.suppress(StateIsLost):
                self._director.quiesce()
        return self._evaluator.play(
            self.params,
            self.env_steps,
            num_episodes,
            batch,
            max_episode_steps=max_episode_steps,
            should_stop=should_stop,
        )

    def read(self, checkpoints: Checkpoints, checkpoint: int | None, metadata: dict[str, Any]) -> dict[str, Any]:
        """Returns the state that a checkpoint holds, whichever topology and number of processes have saved it."""
        state: dict[str, Any] = {"learner": self._read_learner(checkpoints, checkpoint)}
        if self._has_replay and "replay" in checkpoints.items(checkpoint):
            state["replay"] = self._read_replay(checkpoints, checkpoint)
        return state

    def _read_learner(self, checkpoints: Checkpoints, checkpoint: int | None = None) -> LearnerState:
        like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._shapes)
        state: LearnerState = checkpoints.restore_item("learner", like, checkpoint)
        return state

    def _read_replay(self, checkpoints: Checkpoints, checkpoint: int | None = None) -> SavedReplay:
        """Returns the replay of a checkpoint as this topology would have saved it."""
        saved = saved_replay(checkpoints.restore_item("replay", env_steps=checkpoint))
        shape = (*self._replay_shape, self._pool.num_actors)
        is_ours = (*saved.ring.rows.outcome.shape, len(saved.ring.cursor)) == shape
        if is_ours and isinstance(saved.leaves, tuple) != self._is_prioritised:
            return saved
        frame_stack = self._stored_spec.frame_stack
        return resharded_replay(saved, shape, self._config.agent, frame_stack, is_prioritised=self._is_prioritised)

    @property
    def _replay_shape(self) -> tuple[int, int]:
        """Rows and lanes of the replays of all processes together."""
        return num_ring_rows(self._config.agent, self._pool.num_lanes), self._pool.num_lanes

    @property
    def _is_prioritised(self) -> bool:
        """Whether the replays keep priorities; `ReplayShard` does even for uniform sampling."""
        return True

    @property
    def counters(self) -> dict[str, Any]:
        """The counts that `restore` needs in addition to `state`."""
        return {"env_steps": self.env_steps, "learner_steps": self.learner_steps, **self._director.counters}

    @property
    def layout(self) -> Layout:
        """The layout of the checkpoints that it saves."""
        return Layout(
            topology=self._config.topology.name,
            num_segments=self._pool.num_actors,
            lanes_per_segment=self._pool.lanes_per_actor,
        )

    def restore(self, state: dict[str, Any], counters: dict[str, Any]) -> None:
        """Goes on from a checkpoint. If it has no replay, an empty one is filled in a new warm-up.

        Environments are not saved: all lanes begin new episodes.
        """
        self._director.restore(state, counters)
        self.env_steps, self.learner_steps = counters["env_steps"], counters["learner_steps"]

    @property
    def facts(self) -> dict[str, Any]:
        """Entries of the run's summary beside those that all topologies have."""
        return {"num_restarts": self._director.num_restarts}

    def close(self) -> None:
        """Terminates all processes and closes the connection to Ray; may be called twice, and before `start`."""
        self._director.terminate()
        self._evaluator.close()
