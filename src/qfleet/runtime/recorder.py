"""Videos while a run trains: now and then the newest parameters play one greedy episode. Extra `video`."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from qfleet.config import TrainConfig
from qfleet.core.types import Network, Params
from qfleet.envs.failures import describe
from qfleet.envs.host import HostEnv
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.episodes import Moment, check_can_play, play
from qfleet.runtime.video import check_extra, film, params_label, video_name

logger = logging.getLogger("qfleet")

SEED = 0
"""Of every video's episode, as of `qfleet watch`: those of one run begin alike."""

FRAMES_PER_SECOND = 30


class Recorder:
    """Films at the first evaluation after every `video_period_env_steps`; a video that fails costs only itself.

    Environments are made for each video and closed after it. Nothing of theirs, and no random number, is training's.
    """

    def __init__(self, config: TrainConfig, env: InGraphEnv | HostEnv, network: Network) -> None:
        """Sees whether there can be videos at all, by drawing one picture.

        Raises:
          ConfigError: if PyAV or Pillow is missing, or there is no way to draw the environment.
        """
        assert config.video_period_env_steps is not None
        check_extra()
        check_can_play(env)
        self._period = config.video_period_env_steps
        self._trained_seed = config.seed if config.num_seeds > 1 else None  # the first of many
        self._env = env
        self._q_values, self._store = jax.jit(network.apply), network.to_storage_layout
        self.num_videos = 0
        """Written so far."""
        self.num_failures = 0
        """Videos that failed."""
        self._told: str | None = None  # the newest failure

    def is_due(self, env_steps: int, evaluated_at: int) -> bool:
        """Returns whether an evaluation is to be filmed, by its environment steps and those of the one before."""
        return env_steps // self._period > evaluated_at // self._period

    def record(self, params: Params, env_steps: int, folder: Path, should_stop: Callable[[], bool]) -> None:
        """Writes a video with the parameters of `env_steps`, of the first seed if there are many.

        If it fails, that is logged, but for what was logged last, and counted.

        Args:
          params: as the topology has them, with many seeds with a leading axis.
          folder: for the files, made if absent.
          should_stop: asked before every frame; once it says so the video is given up, and nothing is left of it.
        """
        if self._trained_seed is not None:
            params = jax.tree.map(lambda x: x[0], params)
        path = folder / video_name(params_label(env_steps, self._trained_seed), SEED, episode=0)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            q_values = functools.partial(self._q_values, params)
            with contextlib.closing(play(self._env, q_values, 1, SEED, self._store)) as episodes:
                film(_until(should_stop, next(episodes)), path, FRAMES_PER_SECOND)
        except _GivenUp:
            pass
        except Exception as error:  # whatever a renderer raises must not cost what was learned
            self._fail(env_steps, describe(error))
        else:
            self.num_videos += 1

    def _fail(self, env_steps: int, error: str) -> None:
        self.num_failures += 1
        if error != self._told:
            logger.warning("the video of environment step %d failed, the run goes on: %s", env_steps, error)
        self._told = error


class _GivenUp(Exception):
    """The run is to stop: a person is waiting."""


def _until(should_stop: Callable[[], bool], moments: Iterator[Moment]) -> Iterator[Moment]:
    for moment in moments:
        if should_stop():
            raise _GivenUp
        yield moment
