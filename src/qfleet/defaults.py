"""The choice of a preset and its settings for an environment, when the user names no preset.

The environment's family decides: what it shows (pixels, a smaller image, one of a number of states, or numbers), and
whether it is written in JAX. Settings are tuned for whole families rather than for single environments.
"""

import contextlib
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qfleet.config import TOPOLOGIES, AgentConfig, ConfigError
from qfleet.config.errors import RAISED_BY_USERS
from qfleet.config.lane_options import num_cores
from qfleet.envs.names import is_of_suite
from qfleet.envs.registry import make_env

if TYPE_CHECKING:
    from qfleet.core.types import EnvSpec
    from qfleet.envs.host import HostEnv, HostLanes
    from qfleet.envs.spec import InGraphEnv

RANDOM_PLAY_STEPS = 300
"""Random steps that show how an environment outside JAX pays."""

RANDOM_PLAY_SECONDS = 1.0
"""Time after which random play ends, because the environment is slow."""


PIXEL_BYTES = 8 * 10**9
"""What a replay of pixels may take. A million frames of Atari fit."""

MAX_SMALL_SIDE = 16
"""Pixels of the longest side of a small image."""

STATE_BYTES = 10**8
"""What a replay of one-hot states may take. A million steps of 100 states fit."""


class Choice(NamedTuple):
    """A preset, settings that replace some of its own, and why they were chosen."""

    preset: str
    settings: Mapping[str, Any]
    reason: str


class Family(NamedTuple):
    """A preset and settings for all environments of a kind."""

    reason: str
    """What these environments have in common."""
    preset: str
    settings: Mapping[str, Any]
    with_replay: tuple[str, Mapping[str, Any]] | None = None
    """Another preset and its settings, for topologies that need a replay, if `preset` has none."""


_VECTORS: Mapping[str, Any] = {
    "num_envs": 16,
    "layer_norm": True,
    "batch_size": 64,
    "replay_capacity": 200_000,
    "env_steps_per_learner_step": 4.0,
    "learning_rate": 5e-4,
    "exploration_env_steps": 100_000,
    "env_steps": 1_000_000,
    "eval_period_env_steps": 25_000,
}

_STATES: Mapping[str, Any] = {
    # Without hidden layers, the network is a table. Steps are small, so that it averages over random outcomes. Old
    # steps are as good as new ones for a table, so the replay keeps all of them if it can, and exploration goes on.
    "discount": 0.995,
    "hidden_sizes": (),
    "learning_rate": 1e-3,
    "learning_rate_schedule": "linear",
    "learning_rate_learner_steps": None,
    "num_envs": 16,
    "batch_size": 128,
    "env_steps_per_learner_step": 4.0,
    "target_update_period": 200,
    "exploration_end": 0.2,
    "exploration_env_steps": 300_000,
    "env_steps": 1_000_000,
    "eval_period_env_steps": 25_000,
}

_SMALL_IMAGES: Mapping[str, Any] = {
    # Gallici et al. 2024 for MinAtar, with half of their environment steps.
    "torso": "minatar",
    "hidden_sizes": (128,),
    "num_envs": 128,
    "rollout_length": 32,
    "num_minibatches": 32,
    "learning_rate": 5e-4,
    "learning_rate_schedule": "linear",
    "learning_rate_learner_steps": None,
    "exploration_env_steps": 500_000,
    "env_steps": 5_000_000,
    "eval_period_env_steps": 250_000,
}

_MEDIUM_IMAGES: Mapping[str, Any] = {
    # The dense layers after MinAtar's convolution would have thirty times as many weights as in a small image.
    **_SMALL_IMAGES,
    "torso": "mlp",
    "hidden_sizes": (128, 128),
    "learning_rate": 1e-3,
    "exploration_env_steps": 800_000,
    "env_steps": 8_000_000,
    "eval_period_env_steps": 400_000,
}

_SMALL_IMAGES_REPLAYED: Mapping[str, Any] = {
    **_VECTORS,
    "torso": "mlp",
    "n_step": 3,
    "batch_size": 128,
    "env_steps_per_learner_step": 8.0,
    "exploration_env_steps": 200_000,
    "env_steps": 2_000_000,
}

FAMILIES: dict[str, Family] = {
    "pixels": Family("the environment shows pixels", "atari_dqn", {}),
    "small images": Family(
        "the environment shows small images", "pqn", _SMALL_IMAGES, ("double_dqn", _SMALL_IMAGES_REPLAYED)
    ),
    "medium images": Family(
        "the environment shows images of medium size", "pqn", _MEDIUM_IMAGES, ("double_dqn", _SMALL_IMAGES_REPLAYED)
    ),
    "states": Family("the environment shows which of its states it is in", "double_dqn", _STATES),
    "vectors": Family("the environment shows vectors of numbers", "rainbow_lite", _VECTORS),
}
"""Preset and settings by kind of environment. Except for pixels, a run takes about five minutes on two cores."""

