"""Whole episodes of a trained policy, in whichever kind of environment it has."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from qfleet.core.exploration import greedy
from qfleet.core.keys import Stream, make_key
from qfleet.core.memory import MemoryState
from qfleet.core.player import Player
from qfleet.core.types import Params
from qfleet.envs.host import HostEnv, LaneOptions, seed_of
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.evaluation import Episodes, EvaluationOptions, Pieces, join_episodes, make_evaluation
from qfleet.runtime.host_evaluation import MAX_LOST, HostAction, play_host_episodes

EVAL_LANES = 8
"""Least number of lanes for the evaluation of an environment that is not written in JAX."""

MAX_TOGETHER = 1024
"""Most episodes that the compiled program plays at once; more of them are played in turn, with the same results."""


class WholeEpisodes:
    """Plays episodes with one network. The programs that it compiles live as long as this object."""

    def __init__(self, player: Player) -> None:
        """Takes the network's player, whose `values` is compiled."""
        self._player = player
        self._programs: dict[tuple[int, float], tuple[Callable, Callable]] = {}  # by number of episodes and exploration

    def play(
        self, env: InGraphEnv | HostEnv, params: Params, num_episodes: int, seed: int, options: EvaluationOptions
    ) -> Episodes:
        """Returns episodes of one environment, which must be the same one at each call.

        Raises:
          RunFailed: if the environment fails more than `MAX_LOST` times per episode that is asked for.
        """
        if isinstance(env, HostEnv):
            return self._play_host(env, params, num_episodes, seed, options)
        return self._play_in_graph(env, params, num_episodes, seed, options)

    def _play_host(
        self, env: HostEnv, params: Params, num_episodes: int, seed: int, options: EvaluationOptions
    ) -> Episodes:
        def choose(memory: MemoryState) -> HostAction:
            q, memory, _ = self._player.values(params, memory)
            return HostAction(greedy(q), q.max(axis=-1), memory)

        num_lanes = min(num_episodes, max(EVAL_LANES, options.num_env_workers))
        lane_options = LaneOptions(
            max_failures=MAX_LOST * num_episodes,
            num_env_workers=min(options.num_env_workers, num_lanes),
            step_timeout_seconds=options.step_timeout_seconds,
        )
        lanes = env.make_eval_lanes(num_lanes, lane_options)
        try:
            episodes = play_host_episodes(
                lanes,
                env.spec,
                self._player,
                choose,
                num_episodes,
                seed_of(seed, Stream.POLICY),
                exploration=options.exploration,
                max_episode_steps=options.max_episode_steps,
            )
        finally:
            lanes.close()
        assert episodes is not None  # nobody asks it to stop
        return episodes

    def _play_in_graph(
        self, env: InGraphEnv, params: Params, num_episodes: int, seed: int, options: EvaluationOptions
    ) -> Episodes:
        num_together = min(num_episodes, MAX_TOGETHER)
        setting = (num_together, options.exploration)
        if setting not in self._programs:
            evaluation = make_evaluation(env, self._player, *setting)
            self._programs[setting] = jax.jit(evaluation.begin), jax.jit(evaluation.play)
        begin, play = self._programs[setting]
        key, pieces, batches = make_key(seed, Stream.POLICY), Pieces(), []
        for number in range(0, num_episodes, num_together):
            first = np.uint32(number)
            batch = pieces.play(
                functools.partial(begin, key, first),
                functools.partial(play, params, key, first),
                env.spec,
                options.max_episode_steps,
            )
            assert batch is not None  # nobody asks it to stop
            batches.append(batch)
        return join_episodes(batches, num_episodes)
