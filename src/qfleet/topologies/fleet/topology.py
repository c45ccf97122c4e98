"""What topologies share whose parts run on Ray, each in a process of its own, directed by this one."""

import contextlib
import functools
import importlib
import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qfleet.config import ActorPool, ConfigError, TrainConfig
from qfleet.core.agent import make_agent
from qfleet.core.learner import LearnerState, init_from_seed, make_learner
from qfleet.core.replay import SavedReplay
from qfleet.core.types import Network, stored_spec
from qfleet.envs.host import HostEnv
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.base import StateIsLost, Topology, resharded_replay, saved_replay
from qfleet.topologies.evaluator import Evaluator
from qfleet.topologies.fleet.replay_shard import make_whole_replay
from qfleet.topologies.footprint import Footprint, batch_shapes, make_footprint
from qfleet.topologies.mesh import REPLICATED

if TYPE_CHECKING:
    from qfleet.topologies.fleet.director import Director


class OnRay(Topology):
    """Processes that act on their own, and who learns; this process directs them, and plays what is evaluated."""

    _director: "Director[Any]"

    def __init__(self, config: TrainConfig, env: InGraphEnv | HostEnv, network: Network, pool: ActorPool) -> None:
        """Checks what is the same for all.

        Args:
          config: of the run.
          env: to learn.
          network: as in all parts.
          pool: who acts.

        Raises:
          ConfigError: if Ray isn't there, or it has many seeds.
        """
        if config.num_seeds > 1:
            raise ConfigError(
                f"num_seeds must be 1 with topology {config.topology.name}, got num_seeds="
                f"{config.num_seeds}; start one run for each seed"
            )
        importlib.import_module("qfleet.topologies.fleet.cluster")  # which says so if Ray isn't there
        self._config, self._pool, self._env = config, pool, env
        self._agent = make_agent(network, config.agent)
        self._stored_spec = stored_spec(env.spec, network.to_storage_layout)
        learner = make_learner(self._agent, config.agent)
        self._init = functools.partial(init_from_seed, learner, self._agent)
        self._shapes: LearnerState = jax.eval_shape(self._init, np.uint32(0))
        self._has_replay = config.agent.replay != "none" and config.checkpoint_replay
        self.env_steps = 0
        """When it was last looked at; the parts go on meanwhile."""
        self.learner_steps = 0
        """The same."""
        self._evaluator = Evaluator(config, env, self._agent)

    def footprint(self) -> Footprint:
        """Returns what all parts keep, which on one machine is what the host must have."""
        replay = jax.eval_shape(make_whole_replay(self._config, self._stored_spec).init)
        return make_footprint(
            {"data": 1, "model": 1},
            tuple(jax.local_devices()[:1]),
            learner=(self._shapes, jax.tree.map(lambda x: REPLICATED, self._shapes)),
            lanes=((), REPLICATED),
            replay=(replay, jax.tree.map(lambda x: REPLICATED, replay)),
            batch=(batch_shapes(self._stored_spec, self._config.agent, self._pool.num_lanes, 1), REPLICATED),
        )

    def start(self) -> float:
        """Starts all parts, and returns the wall time until what is needed is there.

        Raises:
          ConfigError: if the cluster isn't there, or has no room for them.
        """
        started = time.perf_counter()
        self._director.checkpoints_path = self.checkpoints_path
        try:
            self._director.start()
        except BaseException:  # Ctrl-C too: a Ray that nobody ends stays as long as this process
            self.close()
            raise
        return time.perf_counter() - started

    def evaluate(self, num_episodes: int, batch: int = 0) -> np.ndarray:
        """Returns greedy returns of the newest parameters, `[1, num_episodes]`; meanwhile the parts go on.

        But from the second batch on learning rests: what confirms a return is what a checkpoint will hold.

        Args:
          num_episodes: played by this process.
          batch: evaluations of the same parameters with different numbers see different episodes.
        """
        if batch:
            with contextlib.suppress(StateIsLost):
                self._director.quiesce()
        return self._evaluator.returns(self.params, self.env_steps, num_episodes, batch)

    def read(self, checkpoints: Checkpoints, checkpoint: int | None, metadata: dict[str, Any]) -> dict[str, Any]:
        """Returns the state that a checkpoint holds, of parts of any number or of another topology."""
        state: dict[str, Any] = {"learner": self._read_learner(checkpoints, checkpoint)}
        if self._has_replay:
            state["replay"] = self._read_replay(checkpoints, checkpoint)
        return state

    def _read_learner(self, checkpoints: Checkpoints, checkpoint: int | None = None) -> LearnerState:
        like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._shapes)
        state: LearnerState = checkpoints.restore_item("learner", like, checkpoint)
        return state

    def _read_replay(self, checkpoints: Checkpoints, checkpoint: int | None = None) -> SavedReplay:
        """Returns the replay of a checkpoint as these parts would have saved it."""
        saved = saved_replay(checkpoints.restore_item("replay", env_steps=checkpoint))
        shape = (*self._replay_shape, self._pool.num_actors)
        is_ours = (*saved.ring.rows.outcome.shape, len(saved.ring.cursor)) == shape
        if is_ours and isinstance(saved.leaves, tuple) != self._is_prioritised:
            return saved
        frame_stack = self._stored_spec.frame_stack
        return resharded_replay(saved, shape, self._config.agent, frame_stack, is_prioritised=self._is_prioritised)

    @property
    def _replay_shape(self) -> tuple[int, int]:
        """Rows and lanes of the replays of all, together."""
        return self._config.agent.replay_capacity // self._pool.num_lanes, self._pool.num_lanes

    @property
    def _is_prioritised(self) -> bool:
        """Whether their replays keep priorities, as shards do even for uniform sampling."""
        return True

    def restore(self, state: dict[str, Any], counters: dict[str, Any]) -> None:
        """Goes on from a checkpoint; where it has no replay, from an empty one, after a new warm-up.

        Environments are not saved: all lanes begin new episodes.
        """
        self._director.restore(state, counters)
        self.env_steps, self.learner_steps = counters["env_steps"], counters["learner_steps"]

    @property
    def facts(self) -> dict[str, Any]:
        """What the run's summary should hold beside what all topologies have."""
        return {"num_restarts": self._director.num_restarts}

    def close(self) -> None:
        """Ends all parts, and the connection to Ray; may be called twice, and before `start`."""
        self._director.close()
        self._evaluator.close()
