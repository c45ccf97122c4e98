"""Episodes that this process plays with given parameters, in lanes that only evaluation uses."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qfleet.config import ConfigError, RunFailed, TrainConfig
from qfleet.config.errors import RAISED_BY_USERS
from qfleet.core.activity import Activity
from qfleet.core.agent import Agent
from qfleet.core.exploration import greedy
from qfleet.core.keys import Stream, make_key
from qfleet.core.memory import MemoryState
from qfleet.core.types import Params
from qfleet.envs.failures import describe
from qfleet.envs.host import HostEnv, HostLanes, LaneOptions, seed_of
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime import peers
from qfleet.runtime.evaluation import Episodes, Pieces, make_evaluation, never
from qfleet.runtime.host_evaluation import HostAction, play_host_episodes
from qfleet.topologies.footprint import evaluation_shapes


class HostEvaluator:
    """Plays episodes of an environment outside the compiled program."""

    def __init__(
        self,
        env: HostEnv,
        agent: Agent,
        num_lanes: int,
        options: LaneOptions,
        exploration: float = 0.0,
        discount: float = 1.0,
    ) -> None:
        """Starts nothing; `start` or the first evaluation makes the lanes.

        Args:
          env: environment to play.
          agent: whose values choose the actions.
          num_lanes: number of lanes.
          options: how they are stepped.
          exploration: probability of a uniformly random action.
          discount: of the discounted returns.
        """
        self._env, self._agent, self._num_lanes, self._options = env, agent, num_lanes, options
        self._exploration, self._discount = exploration, discount
        self._lanes: HostLanes | None = None
        self._act = jax.jit(self._choose)
        self._no_activity: Activity | None = None

    def start(self) -> HostLanes:
        """Makes the lanes, unless they are there, and returns them.

        Raises:
          ConfigError: if they can't be made.
        """
        if self._lanes is not None:
            return self._lanes
        try:
            self._lanes = self._env.make_eval_lanes(self._num_lanes, self._options)
        except (ConfigError, RunFailed):
            raise
        except RAISED_BY_USERS as error:
            raise ConfigError(
                f"an environment must be one that can be made several times, because evaluation has lanes of its own "
                f"beside those for training, got {self._env.spec.name}, which failed when evaluation made it: "
                f"{describe(error)}"
            ) from error
        return self._lanes

    def play(
        self,
        params: Params,
        num_episodes: int,
        seed: int,
        *,
        max_episode_steps: int | None = None,
        should_stop: Callable[[], bool] = never,
    ) -> Episodes | None:
        """Returns `num_episodes` episodes, or fewer if environments fail in too many; None if it was stopped.

        Args:
          params: the parameters to play with.
          num_episodes: number of episodes to play.
          seed: seed of the episodes.
          max_episode_steps, should_stop: as for `Topology.evaluate`.
        """
        return play_host_episodes(
            self.start(),
            self._env.spec,
            self._agent.player,
            self._acting_with(params),
            num_episodes,
            seed,
            exploration=self._exploration,
            max_episode_steps=max_episode_steps,
            should_stop=should_stop,
            discount=self._discount,
        )

    def _acting_with(self, params: Params) -> Callable[[MemoryState], HostAction]:
        """Returns the function that acts with these parameters, and adds up the activity of the hidden units."""
        activity = self._no_activity

        def act(memory: MemoryState) -> HostAction:
            nonlocal activity
            if activity is None:
                _, _, shapes = jax.eval_shape(self._agent.player.values, params, memory)
                activity = self._no_activity = tuple(jnp.zeros(layer.shape[1:]) for layer in shapes)
            chosen: HostAction = self._act(params, memory, activity)
            activity = chosen.activity
            return chosen

        return act

    def _choose(self, params: Params, memory: MemoryState, activity: Activity) -> HostAction:
        q, memory, active = self._agent.player.values(params, memory)
        sums = tuple(so_far + jnp.sum(layer, axis=0) for so_far, layer in zip(activity, active, strict=True))
        return HostAction(greedy(q), jnp.max(q, axis=-1), memory, sums)

    def close(self) -> None:
        """Ends the lanes; may be called twice."""
        if self._lanes is not None:
            self._lanes.close()
            self._lanes = None


def gather_episodes(own: Episodes | None, num_own: int) -> Episodes | None:
    """Returns the episodes of all processes, or None if any process was stopped. All processes call it together.

    Args:
      own: at most `num_own` episodes that this process has played; None if it was stopped.
      num_own: number of episodes that each process was asked for.
    """
    if jax.process_count() == 1:
        return own
    if peers.any_of(own is None)[0] or own is None:
        return None
    missing = num_own - len(own.returns)
    is_there = peers.gather(np.arange(num_own) < len(own.returns))
    return jax.tree.map(lambda part: peers.gather(np.pad(part, (0, missing)))[is_there], own)


class Evaluator:
    """Plays episodes of either kind of environment."""

    def __init__(self, config: TrainConfig, env: InGraphEnv | HostEnv, agent: Agent) -> None:
        self._config, self._env, self._agent = config, env, agent
        self._pieces = Pieces()
        self._in_graph = functools.cache(self._make_in_graph)  # the compiled programs live as long as the evaluator
        self._host: HostEvaluator | None = None
        if isinstance(env, HostEnv):
            num_lanes = min(config.topology.num_envs, config.eval_episodes)
            self._host = HostEvaluator(
                env, agent, num_lanes, config.topology.lane_options, config.eval_exploration, config.agent.discount
            )

    def start(self) -> None:
        """Makes the lanes, if the environment isn't written in JAX."""
        if self._host:
            self._host.start()

    def play(
        self,
        params: Params,
        env_steps: int,
        num_episodes: int,
        batch: int,
        *,
        max_episode_steps: int | None = None,
        should_stop: Callable[[], bool] = never,
    ) -> Episodes | None:
        """Returns episodes, `[1, num_episodes]`; None if it was stopped.

        Args:
          params: the parameters to play with.
          env_steps: environment steps of the run so far; other numbers give other episodes.
          num_episodes: number of episodes to play.
          batch: evaluations of the same parameters with different numbers see different episodes.
          max_episode_steps, should_stop: as for `Topology.evaluate`.
        """
        numbers = (self._config.seed, Stream.EVALUATION, env_steps % 2**32, batch)
        if self._host:
            played = self._host.play(
                params,
                num_episodes,
                seed_of(*numbers),
                max_episode_steps=max_episode_steps,
                should_stop=should_stop,
            )
        else:
            begin, play = self._in_graph(num_episodes)
            key, first = make_key(*numbers), np.uint32(0)
            played = self._pieces.play(
                lambda: begin(key, first),
                lambda *further: play(params, key, first, *further),
                self._env.spec,
                max_episode_steps,
                should_stop,
            )
        return jax.tree.map(lambda part: part[None], played)

    def shapes(self, num_episodes: int) -> Any:
        """Returns the shapes of the episodes that it plays at once in a compiled program; empty if it plays in lanes.

        Args: as for `evaluation_shapes`.
        """
        if isinstance(self._env, HostEnv):
            return ()
        return evaluation_shapes(self._env, self._agent.player, num_episodes)

    def close(self) -> None:
        """Ends the lanes; may be called twice."""
        if self._host:
            self._host.close()

    def _make_in_graph(self, num_episodes: int) -> tuple[Callable, Callable]:
        assert isinstance(self._env, InGraphEnv)
        agent, exploration = self._agent, self._config.eval_exploration
        evaluation = make_evaluation(
            self._env,
            agent.player,
            num_episodes,
            exploration,
            discount=self._config.agent.discount,
        )
        return jax.jit(evaluation.begin), jax.jit(evaluation.play)
