"""Greedy episodes that this process plays with parameters which others have learned."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from qfleet.config import TrainConfig
from qfleet.core.agent import Agent
from qfleet.core.exploration import greedy
from qfleet.core.keys import key_of
from qfleet.core.types import Params
from qfleet.envs.host import HostEnv, HostLanes, seed_of
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.evaluation import greedy_returns, host_greedy_returns

_EVALUATION = 1
"""What a seed's random numbers are for; 0, 2, 3 and 4 are training's."""


class Evaluator:
    """Plays greedy episodes, in lanes of its own."""

    def __init__(self, config: TrainConfig, env: InGraphEnv | HostEnv, agent: Agent) -> None:
        self._config, self._env, self._agent = config, env, agent
        self._lanes: HostLanes | None = None

    def returns(self, params: Params, env_steps: int, num_episodes: int, batch: int) -> np.ndarray:
        """Returns greedy returns, `[1, num_episodes]`.

        Args:
          params: to play with.
          env_steps: of the run by now: at others, other episodes are seen.
          num_episodes: to play.
          batch: evaluations of the same parameters with different numbers see different episodes.
        """
        env, numbers = self._env, (self._config.seed, _EVALUATION, env_steps % 2**32, batch)
        if isinstance(env, InGraphEnv):
            return np.asarray(self._in_graph(params, key_of(*numbers), num_episodes))[None]
        if self._lanes is None:
            num_lanes = min(self._config.topology.num_envs, self._config.eval_episodes)
            self._lanes = env.make_eval_lanes(num_lanes, self._config.topology.lane_options)
        returns = host_greedy_returns(
            self._lanes,
            env.spec,
            lambda view: self._greedy(params, view),
            num_episodes,
            seed_of(*numbers),
            self._agent.to_storage_layout,
        )
        return returns[None]

    def close(self) -> None:
        """Ends the lanes; may be called twice."""
        if self._lanes is not None:
            self._lanes.close()
            self._lanes = None

    @functools.cached_property
    def _greedy(self) -> Callable[..., jax.Array]:
        return jax.jit(lambda params, view: greedy(self._agent.q_values(params, view)))

    @functools.cached_property
    def _in_graph(self) -> Callable[..., jax.Array]:
        env, agent = self._env, self._agent

        def returns(params: Params, key: jax.Array, num_episodes: int) -> jax.Array:
            assert isinstance(env, InGraphEnv)
            return greedy_returns(env, agent.q_values, params, key, num_episodes, agent.to_storage_layout)

        return jax.jit(returns, static_argnums=2)
