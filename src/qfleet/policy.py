"""The policy that a run has learned, ready to act."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from qfleet.config import ConfigError
from qfleet.config.checks import MAX_EPISODES, MAX_SEED, check_count
from qfleet.core.exploration import greedy
from qfleet.core.frame_stack import stack_to_storage_layout
from qfleet.core.keys import Stream, key_of
from qfleet.core.types import EnvSpec, Network, Params
from qfleet.envs.host import HostEnv, LaneOptions, seed_of
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.devices import check_not_forked
from qfleet.runtime.episodes import play
from qfleet.runtime.evaluation import MAX_LOST, greedy_returns, host_greedy_returns
from qfleet.runtime.video import Video, check_extra, film, video_name

EVAL_LANES = 8
"""Number of lanes for the evaluation of an environment that is not written in JAX."""


class Policy:
    """The greedy policy of one Q-network: `policy(obs)` returns actions."""

    def __init__(self, env: InGraphEnv | HostEnv, network: Network, params: Params, label: str) -> None:
        self.params = params
        """Parameters of the network, a tree of arrays."""
        self.spec: EnvSpec = env.spec
        """Spec of the environment it was trained in."""
        self.label = label
        """Name among the policies of its run: the checkpoint, and the seed if the run trained many."""
        self._env = env
        self._network = network
        self._apply_network = jax.jit(network.apply)
        self._to_view = jax.jit(
            lambda obs: stack_to_storage_layout(network.to_storage_layout, obs, env.spec.frame_stack)
        )

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Returns greedy actions, `[batch]` int32, for observations `[batch, *agent_observation_shape]`."""
        check_not_forked()
        return np.asarray(self._greedy(self._to_view(obs)))

    def q_values(self, obs: np.ndarray) -> np.ndarray:
        """Returns Q-values, `[batch, num_actions]` float32 in units of discounted reward.

        Args:
          obs: observations, `[batch, *agent_observation_shape]`.
        """
        check_not_forked()
        return np.asarray(self._apply_network(self.params, self._to_view(obs)))

    def evaluate(self, num_episodes: int = 100, seed: int = 0) -> np.ndarray:
        """Returns the undiscounted returns of greedy episodes in its environment, `[num_episodes]` float32.

        Raises:
          ConfigError: if a number is out of bounds.
          RunFailed: if the environment fails more than `MAX_LOST` times per episode that is asked for.
        """
        check_not_forked()
        check_count("num_episodes", num_episodes, maximum=MAX_EPISODES)
        check_count("seed", seed, minimum=0, maximum=MAX_SEED)
        env = self._env
        if isinstance(env, HostEnv):
            lanes = env.make_eval_lanes(
                min(num_episodes, EVAL_LANES), LaneOptions(max_failures=MAX_LOST * num_episodes)
            )
            try:
                lanes_seed = seed_of(seed, Stream.POLICY)
                return host_greedy_returns(
                    lanes, env.spec, self._greedy, num_episodes, lanes_seed, self._network.to_storage_layout
                )
            finally:
                lanes.close()
        apply, to_storage_layout = self._network.apply, self._network.to_storage_layout
        run = jax.jit(lambda params, key: greedy_returns(env, apply, params, key, num_episodes, to_storage_layout))
        return np.asarray(run(self.params, key_of(seed, Stream.POLICY)))

    def film(
        self, out_dir: str | os.PathLike[str], num_episodes: int = 1, seed: int = 0, frames_per_second: int = 30
    ) -> Iterator[Video]:
        """Yields the videos of greedy episodes in its environment, each as soon as it is written.

        Below the picture they show the step, the return so far and the Q-value of every action; the greedy action is
        marked. In an environment written in JAX, the episodes begin like those of `evaluate` with the same arguments.

        Args:
          out_dir: folder for `<label>-seed<seed>-episode<i>.mp4` and `.gif`. It is made if absent.
          num_episodes: number of episodes, each at most 27,000 steps long.
          seed: seed of these episodes.
          frames_per_second: frame rate of the mp4, where each step is one frame.

        Raises:
          ConfigError: if PyAV or Pillow is missing, there is no way to draw the environment, or an argument is wrong.
          RunFailed: if the environment fails.
        """
        _check_at_least(1, num_episodes=num_episodes, frames_per_second=frames_per_second)
        _check_at_least(0, seed=seed)
        check_extra()
        check_not_forked()
        q_values = functools.partial(self._apply_network, self.params)
        episodes = play(self._env, q_values, num_episodes, seed, self._network.to_storage_layout)
        with contextlib.closing(episodes):  # this also closes the lanes that draw, even if the caller stops early
            for i, moments in enumerate(episodes):
                name = video_name(self.label, seed, i)
                yield film(moments, _make_folder(Path(out_dir)) / name, frames_per_second)

    def _greedy(self, view: jax.Array) -> jax.Array:
        return greedy(self._apply_network(self.params, view))


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")


def _make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"videos need a folder that can be made, got {path} ({error.strerror}); give another"
        ) from error
    return path
