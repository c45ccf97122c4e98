"""Environments of EnvPool (Weng et al. 2022, arXiv 2206.10558), stepped by its own threads. Extra `envpool`."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np

from qfleet.config.errors import ConfigError, suggest
from qfleet.envs.actions import make_actions
from qfleet.envs.ale import FRAME_SKIP, NOOP_MAX, SCREEN, TIME_LIMIT_FRAMES
from qfleet.envs.host import EnvSpec, HostEnv, HostLanes, LaneOptions, RenderedLanes
from qfleet.envs.observations import make_encoder
from qfleet.envs.rendering import is_picture
from qfleet.envs.vector_lanes import VectorLanes, VectorStep

_NO_LIMIT = 2**31 - 1  # EnvPool's `max_episode_steps` for environments without a time limit
_GRID_LEVELS = (11, 6, 3)  # numbers of object kinds, colours and states in MiniGrid's observations

_Encode = Callable[[Any, int], np.ndarray]


def make(name: str, /, **options: Any) -> HostEnv:
    """Returns EnvPool's environment of that name, such as `Pong-v5`, `LunarLander-v3` or `highway-fast-v0`.

    Atari games follow the protocol of `qfleet.envs.ale` with one deviation, which is EnvPool's: after a lost life the
    game continues with up to 30 no-ops rather than one. MiniGrid's observations are reduced to their image, one-hot;
    the mission is dropped. An episode that terminates in the very step of its time limit counts as truncated.

    Args:
      name: name of the environment in `envpool.list_all_envs`.
      **options: further settings of EnvPool, such as `repeat_action_probability`.

    Raises:
      ConfigError: if EnvPool is missing or has no such environment or option, if observations are neither Box nor
        Discrete, or if actions aren't Discrete.
    """
    try:
        import envpool
        from envpool.registration import registry
    except ImportError as error:
        raise ConfigError(f"envpool:{name} needs EnvPool ({error}); pip install 'qfleet[envpool]'") from error
    if name not in registry.specs:
        raise ConfigError(f"EnvPool has no environment {name!r}.{suggest(name, registry.specs)}")
    is_atari = registry.specs[name][0] == "envpool.atari"
    protocol = _atari() if is_atari else {}
    if fixed := sorted(protocol.keys() & options.keys()):
        raise ConfigError(f"envpool:{name}: {', '.join(fixed)} must be left as the protocol for Atari has it")
    settings = {**protocol, **options}

    def make_pool(seeds: Sequence[int], **further: Any) -> Any:
        pool = envpool.make_gymnasium(name, num_envs=len(seeds), seed=list(seeds), **{**settings, **further})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Gymnasium warns of the precision of EnvPool's bounds
            _ = pool.observation_space, pool.action_space  # the pool makes both now and keeps them
        return pool

    spec, encode = _describe(name, is_atari, make_pool)

    def make_lanes_with(**further: Any) -> Callable[[int, LaneOptions], HostLanes]:
        def make_lanes(num_lanes: int, lane_options: LaneOptions) -> HostLanes:
            if lane_options.num_env_workers:
                raise ConfigError(
                    f"num_env_workers must be 0 for {spec.name}, which has threads of its own, "
                    f"got {lane_options.num_env_workers}"
                )

            def backend(num_lanes: int) -> EnvPoolVector:
                return EnvPoolVector(lambda seeds: make_pool(seeds, **further), encode)

            return VectorLanes(spec.name, backend, num_lanes, lane_options)

        return make_lanes

    training = {"episodic_life": True, "reward_clip": True} if is_atari else {}

    def refuse_to_render(lane_options: LaneOptions) -> RenderedLanes:
        raise ConfigError(
            f"{spec.name} must show the agent a picture to be watched, because EnvPool draws none; it shows "
            f"{spec.observation_dtype} {list(spec.observation_shape)}; train in its equivalent gym:{name} to watch that"
        )

    # If observations are pictures, they are shown, and no renderer is needed.
    return HostEnv(spec, make_lanes_with(**training), make_lanes_with(), None if is_picture(spec) else refuse_to_render)


class EnvPoolVector:
    """A `VectorBackend` made of a pool, whose threads step the lanes between `send` and `recv`."""

    def __init__(self, make_pool: Callable[[Sequence[int]], Any], encode: _Encode) -> None:
        self._make_pool, self._encode = make_pool, encode
        self._pool: Any = None
        self._num_lanes = 0

    def begin(self, seeds: Sequence[int]) -> np.ndarray:
        self.close()
        self._pool, self._num_lanes = self._make_pool(seeds), len(seeds)  # a pool only takes seeds when it is made
        observation, _ = self._pool.reset()
        return self._encode(observation, self._num_lanes)

    def send(self, action: np.ndarray) -> None:
        self._pool.send(action.astype(np.int32))

    def recv(self) -> VectorStep:
        observation, reward, terminated, truncated, _ = self._pool.recv()
        return VectorStep(self._encode(observation, self._num_lanes), reward, terminated, truncated)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None  # its threads end when it is freed


def _atari() -> dict[str, Any]:
    return {
        "max_episode_steps": TIME_LIMIT_FRAMES // FRAME_SKIP,
        "stack_num": 1,
        "frame_skip": FRAME_SKIP,
        "noop_max": NOOP_MAX,
        "use_fire_reset": False,
        "img_height": SCREEN[0],
        "img_width": SCREEN[1],
        "gray_scale": True,
        "episodic_life": False,
        "reward_clip": False,
    }


def _describe(name: str, is_atari: bool, make_pool: Callable[..., Any]) -> tuple[EnvSpec, _Encode]:
    """Returns the spec, and the function that encodes observations."""
    try:
        pool = make_pool([0])
    except Exception as error:  # EnvPool's own message says, for example, which option it doesn't know
        raise ConfigError(
            f"envpool:{name} must be one that envpool.make can make, got {type(error).__name__}: {error}"
        ) from error
    observations, config = pool.observation_space, pool.config
    if config["max_num_players"] > 1:
        raise ConfigError(f"environment envpool:{name} must have one player, got {config['max_num_players']}")
    encode = _make_encode(observations, name, is_atari)
    with contextlib.closing(pool):
        first = encode(pool.reset()[0], 1)[0]
    limit = config["max_episode_steps"]
    spec = EnvSpec(
        name=f"envpool:{name}",
        observation_shape=first.shape,
        observation_dtype=first.dtype,
        num_actions=_num_actions(pool.action_space, name),
        frame_stack=4 if is_atari else 1,
        time_limit=None if limit >= _NO_LIMIT else limit,
    )
    return spec, encode


def _num_actions(space: gymnasium.Space, name: str) -> int:
    actions = make_actions(space, f"envpool:{name}")
    if not np.array_equal(actions.table, np.arange(actions.num_actions)):
        raise ConfigError(f"environment envpool:{name}: actions must be Discrete from 0 on, got {space}")
    return actions.num_actions


def _make_encode(observations: gymnasium.Space, name: str, is_atari: bool) -> _Encode:
    if is_atari:
        return _single_frame
    if isinstance(observations, gymnasium.spaces.Dict) and set(observations) == {"direction", "image", "mission"}:
        return _one_hot_grid
    return make_encoder(observations, f"envpool:{name}")


def _single_frame(observation: np.ndarray, num_lanes: int) -> np.ndarray:
    return observation[:, 0]  # without a copy, because EnvPool returns new arrays


def _one_hot_grid(observation: dict[str, np.ndarray], num_lanes: int) -> np.ndarray:
    """Returns MiniGrid's `[lanes, height, width, 3]` numbers as one-hot `[lanes, height, width, 20]` bool."""
    image = observation["image"]
    planes = [image[..., i, None] == np.arange(levels) for i, levels in enumerate(_GRID_LEVELS)]
    return np.concatenate(planes, axis=-1)