SEEN: dict[str, tuple[str, Mapping[str, Any]]] = {
    "no signal": (
        "random play pays the same at every step",
        {"exploration_env_steps": 300_000, "n_step": 5},
    ),
    "slow": (
        "it is slow",
        {
            "num_envs": 4,
            "replay_capacity": 50_000,
            "env_steps_per_learner_step": 1.0,
            "target_update_period": 200,
            "exploration_env_steps": 4_000,
            "env_steps": 20_000,
            "eval_period_env_steps": 2_000,
            "eval_episodes": 10,
        },
    ),
}
"""What a short random play has shown of an environment with vectors: how to say it, and further settings."""


def choose(
    env_name: str,
    topology: str,
    env_options: Mapping[str, Any],
    *,
    may_play: bool = True,
    may_start_processes: bool = False,
) -> Choice:
    """Returns the preset and the settings for an environment and a topology, and the reason for them.

    It makes the environment to read its spec. One outside JAX is then played for a moment, with random actions from a
    fixed seed. Environments of suites in JAX are not made, because importing a suite starts JAX, whose devices can't be
    divided afterwards. Their names tell their family.

    An environment that can't be made is taken for one that shows vectors, and the run itself reports the error.

    Args:
      env_name: name of the environment.
      topology: name of the topology.
      env_options: arguments of the function that makes the environment.
      may_play: whether the environment may be stepped in this process.
      may_start_processes: whether worker processes may step a slow environment. Each of them imports the main module
        again, and a script may train there without `if __name__ == "__main__"`.
    """
    if is_of_suite(env_name):
        return _choice(FAMILIES[_family_in_suites(env_name)], topology)
    try:
        env = make_env(env_name, **env_options)
    except RAISED_BY_USERS:  # a user's function may raise anything, and the run calls it again
        return _choice(FAMILIES["vectors"]._replace(reason="nothing is known of the environment"), topology)
    name = family_of(env.spec)
    if name == "states" and may_play and not shows_one_state(env):
        name = "vectors"
    family = FAMILIES[name]
    if name == "pixels":
        greedy = {} if is_atari(env_name) else {"eval_exploration": 0.0}  # Atari's games begin in few ways
        family = family._replace(settings=_sizes_of_replay(env.spec, PIXEL_BYTES, warmup_env_steps=50_000) | greedy)
    if name == "states":
        sizes = _sizes_of_replay(env.spec, STATE_BYTES, warmup_env_steps=1_000)
        family = family._replace(settings={**family.settings, **sizes})
    if name == "vectors" and may_play and (seen := seen_in_random_play(env)):
        what, settings = SEEN[seen]
        family = family._replace(reason=f"{family.reason}, and {what}", settings={**family.settings, **settings})
        is_alone = TOPOLOGIES[topology].runs_in == "this process"
        if seen == "slow" and may_start_processes and is_alone and works_in_another_process(env):
            num_env_workers = min(num_cores(), settings["num_envs"])
            family = family._replace(settings={**family.settings, "num_env_workers": num_env_workers})
    return _choice(family, topology)


