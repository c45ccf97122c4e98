"""What a run has learned, ready to act."""

import jax
import numpy as np

from qfleet.core.exploration import greedy
from qfleet.core.types import EnvSpec, Network, Params
from qfleet.envs.host import HostEnv, LaneOptions
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.evaluation import greedy_returns, host_greedy_returns

EVAL_LANES = 8
"""Lanes that environments outside the compiled program are evaluated in."""


class Policy:
    """Greedy actions of one Q-network: `policy(obs)`."""

    def __init__(self, env: InGraphEnv | HostEnv, network: Network, params: Params) -> None:
        self.params = params
        """The network's parameters, a tree of arrays."""
        self.spec: EnvSpec = env.spec
        """Of the environment it was trained in."""
        self._env = env
        self._network = network
        self._q_values = jax.jit(network.apply)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Returns greedy actions, `[batch]` int32, for observations `[batch, *agent_observation_shape]`."""
        return np.asarray(self._greedy(jax.numpy.asarray(obs)))

    def q_values(self, obs: np.ndarray) -> np.ndarray:
        """Returns `[batch, num_actions]` float32 in units of discounted reward, for a batch of observations."""
        return np.asarray(self._q_values(self.params, obs))

    def evaluate(self, num_episodes: int = 100, seed: int = 0) -> np.ndarray:
        """Returns the undiscounted returns of greedy episodes in its environment, `[num_episodes]` float32."""
        env = self._env
        if isinstance(env, HostEnv):
            lanes = env.make_eval_lanes(min(num_episodes, EVAL_LANES), LaneOptions())
            try:
                return host_greedy_returns(lanes, env.spec, self._greedy, num_episodes, seed)
            finally:
                lanes.close()
        run = jax.jit(lambda params, key: greedy_returns(env, self._network.apply, params, key, num_episodes))
        return np.asarray(run(self.params, jax.random.key(seed)))

    def _greedy(self, obs: jax.Array) -> jax.Array:
        return greedy(self._q_values(self.params, obs))
