"""Atari games on ALE's native vector environment (Farama 2025). Extra `atari`.

The protocol is that of Mnih et al. 2015. The recommendations of Machado et al. 2018 (arXiv 1709.06009) are options.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qfleet.config.errors import ConfigError, RunFailed, suggest
from qfleet.envs.host import EnvSpec, HostEnv, HostLanes, HostStep, LaneOptions, RenderedLanes
from qfleet.envs.vector_lanes import VectorLanes, VectorStep

FRAME_SKIP = 4
TIME_LIMIT_FRAMES = 108_000  # half an hour of play at 60 Hz
NOOP_MAX = 30
SCREEN = (84, 84)
PICTURE = (210, 160)  # size that the games draw, except for a few that draw 250 lines
NOOP = 0  # number of the no-op, in the minimal and in the full set of actions


def make(name: str, /, *, repeat_action_probability: float = 0.0, full_action_space: bool = False) -> HostEnv:
    """Returns an Atari game. Each step plays four frames and shows the maximum of the last two, as 84x84 grey pixels.

    The agent stacks the last four observations. Episodes begin with up to 30 no-ops and are truncated after 108,000
    frames. In training, rewards are clipped to [-1, 1], and a lost life terminates the episode; the game then continues
    after one no-op. Evaluation does neither.

    Args:
      name: the game, such as `MsPacman` or `ms_pacman`.
      repeat_action_probability: probability that the emulator repeats the previous action. Machado et al. recommend
        0.25.
      full_action_space: whether to offer all 18 actions rather than only those that the game uses.

    Raises:
      ConfigError: if ALE is missing, there is no such game, or an option is out of range.
    """
    try:
        import ale_py.vector_env
        from ale_py import roms
    except ImportError as error:
        raise ConfigError(f"ale:{name} needs ALE ({error}); pip install 'qfleet[atari]'") from error
    if not 0.0 <= repeat_action_probability <= 1.0:
        raise ConfigError(f"repeat_action_probability must be in [0, 1], got {repeat_action_probability}")
    game = _find_game(name, roms.get_all_rom_ids())
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # keeps ALE from printing its version each time
    atari = _Atari(f"ale:{name}", game, repeat_action_probability, full_action_space)
    with contextlib.closing(atari.vector(1)) as vector:
        num_actions = len(vector.ale.get_action_set())
    spec = EnvSpec(
        name=atari.name,
        observation_shape=SCREEN,
        observation_dtype=np.dtype(np.uint8),
        num_actions=num_actions,
        frame_stack=4,
        time_limit=TIME_LIMIT_FRAMES // FRAME_SKIP,
    )
    return HostEnv(spec, atari.lanes, atari.eval_lanes, atari.rendered_lanes)


class _Atari(NamedTuple):
    """One game with its options, as a maker of lanes."""

    name: str
    game: str
    repeat_action_probability: float
    full_action_space: bool

    def lanes(self, num_lanes: int, options: LaneOptions) -> HostLanes:
        return self._vector_lanes(num_lanes, options, lives_end_episodes=True, reward_clipping=True)

    def eval_lanes(self, num_lanes: int, options: LaneOptions) -> HostLanes:
        return self._vector_lanes(num_lanes, options)

    def rendered_lanes(self, options: LaneOptions) -> RenderedLanes:
        coloured = self._vector_lanes(1, options, screen=PICTURE, grayscale=False)
        return AleWithPictures(self.eval_lanes(1, options), coloured)

    def vector(
        self,
        num_lanes: int,
        *,
        reward_clipping: bool = False,
        screen: tuple[int, int] = SCREEN,
        grayscale: bool = True,
    ) -> Any:
        """Returns ALE's vector environment, set to the protocol."""
        from ale_py.vector_env import AtariVectorEnv

        return AtariVectorEnv(
            self.game,
            num_lanes,
            max_num_frames_per_episode=TIME_LIMIT_FRAMES,
            repeat_action_probability=self.repeat_action_probability,
            full_action_space=self.full_action_space,
            img_height=screen[0],
            img_width=screen[1],
            grayscale=grayscale,
            stack_num=1,
            frameskip=FRAME_SKIP,
            noop_max=NOOP_MAX,
            use_fire_reset=False,
            reward_clipping=reward_clipping,
        )

    def _vector_lanes(
        self, num_lanes: int, options: LaneOptions, *, lives_end_episodes: bool = False, **settings: Any
    ) -> HostLanes:
        if options.num_env_workers:
            raise ConfigError(
                f"num_env_workers must be 0 for {self.name}, which has threads of its own, "
                f"got {options.num_env_workers}"
            )

        def make_backend(num_lanes: int) -> AleVector:
            return AleVector(self.vector(num_lanes, **settings), lives_end_episodes=lives_end_episodes)

        return VectorLanes(self.name, make_backend, num_lanes, options)