def adapted(settings: Mapping[str, Any], env_steps: int | None, num_envs: int | None) -> dict[str, Any]:
    """Returns chosen settings for a run of `env_steps` environment steps and `num_envs` lanes.

    Where these are None, the settings' own hold. A shorter run warms up for a tenth of it at most, and epsilon decays
    for two fifths of it at most. There are no more worker processes than lanes.
    """
    settings = dict(settings)
    if num_envs is not None and "num_env_workers" in settings:
        settings["num_env_workers"] = max(0, min(settings["num_env_workers"], num_envs))
    if env_steps is None or env_steps < 1:  # which is refused later
        return settings
    longest = {"warmup_env_steps": env_steps // 10, "exploration_env_steps": max(1, env_steps * 2 // 5)}
    defaults = vars(AgentConfig())
    return {**settings, **{name: min(settings.get(name, defaults[name]), most) for name, most in longest.items()}}


def _family_in_suites(env_name: str) -> str:
    """Returns the name of the family of an environment of a suite in JAX."""
    if env_name.startswith("octax:"):
        return "medium images"
    is_small_image = env_name.endswith("-MinAtar") or env_name.startswith(("pgx:minatar-", "xminigrid:"))
    return "small images" if is_small_image else "vectors"


def family_of(spec: "EnvSpec") -> str:
    """Returns the name of an environment's family, one of `FAMILIES`, by the shape and type of its observations."""
    from qfleet.networks.torsos import choose_torso, image_shape

    try:
        torso = choose_torso(spec, "auto")
    except ConfigError:
        return "vectors"  # the run reports what is wrong with them
    if torso == "nature":
        return "pixels"
    if torso != "mlp" and (image := image_shape(spec)):
        return "small images" if max(image[:2]) <= MAX_SMALL_SIDE else "medium images"
    is_state = len(spec.agent_observation_shape) == 1 and spec.observation_dtype == np.bool_
    return "states" if is_state else "vectors"


def is_atari(env_name: str) -> bool:
    """Returns whether a name stands for an Atari game, with pixels as Mnih et al. 2015 prepare them."""
    if not env_name.startswith("envpool:"):
        return env_name.startswith("ale:")
    try:
        spec = make_env(env_name).spec
    except ConfigError:
        return False  # the run reports what is missing
    return family_of(spec) == "pixels" and spec.frame_stack > 1


def accepts(topology: str, *, replay: str) -> bool:
    """Returns whether a topology can train an agent with this kind of replay."""
    try:
        TOPOLOGIES[topology]().check_agent(AgentConfig(replay=replay))  # type: ignore[arg-type]
    except ConfigError:
        return False
    return True


def shows_one_state(env: "InGraphEnv | HostEnv") -> bool:
    """Returns whether the first observation of an environment outside JAX is one-hot, so that a table can hold values.

    Observations of several parts, such as Blackjack's, are flags too, but with one for each part.
    """
    from qfleet.core.masks import split_lanes
    from qfleet.envs.host import HostEnv, LaneOptions

    if not isinstance(env, HostEnv):
        return False
    try:
        with contextlib.closing(env.make_lanes(1, LaneOptions(max_failures=0))) as lanes:
            return int(np.sum(split_lanes(lanes.reset(0), env.spec)[0])) == 1
    except RAISED_BY_USERS:  # a user's environment may raise anything, and the run steps it again
        return False


def seen_in_random_play(env: "InGraphEnv | HostEnv") -> str | None:
    """Plays an environment outside JAX for a moment, and returns what is remarkable: a key of `SEEN`, or None.

    The actions are random, from a fixed seed. "no signal": all steps pay the same and none terminates an episode, so no
    action seems better than another. "slow": the steps take more than `RANDOM_PLAY_SECONDS`. Environments in JAX aren't
    played, because they would have to be compiled. One that fails is left to the run, which reports it.
    """
    from qfleet.envs.host import HostEnv, LaneOptions

    if not isinstance(env, HostEnv):
        return None
    try:
        with contextlib.closing(env.make_lanes(1, LaneOptions(max_failures=0))) as lanes:
            return _play(lanes, env.spec)
    except RAISED_BY_USERS:  # a user's environment may raise anything, and the run steps it again
        return None


def works_in_another_process(env: "InGraphEnv | HostEnv") -> bool:
    """Returns whether a worker process can make an environment outside JAX and begin an episode."""
    from qfleet.envs.host import HostEnv, LaneOptions

    if not isinstance(env, HostEnv):
        return False
    try:
        with contextlib.closing(env.make_lanes(1, LaneOptions(num_env_workers=1, max_failures=0))) as lanes:
            lanes.reset(0)
    except RAISED_BY_USERS:  # a user's environment may raise anything, and this process can step it
        return False
    return True


def _play(lanes: "HostLanes", spec: "EnvSpec") -> str | None:
    from qfleet.core.masks import random_valid, split_lanes

    random, until = np.random.default_rng(0), math.inf
    rewards, has_ended, has_terminated = set(), False, False
    obs = lanes.reset(0)
    for number in random.integers(spec.num_actions, size=RANDOM_PLAY_STEPS, dtype=np.int32):
        lanes.send(random_valid(split_lanes(obs, spec)[1], number[None]))
        step = lanes.recv()
        obs = step.observation
        if not has_ended:  # otherwise the step only starts an episode
            rewards.add(float(step.reward[0]))
        has_ended = bool(step.terminated[0] or step.truncated[0])
        has_terminated |= bool(step.terminated[0])
        if time.monotonic() > until:
            return "slow"
        if until == math.inf:  # the first step isn't timed: it may compile something, or load a model
            until = time.monotonic() + RANDOM_PLAY_SECONDS
    return "no signal" if len(rewards) == 1 and not has_terminated else None


def _sizes_of_replay(spec: "EnvSpec", most_bytes: int, warmup_env_steps: int) -> dict[str, int]:
    """Returns a capacity of a million observations or of `most_bytes`, and a warm-up that leaves room in it."""
    observation_bytes = int(np.prod(spec.lane_shape)) * spec.observation_dtype.itemsize
    capacity = max(1_000, min(1_000_000, most_bytes // observation_bytes))
    return {"replay_capacity": capacity, "warmup_env_steps": min(warmup_env_steps, capacity // 2)}


def _choice(family: Family, topology: str) -> Choice:
    if family.with_replay is None or accepts(topology, replay="none"):
        return Choice(family.preset, family.settings, family.reason)
    preset, settings = family.with_replay
    return Choice(preset, settings, f"{family.reason}, and topology {topology} needs a replay")
