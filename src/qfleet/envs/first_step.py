"""The first step in an environment before a run begins: a reset and a step in the kind of lane that will train."""

import contextlib
import dataclasses
import logging

import numpy as np

from qfleet.config.errors import RAISED_BY_USERS, ConfigError
from qfleet.core.masks import random_valid, split_lanes
from qfleet.envs.checked_lanes import checked
from qfleet.envs.failures import TooManyFailures, describe
from qfleet.envs.host import HostEnv, LaneOptions

logger = logging.getLogger("qfleet")


class NeverWorks(ConfigError):
    """An environment fails in its first step, so that nothing can be learned in it."""

    def __init__(self, name: str, error: str) -> None:
        super().__init__(f"environment {name} must work from its first step on, but it failed: {error}")


def check_works(env: HostEnv, options: LaneOptions) -> None:
    """Takes one step in one lane, and warns of what learning ignores or changes.

    An environment that fails later, in the middle of training, is replaced. One that fails here can never be learned
    in, so nothing is tried twice.

    Args:
      env: the environment.
      options: how its lanes are stepped. With workers, the lane is in one, since it may end its process.

    Raises:
      NeverWorks: if the environment fails, or returns something that can't be learned from.
      ConfigError: if it can't be made.
    """
    name = env.spec.name
    one = dataclasses.replace(options, num_env_workers=min(options.num_env_workers, 1), max_failures=0)
    try:
        with contextlib.closing(checked(env).make_lanes(1, one)) as lanes:
            observation = lanes.reset(0)
            lanes.send(random_valid(split_lanes(observation, env.spec)[1], np.zeros(1, np.int32)))
            lanes.recv()
    except ConfigError:
        raise
    except TooManyFailures as error:
        raise NeverWorks(name, error.failure.error) from error
    except RAISED_BY_USERS as error:  # a user's lanes may raise anything
        raise NeverWorks(name, describe(error)) from error
    if _may_be_unscaled(env, observation):
        logger.warning(
            "environment %s returns an image of floats up to %g, which isn't divided by 255, because its space doesn't "
            "say that values end there; declare it as Box(0, 255), or return uint8 or floats up to 1",
            name,
            observation.max(),
        )
    for message in () if env.encoder is None else env.encoder.messages:
        logger.warning("environment %s %s", name, message)
    has_timeout = options.step_timeout_seconds != LaneOptions.step_timeout_seconds
    if env.encoder is not None and has_timeout and not options.num_env_workers:
        logger.warning(
            "step_timeout_seconds=%g has no effect without num_env_workers, because only another process can be "
            "replaced when an environment hangs",
            options.step_timeout_seconds,
        )
    if env.actions is not None and env.actions.message:
        logger.warning("%s", env.actions.message)


def _may_be_unscaled(env: HostEnv, observation: np.ndarray) -> bool:
    """Returns whether an observation looks like an image of bytes, though it is neither uint8 nor bounded as one."""
    spec = env.spec
    if len(spec.observation_shape) != 3 or spec.observation_dtype.kind != "f" or spec.pixel_limit is not None:
        return False
    return bool(16 < observation.max() <= 255 and observation.min() >= 0 and (observation % 1 == 0).all())
