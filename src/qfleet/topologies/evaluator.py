"""Greedy episodes that this process plays with given parameters, in lanes that only evaluation uses."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from qfleet.config import TrainConfig
from qfleet.core.agent import Agent
from qfleet.core.exploration import greedy
from qfleet.core.keys import Stream, key_of
from qfleet.core.types import EnvSpec, Params
from qfleet.envs.host import HostEnv, HostLanes, LaneOptions, seed_of
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.evaluation import greedy_returns, host_greedy_returns
from qfleet.topologies.footprint import evaluation_shapes


class HostEvaluator:
    """Plays greedy episodes of an environment outside the compiled program."""

    def __init__(self, env: HostEnv, agent: Agent, num_lanes: int, options: LaneOptions) -> None:
        """Starts nothing; the first evaluation makes the lanes."""
        self._env, self._agent, self._num_lanes, self._options = env, agent, num_lanes, options
        self._lanes: HostLanes | None = None
        self._greedy = jax.jit(lambda params, view: greedy(agent.q_values(params, view)))

    def returns(self, params: Params, num_episodes: int, seed: int) -> np.ndarray:
        """Returns greedy returns, `[num_episodes]`; fewer if environments fail in too many episodes."""
        if self._lanes is None:
            self._lanes = self._env.make_eval_lanes(self._num_lanes, self._options)
        return host_greedy_returns(
            self._lanes,
            self._env.spec,
            lambda view: self._greedy(params, view),
            num_episodes,
            seed,
            self._agent.to_storage_layout,
        )

    def close(self) -> None:
        """Ends the lanes; may be called twice."""
        if self._lanes is not None:
            self._lanes.close()
            self._lanes = None


class Evaluator:
    """Plays greedy episodes of either kind of environment."""

    def __init__(self, config: TrainConfig, env: InGraphEnv | HostEnv, agent: Agent) -> None:
        self._seed, self._env, self._agent = config.seed, env, agent
        self._host: HostEvaluator | None = None
        if isinstance(env, HostEnv):
            num_lanes = min(config.topology.num_envs, config.eval_episodes)
            self._host = HostEvaluator(env, agent, num_lanes, config.topology.lane_options)

    def returns(self, params: Params, env_steps: int, num_episodes: int, batch: int) -> np.ndarray:
        """Returns greedy returns, `[1, num_episodes]`.

        Args:
          params: the parameters to play with.
          env_steps: environment steps of the run so far; other numbers give other episodes.
          num_episodes: number of episodes to play.
          batch: evaluations of the same parameters with different numbers see different episodes.
        """
        numbers = (self._seed, Stream.EVALUATION, env_steps % 2**32, batch)
        if self._host:
            return self._host.returns(params, num_episodes, seed_of(*numbers))[None]
        return np.asarray(self._in_graph(params, key_of(*numbers), num_episodes))[None]

    def shapes(self, num_episodes: int, stored: EnvSpec) -> Any:
        """Returns the shapes of the episodes that it plays at once in a compiled program; empty if it plays in lanes.

        Args: as for `evaluation_shapes`.
        """
        return () if isinstance(self._env, HostEnv) else evaluation_shapes(self._env, stored, num_episodes)

    def close(self) -> None:
        """Ends the lanes; may be called twice."""
        if self._host:
            self._host.close()

    @functools.cached_property
    def _in_graph(self) -> Callable[..., jax.Array]:
        env, agent = self._env, self._agent

        def returns(params: Params, key: jax.Array, num_episodes: int) -> jax.Array:
            assert isinstance(env, InGraphEnv)
            return greedy_returns(env, agent.q_values, params, key, num_episodes, agent.to_storage_layout)

        return jax.jit(returns, static_argnums=2)
