"""A first look at an environment before a run begins: one reset and one step, in the kind of lane that will train."""

import contextlib
import dataclasses
import logging

import numpy as np

from qfleet.config.errors import ConfigError
from qfleet.envs.failures import TooManyFailures, describe
from qfleet.envs.host import HostEnv, LaneOptions

logger = logging.getLogger("qfleet")


def check_works(env: HostEnv, options: LaneOptions) -> None:
    """Takes one step in one lane, and warns of what learning ignores or changes.

    An environment that fails later, in the middle of training, is replaced. One that fails here can never be learned
    in, so nothing is tried twice.

    Args:
      env: the environment.
      options: how its lanes are stepped. With workers, the lane is in one, since it may end its process.

    Raises:
      ConfigError: if the environment can't be made, fails, or returns something that can't be learned from.
    """
    name = env.spec.name
    one = dataclasses.replace(options, num_env_workers=min(options.num_env_workers, 1), max_failures=0)
    try:
        with contextlib.closing(env.make_lanes(1, one)) as lanes:
            observation = lanes.reset(0)
            lanes.send(np.zeros(1, np.int32))
            step = lanes.recv()
            has_action_mask = getattr(lanes, "has_action_mask", False)
    except ConfigError:
        raise
    except TooManyFailures as error:
        raise ConfigError(_refusal(name, error.failure.error)) from error
    except Exception as error:  # a user's lanes may raise anything
        raise ConfigError(_refusal(name, describe(error))) from error
    for what, array in (("reset", observation), ("recv", step.observation)):
        got = f"{array.dtype}{list(array.shape)}"
        if got != (wanted := f"{env.spec.observation_dtype}{[1, *env.spec.observation_shape]}"):
            raise ConfigError(_refusal(name, f"{what} of its lanes must return observations {wanted}, got {got}"))
    if has_action_mask:
        logger.warning(
            "environment %s returns an action mask in info, which is ignored: the agent may choose any action", name
        )
    if env.actions is not None and env.actions.message:
        logger.warning("%s", env.actions.message)


def _refusal(name: str, error: str) -> str:
    return f"environment {name} must work from its first step on, but it failed: {error}"
