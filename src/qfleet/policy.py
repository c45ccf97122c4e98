"""The policy that a run has learned, ready to act."""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np

from qfleet.config import ConfigError, RunFailed
from qfleet.config.checks import (
    MAX_EPISODES,
    MAX_FRAMES_PER_SECOND,
    MAX_SEED,
    MAX_SIZE,
    check_count,
)
from qfleet.config.values import show
from qfleet.core.exploration import greedy
from qfleet.core.frame_stack import stack_to_storage_layout
from qfleet.core.masks import shown
from qfleet.core.memory import MemoryState
from qfleet.core.player import make_player
from qfleet.core.types import EnvSpec, Network, Params
from qfleet.envs.action_masks import ActionMask
from qfleet.envs.actions import numbered
from qfleet.envs.contract import BrokenContract
from qfleet.envs.host import HostEnv
from qfleet.envs.observations import encoder_of_arrays
from qfleet.envs.recorded import RecordedEnv, interface_of
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.devices import check_not_forked
from qfleet.runtime.episodes import play
from qfleet.runtime.evaluation import Episodes, EvaluationOptions, episode_limit
from qfleet.runtime.policy_evaluation import WholeEpisodes
from qfleet.runtime.video import Video, check_extra, film, video_name

if TYPE_CHECKING:
    from qfleet.exporting.formats import PolicyParts
    from qfleet.exporting.record import Origin


logger = logging.getLogger("qfleet")


class PolicyMemory(NamedTuple):
    """What a policy remembers of some lanes. `Policy.start` makes one and `Policy.step` the next; keep it, no more."""

    state: MemoryState | None
    """None before the first step."""
    num_lanes: int | None
    """None for one lane whose observations come without a batch axis."""


