"""Videos during training: from time to time the newest parameters play one greedy episode. Extra `video`."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from qfleet.config import TrainConfig
from qfleet.config.errors import RAISED_BY_USERS
from qfleet.core.player import make_player
from qfleet.core.types import Network, Params
from qfleet.envs.failures import describe
from qfleet.envs.host import HostEnv
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.episodes import Moment, check_can_play, play
from qfleet.runtime.video import check_extra, film, params_label, video_name

logger = logging.getLogger("qfleet")

SEED = 0
"""Seed of the episode in every video, as in `qfleet watch`. So all videos of a run begin alike."""

FRAMES_PER_SECOND = 30


class Recorder:
    """Films an episode at the first evaluation after every `video_period_env_steps`.

    Each video has its own environment, which is closed afterwards. Videos share neither environments nor random numbers
    with training, and a video that fails doesn't stop it.
    """

    def __init__(self, config: TrainConfig, env: InGraphEnv | HostEnv, network: Network) -> None:
        """Checks that videos are possible, by drawing one picture.

        Raises:
          ConfigError: if PyAV or Pillow is missing, or there is no way to draw the environment.
        """
        assert config.video_period_env_steps is not None
        check_extra()
        check_can_play(env)
        self._period = config.video_period_env_steps
        self._trained_seed = config.seed if config.num_seeds > 1 else None  # the first seed, if there are many
        self._env = env
        player = make_player(network, env.spec.frame_stack)
        self._player = player._replace(values=jax.jit(player.values))
        self.num_videos = 0
        """Number of videos written so far."""
        self.num_failures = 0
        """Number of videos that failed so far."""
        self._logged: str | None = None  # the last failure that was logged

    def is_due(self, env_steps: int, evaluated_at: int) -> bool:
        """Returns whether to film at an evaluation.

        Args:
          env_steps: environment steps at this evaluation.
          evaluated_at: environment steps at the previous evaluation.
        """
        return env_steps // self._period > evaluated_at // self._period

    def record(self, params: Params, env_steps: int, folder: Path, should_stop: Callable[[], bool]) -> None:
        """Writes a video of the parameters, those of the first seed if there are many.

        A failure is counted. It is also logged, unless the previous one had the same message.

        Args:
          params: parameters as the topology has them: with a leading axis of seeds if the run trains many.
          env_steps: environment steps at which they were learned.
          folder: folder for the files. It is made if absent.
          should_stop: called before every frame. Once it returns True the video is abandoned and leaves no file.
        """
        if self._trained_seed is not None:
            params = jax.tree.map(lambda x: x[0], params)
        path = folder / video_name(params_label(env_steps, self._trained_seed), SEED, episode=0)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(play(self._env, self._player, params, 1, SEED)) as episodes:
                film(_until(should_stop, next(episodes)), path, FRAMES_PER_SECOND)
        except _Abandoned:
            pass
        except RAISED_BY_USERS as error:  # a renderer may raise anything, and that must not end the training run
            self._fail(env_steps, describe(error))
        else:
            self.num_videos += 1

    def _fail(self, env_steps: int, error: str) -> None:
        self.num_failures += 1
        if error != self._logged:
            logger.warning("the video of environment step %d failed, the run continues: %s", env_steps, error)
        self._logged = error


class _Abandoned(Exception):
    """The run must stop now, because a person is waiting for it."""


def _until(should_stop: Callable[[], bool], moments: Iterator[Moment]) -> Iterator[Moment]:
    """Yields the moments until `should_stop` returns True, then raises `_Abandoned`."""
    for moment in moments:
        if should_stop():
            raise _Abandoned
        yield moment