class AleVector:
    """ALE's vector environment as a backend. Its own threads step the lanes between `send` and `recv`.

    ALE's `episodic_life` is not used, because it starts a new game at every lost life, so that the agent never sees
    later lives. Here the game continues, as in Mnih et al. 2015. The row after a lost life is a no-op whose reward is
    dropped, as in OpenAI Baselines' EpisodicLifeEnv.
    """

    def __init__(self, env: Any, *, lives_end_episodes: bool) -> None:
        self._env, self._lives_end_episodes = env, lives_end_episodes
        num_lanes = env.num_envs
        self._lives = np.zeros(num_lanes, np.int32)
        self._resumes = np.zeros(num_lanes, bool)  # a life was lost in the last row, so the game resumes with a no-op
        self._over = np.zeros(num_lanes, bool)  # the game ended in that no-op; the row of a no-op can't report an end
        self._last: VectorStep | None = None

    def begin(self, seeds: Sequence[int]) -> np.ndarray:
        observation, info = self._env.reset(seed=np.asarray(seeds))
        self._lives = info["lives"]
        self._resumes[:], self._over[:], self._last = False, False, None
        return observation[:, 0]

    def send(self, action: np.ndarray) -> None:
        self._env.send(np.where(self._resumes, NOOP, action).astype(np.int32))

    def recv(self) -> VectorStep:
        observation, reward, terminated, truncated, info = self._env.recv()
        step = VectorStep(observation[:, 0], reward, terminated, truncated)
        return self._end_with_lives(step, info["lives"]) if self._lives_end_episodes else step

    def close(self) -> None:
        self._env.close()

    def _end_with_lives(self, step: VectorStep, lives: np.ndarray) -> VectorStep:
        resumed, was_over, last = self._resumes, self._over, self._last
        ended = step.terminated | step.truncated
        # With 0 lives the game is about to end by itself, in some games only frames later. That end is reported.
        lost = (lives < self._lives) & (lives > 0) & ~ended & ~resumed
        self._over = resumed & ended
        if last is not None and was_over.any():
            # ALE has used this row to start a new game. Report the end of the old one instead, then resume the new one.
            step.observation[was_over] = last.observation[was_over]
            lost |= was_over & last.terminated
            step.truncated[was_over] = last.truncated[was_over]
        self._lives, self._resumes, self._last = lives, lost | was_over, step
        return step._replace(terminated=step.terminated | lost)


class AleWithPictures:
    """Two emulators of a game, with the same seed and actions: one shows what the agent sees, the other colours."""

    def __init__(self, seen: HostLanes, coloured: HostLanes) -> None:
        self._seen, self._coloured = seen, coloured
        self._picture = np.zeros((*PICTURE, 3), np.uint8)

    def reset(self, seed: int) -> np.ndarray:
        self._picture = self._coloured.reset(seed)[0]
        return self._seen.reset(seed)

    def send(self, action: np.ndarray) -> None:
        self._seen.send(action)
        self._coloured.send(action)

    def recv(self) -> HostStep:
        step, coloured = self._seen.recv(), self._coloured.recv()
        if any(np.any(ours != theirs) for ours, theirs in zip(step[1:], coloured[1:], strict=True)):
            raise RunFailed(
                "two emulators must play alike from one seed, but these came apart, so a video would show neither "
                "game; report this as a bug"
            )
        self._picture = coloured.observation[0]
        return step

    def render(self) -> np.ndarray:
        return self._picture

    def close(self) -> None:
        self._seen.close()
        self._coloured.close()


def _find_game(name: str, known: Sequence[str]) -> str:
    games = {game.replace("_", ""): game for game in known}
    key = name.replace("_", "").lower()
    if key not in games:
        nice = {game.title().replace("_", ""): game for game in known}
        raise ConfigError(f"ALE has no game {name!r}.{suggest(name, nice)}")
    return games[key]