class Policy:
    """The greedy policy of one Q-network.

    `policy(obs)` returns actions. If the agent remembers earlier observations, `memory = policy.start()` begins an
    episode, and each `action, memory = policy.step(memory, obs)` takes it further.
    """

    def __init__(
        self,
        env: InGraphEnv | HostEnv | RecordedEnv,
        network: Network,
        params: Params,
        label: str,
        options: EvaluationOptions | None = None,
        origin: "Origin | None" = None,
    ) -> None:
        self.params = params
        """Parameters of the network, a tree of arrays."""
        spec, encoder, actions = env.interface if isinstance(env, RecordedEnv) else interface_of(env)
        self.spec: EnvSpec = spec
        """Spec of the environment it was trained in."""
        self.label = label
        """Name among the policies of its run: the checkpoint, and the seed if the run trained many."""
        self.options = options or EvaluationOptions()
        """How `evaluate` plays: as the run evaluated itself."""
        self._origin = origin
        self._given_env = env
        mask = ActionMask(actions or numbered(spec.num_actions), False) if spec.has_action_mask else None
        self._encoder = encoder or encoder_of_arrays(spec.agent_observation_shape, spec.observation_dtype, mask)
        self._frame_encoder = encoder or encoder_of_arrays(spec.observation_shape, spec.observation_dtype, mask)
        self._actions = actions
        self._network = network
        player = make_player(network._replace(with_activations=None), spec.frame_stack)  # nobody asks for the activity
        self.player = player._replace(values=jax.jit(player.values))
        """The functions that act on encoded observations, one frame at a time, with a memory."""
        self._whole_episodes = WholeEpisodes(self.player)
        self._take_step = jax.jit(self._observe_and_choose)
        self._memory_shapes: dict[int, Any] = {}  # by the number of lanes
        self._apply_network = jax.jit(network.apply)
        self._to_view = jax.jit(lambda obs: stack_to_storage_layout(network.to_storage_layout, obs, spec.frame_stack))

    @property
    def is_recurrent(self) -> bool:
        """Whether actions depend on earlier observations, so that only `step` can act."""
        return self._network.recurrence is not None

    def values(self, batch: np.ndarray) -> jax.Array:
        """Returns Q-values, `[batch, num_actions]` float32, of observations from `encode`, without any check."""
        return self._apply_network(self.params, self._to_view(batch))

    @functools.cached_property
    def _env(self) -> InGraphEnv | HostEnv:
        """The environment, which is made when it is first needed. Acting needs only what a checkpoint records of it."""
        return self._given_env.make() if isinstance(self._given_env, RecordedEnv) else self._given_env

    def __call__(self, obs: Any, mask: Any = None) -> Any:
        """Returns greedy actions, as the environment takes them. If it has action masks, they are valid ones.

        Args:
          obs: what the environment returns, either one observation or a batch of them. A batch has one more axis in
            front; a batch of a Dict or Tuple is a dict or tuple of batches, as in Gymnasium's vector environments.
            Frames are stacked along the last axis, `[batch, *agent_observation_shape]`, if the agent sees several. What
            `HostLanes` and `InGraphEnv` return is taken too.
          mask: which actions are valid, as the environment's `info["action_mask"]` says: `[num_actions]` of 0 and 1 or
            bool, or `[batch, num_actions]`. It must be given if the environment has masks, unless `obs` contains it.

        Returns:
          One action for one observation: an integer, or an array if the environment takes several choices at once. For
          a batch, a new array `[batch, ...]` of them.
        Raises:
          ConfigError: if the observations or masks aren't those of the environment, or aren't finite, or no action is
            valid; or if the agent has a recurrent network, whose actions depend on earlier observations.
        """
        check_not_forked()
        self._check_stateless()
        batch, is_batch = self.encode(obs, mask)
        action = np.asarray(greedy(self.values(_at_least_one(batch))))[: len(batch)]
        return self.decode(action, is_batch)

    def start(self, num_lanes: int | None = None) -> PolicyMemory:
        """Returns the memory with which `step` begins, at the start of an episode in each lane.

        Args:
          num_lanes: number of environments that are stepped together. None is for one environment, whose observations
            and actions have no batch axis.

        Raises:
          ConfigError: if the number is out of bounds.
        """
        return PolicyMemory(None, None if num_lanes is None else check_count("num_lanes", num_lanes, maximum=MAX_SIZE))

    def step(
        self, memory: PolicyMemory, obs: Any, is_first: Any = None, *, mask: Any = None
    ) -> tuple[Any, PolicyMemory]:
        """Returns greedy actions, as the environment takes them, and the memory for the next step.

        This works for every agent, with a recurrent network or without. If the agent sees several frames at once, it
        takes single frames, as the environment returns them, and the memory stacks them.

        Args:
          memory: what `start`, or the step before, returned. A memory may be used again, to go back to where it was.
          obs: one observation for each lane of `start`, or one without a batch axis. They are encoded as in
            `policy(obs)`.
          is_first: which lanes' observations start an episode, `[num_lanes]` bool, or one bool without a batch axis.
            Nothing from before is remembered there. The first step after `start` is the first in all lanes.
          mask: which actions are valid, as in `policy(obs, mask)`.

        Returns:
          One action, or `[num_lanes, ...]` of them, and the memory.
        Raises:
          ConfigError: if the observations aren't those of the environment, aren't finite, or are as many as the
            lanes; if `is_first` isn't as `obs` is; or if `memory` isn't one of this policy's.
        """
        check_not_forked()
        if not isinstance(memory, PolicyMemory):
            raise ConfigError(
                f"step must be given the memory that start or the step before returned, got {show(memory)}; begin with "
                f"memory = policy.start()"
            )
        num_lanes = memory.num_lanes
        batch, is_batch = self.encode(obs, mask, is_frame=True)
        if (len(batch) if is_batch else None) != num_lanes:
            wanted = "one observation without a batch axis" if num_lanes is None else f"{num_lanes} observations"
            raise ConfigError(
                f"step must be given {wanted}, because start had num_lanes={num_lanes}, got "
                f"{f'a batch of {len(batch)}' if is_batch else 'one without a batch axis'}; "
                f"begin with policy.start({len(batch) if is_batch else ''})"
            )
        starts = np.full(num_lanes or (), False) if is_first is None else np.asarray(is_first)
        if starts.dtype != bool or starts.shape != (() if num_lanes is None else (num_lanes,)):
            raise ConfigError(
                f"is_first must be bool, {'one' if num_lanes is None else [num_lanes]}, got {show(is_first)}; say for "
                f"each lane whether its observation starts an episode"
            )
        if memory.state is not None and _shapes_of(memory.state) != self._shapes_of_memory(batch):
            raise ConfigError(
                "step must be given a memory of this policy, got one of another policy or of other lanes; begin with "
                "memory = policy.start()"
            )
        action, state = self._take_step(self.params, memory.state, batch, np.atleast_1d(starts))
        return self.decode(np.asarray(action), is_batch), memory._replace(state=state)

    def _observe_and_choose(
        self, params: Params, state: MemoryState | None, obs: jax.Array, is_first: jax.Array
    ) -> tuple[jax.Array, MemoryState]:
        state = self.player.begin(obs) if state is None else self.player.observe(state, obs, is_first)
        q, state, _ = self.player.values(params, state)
        return greedy(q), state

    def _shapes_of_memory(self, batch: np.ndarray) -> Any:
        """Returns the shapes of what this policy remembers of so many lanes."""
        if len(batch) not in self._memory_shapes:
            is_first = jax.ShapeDtypeStruct(batch.shape[:1], np.bool_)
            state = jax.eval_shape(self._observe_and_choose, self.params, None, batch, is_first)[1]
            self._memory_shapes[len(batch)] = _shapes_of(state)
        return self._memory_shapes[len(batch)]

    def decode(self, action: np.ndarray, is_batch: bool) -> Any:
        """Returns actions as the environment takes them, from the numbers, `[batch]`, by which the agent knows them."""
        if is_batch:
            return np.array(action) if self._actions is None else self._actions.batch(action)
        return int(action[0]) if self._actions is None else self._actions.one(int(action[0]))

    def _check_stateless(self) -> None:
        if self.is_recurrent:
            raise ConfigError(
                "a policy with a recurrent network must be given its memory, because actions depend on earlier "
                "observations, got observations alone; use memory = policy.start(num_lanes), then "
                "action, memory = policy.step(memory, obs) for each step"
            )

    def q_values(self, obs: Any, mask: Any = None) -> np.ndarray:
        """Returns Q-values, `[batch, num_actions]` float32 in units of discounted reward; `[num_actions]` for one.

        They are -inf where `mask` says that an action is invalid. The array is new, so that the caller may write to it.

        Args and Raises: as for calling the policy.
        """
        check_not_forked()
        self._check_stateless()
        batch, is_batch = self.encode(obs, mask)
        q = shown(np.asarray(self.values(_at_least_one(batch))))[: len(batch)]
        return q if is_batch else q[0]

    def evaluate(self, num_episodes: int = 100, seed: int = 0) -> np.ndarray:
        """Returns the undiscounted returns of episodes in its environment, `[num_episodes]` float32.

        Raises:
          ConfigError: if a number is out of bounds.
          RunFailed: if the environment fails more than `MAX_LOST` times per episode that is asked for.
        """
        return self.play_episodes(num_episodes, seed).returns

    def play_episodes(
        self, num_episodes: int = 100, seed: int = 0, options: EvaluationOptions | None = None
    ) -> Episodes:
        """Returns episodes in its environment: returns, lengths, and which of them are the same.

        Args:
          num_episodes: number of episodes.
          seed: seed of these episodes.
          options: how to play them, instead of as the run evaluated itself.

        Raises:
          ConfigError: if a number is out of bounds.
          RunFailed: if the environment fails more than `MAX_LOST` times per episode that is asked for.
        """
        check_not_forked()
        num_episodes = check_count("num_episodes", num_episodes, maximum=MAX_EPISODES)
        seed = check_count("seed", seed, minimum=0, maximum=MAX_SEED)
        options = self.options if options is None else options
        return self._whole_episodes.play(self._env, self.params, num_episodes, seed, options)

    def episode_limit(self, options: EvaluationOptions | None = None) -> int:
        """Returns the environment steps after which an episode of an evaluation ends at the latest."""
        return episode_limit(self._env.spec, (self.options if options is None else options).max_episode_steps)

    def film(
        self, out_dir: str | os.PathLike[str], num_episodes: int = 1, seed: int = 0, frames_per_second: int = 30
    ) -> Iterator[Video]:
        """Yields the videos of greedy episodes in its environment, each as soon as it is written.

        Below the picture they show the step, the return so far and the Q-value of every action; the greedy action is
        marked, and always taken. In an environment written in JAX, the episodes begin like those of `evaluate` with the
        same arguments.

        Args:
          out_dir: folder for `<label>-seed<seed>-episode<i>.mp4` and `.gif`. It is made if absent.
          num_episodes: number of episodes, each at most 27,000 steps long.
          seed: seed of these episodes.
          frames_per_second: frame rate of the mp4, where each step is one frame.

        Raises:
          ConfigError: if PyAV or Pillow is missing, there is no way to draw the environment, or an argument is wrong.
          RunFailed: if the environment fails, or a video can't be written.
        """
        num_episodes = check_count("num_episodes", num_episodes, maximum=MAX_EPISODES)
        frames_per_second = check_count("frames_per_second", frames_per_second, maximum=MAX_FRAMES_PER_SECOND)
        seed = check_count("seed", seed, minimum=0, maximum=MAX_SEED)
        check_extra()
        check_not_forked()
        base = Path.cwd()  # now, because the environment may change the current folder
        episodes = play(self._env, self.player, self.params, num_episodes, seed)
        with contextlib.closing(episodes):  # this also closes the lanes that draw, even if the caller stops early
            for i, moments in enumerate(episodes):
                name = video_name(self.label, seed, i)
                folder = _make_folder(base / out_dir)
                try:
                    video = film(moments, folder / name, frames_per_second)
                except OSError as error:
                    raise RunFailed(
                        f"videos need a folder that can be written to, got {folder} ({error.strerror or error}); free "
                        f"space or fix the permissions there, or give another (--out)"
                    ) from error
                yield video

    def export(
        self, path: str | os.PathLike[str], format: Literal["safetensors", "stablehlo", "onnx"] = "safetensors"
    ) -> Path:
        """Writes the policy into a new folder, for other programs or for `load`, and returns the folder's path.

        The folder has a `config.json`, which says what goes in and comes out, and one file: the parameters
        (`safetensors`), or a program with the parameters inside, for a batch of any size (`stablehlo`, `onnx`).

        Args:
          path: the folder, which must be absent or empty.
          format: what the file is. `load` takes `safetensors`. `onnx` needs the extra of that name.

        Raises:
          ConfigError: if the format is unknown or lacks its extra, the folder is there already, or the network can't be
            expressed in the format.
          RunFailed: if the folder can't be written.
        """
        from qfleet.exporting.formats import export_policy

        check_not_forked()
        return export_policy(self._parts(), path, format)

    def export_hub_folder(self, path: str | os.PathLike[str], num_episodes: int = 100, seed: int = 0) -> Path:
        """Writes the policy into a new folder as Hugging Face's hub expects it, and returns the folder's path.

        Beside what `export` writes as safetensors, the folder has a model card, `README.md`, with the mean return of an
        evaluation, and a video of one episode, if one can be recorded. Nothing is uploaded: `hf upload` does that.

        Args:
          path: the folder, which must be absent or empty.
          num_episodes: number of episodes of the evaluation.
          seed: seed of its episodes, and of the one in the video.

        Raises:
          ConfigError: as `export` and `play_episodes` do.
          RunFailed: as they do, or if the environment fails in every episode.
        """
        from qfleet.exporting.folders import check_new_folder, new_folder
        from qfleet.exporting.formats import check_origin, write_policy
        from qfleet.exporting.hub import CARD, VIDEO, model_card, result_of

        folder, origin = check_new_folder(path), check_origin(self._origin)
        episodes = self.play_episodes(num_episodes, seed)
        if not episodes.returns.size:
            raise RunFailed(f"{self.spec.name} failed in every episode")
        with new_folder(folder) as temporary:
            interface = write_policy(self._parts(), temporary, "safetensors")["policy"]["interface"]
            has_video = self._film_into(temporary / VIDEO, seed)
            card = model_card(origin, interface, result_of(episodes), self.options, has_video=has_video)
            (temporary / CARD).write_text(card, encoding="utf-8")
        return folder

    def _film_into(self, path: Path, seed: int) -> bool:
        """Writes a video of one episode, and returns True; or warns and returns False if there can be none."""
        try:
            (video,) = self.film(path.parent, 1, seed)
        except ConfigError as error:
            logger.warning("the folder gets no video: %s", error)
            return False
        video.gif.unlink()
        video.mp4.rename(path)
        return True

    def _parts(self) -> "PolicyParts":
        from qfleet.exporting.formats import PolicyParts

        return PolicyParts(self._network, self.params, self.spec, self.options, self._origin)

    def encode(self, obs: Any, mask: Any = None, *, is_frame: bool = False) -> tuple[np.ndarray, bool]:
        """Returns observations as the agent sees them, `[batch, ...]`, with their masks, and whether there was a batch.

        Args and Raises: as for calling the policy. `is_frame` says that they are single frames, as `step` takes them.
        """
        spec, encoder = self.spec, self._encoder
        if is_frame:
            spec, encoder = dataclasses.replace(spec, frame_stack=1), self._frame_encoder
        try:
            return encoder.any_joined_batch(obs, mask, spec)
        except BrokenContract as error:
            rules = [encoder.rule] if encoder.mask is None else [encoder.rule, encoder.mask.rule]
            raise ConfigError(
                f"the policy takes one observation of {spec.name} ({'; '.join(rules)}) or a batch of them, with "
                f"one more axis in front: {error}"
            ) from error


def _at_least_one(batch: np.ndarray) -> np.ndarray:
    """Returns a batch, with a row of zeros if it has no row, because a network may not take an empty one."""
    return batch if len(batch) else np.zeros((1, *batch.shape[1:]), batch.dtype)


def _shapes_of(state: MemoryState) -> tuple[Any, list[Any]]:
    leaves, structure = jax.tree.flatten(state)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # the second one is of a path that no folder can have
        reason = getattr(error, "strerror", error)
        raise ConfigError(
            f"videos need a folder that can be made, got {show(path)} ({reason}); give another"
        ) from error
    return path
