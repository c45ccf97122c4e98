"""Greedy episodes that this process plays with given parameters, in lanes that only evaluation uses."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from qfleet.config import ConfigError, RunFailed, TrainConfig
from qfleet.core.agent import Agent
from qfleet.core.exploration import greedy
from qfleet.core.keys import Stream, key_of
from qfleet.core.types import EnvSpec, Params
from qfleet.envs.failures import describe
from qfleet.envs.host import HostEnv, HostLanes, LaneOptions, seed_of
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.evaluation import (
    Episodes,
    InPieces,
    are_over,
    begin_episodes,
    host_greedy_returns,
    play_on,
)
from qfleet.topologies.footprint import evaluation_shapes


class HostEvaluator:
    """Plays greedy episodes of an environment outside the compiled program."""

    def __init__(self, env: HostEnv, agent: Agent, num_lanes: int, options: LaneOptions) -> None:
        """Starts nothing; `start` or the first evaluation makes the lanes."""
        self._env, self._agent, self._num_lanes, self._options = env, agent, num_lanes, options
        self._lanes: HostLanes | None = None
        self._greedy = jax.jit(lambda params, view: greedy(agent.q_values(params, view)))

    def start(self) -> None:
        """Makes the lanes.

        Raises:
          ConfigError: if they can't be made.
        """
        if self._lanes is not None:
            return
        try:
            self._lanes = self._env.make_eval_lanes(self._num_lanes, self._options)
        except (ConfigError, RunFailed):
            raise
        except Exception as error:  # an environment may raise anything
            raise ConfigError(
                f"an environment must be one that can be made several times, because evaluation has lanes of its own "
                f"beside those for training, got {self._env.spec.name}, which failed when evaluation made it: "
                f"{describe(error)}"
            ) from error

    def returns(
        self, params: Params, num_episodes: int, seed: int, check_stop: Callable[[], None] = lambda: None
    ) -> np.ndarray:
        """Returns greedy returns, `[num_episodes]`; fewer if environments fail in too many episodes.

        Args:
          params: the parameters to play with.
          num_episodes: number of episodes to play.
          seed: seed of the lanes.
          check_stop: called before each step; raises an error if the run must stop.
        """
        self.start()
        assert self._lanes is not None

        def act(view: jax.Array) -> jax.Array:
            check_stop()
            return self._greedy(params, view)

        return host_greedy_returns(
            self._lanes,
            self._env.spec,
            act,
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

    def start(self) -> None:
        """Makes the lanes, if there are any.

        Raises:
          ConfigError: if they can't be made.
        """
        if self._host:
            self._host.start()

    def returns(
        self, params: Params, env_steps: int, num_episodes: int, batch: int, check_stop: Callable[[], None]
    ) -> np.ndarray:
        """Returns greedy returns, `[1, num_episodes]`.

        Args:
          params: the parameters to play with.
          env_steps: environment steps of the run so far; other numbers give other episodes.
          num_episodes: number of episodes to play.
          batch: evaluations of the same parameters with different numbers see different episodes.
          check_stop: raises an error if the run must stop.
        """
        numbers = (self._seed, Stream.EVALUATION, env_steps % 2**32, batch)
        if self._host:
            return self._host.returns(params, num_episodes, seed_of(*numbers), check_stop)[None]
        return self._in_graph(num_episodes).returns(params, (key_of(*numbers),), check_stop)[None]

    def shapes(self, num_episodes: int, stored: EnvSpec) -> Any:
        """Returns the shapes of the episodes that it plays at once in a compiled program; empty if it plays in lanes.

        Args: as for `evaluation_shapes`.
        """
        return () if isinstance(self._env, HostEnv) else evaluation_shapes(self._env, stored, num_episodes)

    def close(self) -> None:
        """Ends the lanes; may be called twice."""
        if self._host:
            self._host.close()

    @functools.cache  # noqa: B019, there is one evaluator in a run
    def _in_graph(self, num_episodes: int) -> InPieces:
        env, agent = self._env, self._agent
        assert isinstance(env, InGraphEnv)

        def begin(key: jax.Array) -> Episodes:
            return begin_episodes(env, key, num_episodes, agent.to_storage_layout)

        def play(params: Params, episodes: Episodes, until: jax.Array) -> tuple[Episodes, jax.Array, jax.Array]:
            episodes = play_on(env, agent.q_values, params, episodes, until, agent.to_storage_layout)
            return episodes, episodes.returns, are_over(env, episodes)

        return InPieces(jax.jit(begin), jax.jit(play))
