"""What topologies share whose parts run on Ray, each in a process of its own, directed by this one."""

import contextlib
import functools
import importlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qfleet.config import ConfigError, TrainConfig, crew_of, topology_name
from qfleet.core.agent import make_agent
from qfleet.core.exploration import greedy
from qfleet.core.keys import key_of
from qfleet.core.learner import LearnerState, make_learner
from qfleet.core.replay import SavedReplay
from qfleet.core.types import Network, Params, stored_spec
from qfleet.envs.host import HostEnv, HostLanes, lane_options, seed_of
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.evaluation import greedy_returns, host_greedy_returns
from qfleet.topologies.footprint import Footprint, batch_shapes, make_footprint
from qfleet.topologies.placement import EVERYBODYS
from qfleet.topologies.replay_shard import make_whole_replay
from qfleet.topologies.topology import StateIsLost, Topology, fitting, saved_replay

if TYPE_CHECKING:
    from qfleet.topologies.ray_director import Director

_EVALUATION = 1
"""What a seed's random numbers are for; 0 and 2 are the learner's and the actors'."""


class OnRay(Topology):
    """Parts that act on their own, and who learns; this process directs them, and plays what is evaluated."""

    _director: "Director[Any]"

    def __init__(self, config: TrainConfig, env: InGraphEnv | HostEnv, network: Network) -> None:
        """Checks what is the same for all.

        Raises:
          ConfigError: if Ray isn't there, the sizes don't fit each other, or it has many seeds.
        """
        if config.num_seeds > 1:
            raise ConfigError(
                f"num_seeds must be 1 with topology {topology_name(config.topology)}, got num_seeds="
                f"{config.num_seeds}; start one run for each seed"
            )
        importlib.import_module("qfleet.topologies.ray_cluster")  # which says so if Ray isn't there
        self._config, self._crew, self._env = config, crew_of(config.topology), env
        self._agent = make_agent(network, config.agent)
        self._stored_spec = stored_spec(env.spec, network.store)
        learner = make_learner(self._agent, config.agent)
        self._shapes: LearnerState = jax.eval_shape(lambda: learner.init(self._agent.init(jax.random.key(0))))
        self._whole_replay = make_whole_replay(config, self._stored_spec)  # which checks the sizes
        self.env_steps = 0
        """When it was last looked at; the parts go on meanwhile."""
        self.learner_steps = 0
        """The same."""
        self._eval_lanes: HostLanes | None = None

    def footprint(self) -> Footprint:
        """Returns what all parts keep, which on one machine is what the host must have."""
        replay = jax.eval_shape(self._whole_replay.init)
        return make_footprint(
            {"data": 1, "model": 1},
            tuple(jax.local_devices()[:1]),
            learner=(self._shapes, jax.tree.map(lambda x: EVERYBODYS, self._shapes)),
            lanes=((), EVERYBODYS),
            replay=(replay, jax.tree.map(lambda x: EVERYBODYS, replay)),
            batch=(batch_shapes(self._stored_spec, self._config.agent, self._crew.num_lanes, 1), EVERYBODYS),
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
                self._director.rest()
        params, env = self.params, self._env
        numbers = (self._config.seed, _EVALUATION, self.env_steps % 2**32, batch)
        if isinstance(env, InGraphEnv):
            key = key_of(*numbers)
            return np.asarray(self._greedy_returns(params, key, num_episodes))[None]
        if self._eval_lanes is None:
            num_lanes = min(self._crew.num_lanes, self._config.eval_episodes)
            self._eval_lanes = env.make_eval_lanes(num_lanes, lane_options(self._config.topology))
            self._greedy = jax.jit(lambda params, view: greedy(self._agent.q_values(params, view)))
        returns = host_greedy_returns(
            self._eval_lanes,
            env.spec,
            lambda view: self._greedy(params, view),
            num_episodes,
            seed_of(*numbers),
            self._agent.store,
        )
        return returns[None]

    @functools.cached_property
    def _greedy_returns(self) -> Callable[..., jax.Array]:
        env, agent = self._env, self._agent

        def returns(params: Params, key: jax.Array, num_episodes: int) -> jax.Array:
            assert isinstance(env, InGraphEnv)
            return greedy_returns(env, agent.q_values, params, key, num_episodes, agent.store)

        return jax.jit(returns, static_argnums=2)

    def read(self, checkpoints: Checkpoints, checkpoint: int | None, metadata: dict[str, Any]) -> dict[str, Any]:
        """Returns the state that a checkpoint holds, of parts of any number or of another topology."""
        state: dict[str, Any] = {"learner": self._read_learner(checkpoints, checkpoint)}
        if self._config.checkpoint_replay:
            state["replay"] = self._read_replay(checkpoints, checkpoint)
        return state

    def _read_learner(self, checkpoints: Checkpoints, checkpoint: int | None = None) -> LearnerState:
        like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._shapes)
        state: LearnerState = checkpoints.restore_item("learner", like, checkpoint)
        return state

    def _read_replay(self, checkpoints: Checkpoints, checkpoint: int | None = None) -> SavedReplay:
        """Returns the replay of a checkpoint as these parts would have saved it."""
        saved = saved_replay(checkpoints.restore_item("replay", env_steps=checkpoint))
        crew, agent = self._crew, self._config.agent
        shape = (agent.replay_capacity // crew.num_lanes, crew.num_lanes)
        is_ours = saved.ring.rows.outcome.shape == shape and len(saved.ring.cursor) == crew.num_actors
        if is_ours and not isinstance(saved.leaves, tuple):
            return saved
        return fitting(saved, (*shape, crew.num_actors), agent, self._env.spec.frame_stack, is_prioritised=True)

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
        if self._eval_lanes is not None:
            self._eval_lanes.close()
            self._eval_lanes = None
