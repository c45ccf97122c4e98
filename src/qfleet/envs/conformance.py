"""One suite of checks for every environment, whatever its backend: do its rows mean what the replay assumes?"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qfleet.core.masks import random_valid, split_lanes
from qfleet.envs import in_graph
from qfleet.envs.first_step import NeverWorks, check_works
from qfleet.envs.host import EnvSpec, HostEnv, HostLanes, HostStep, LaneOptions
from qfleet.envs.spec import InGraphEnv, with_masks_joined

NUM_LANES = 4


class Check(NamedTuple):
    """Result of one check."""

    what: str
    is_ok: bool
    detail: str


class Recording(NamedTuple):
    """Rows that lanes returned, `[rows, lanes]` everywhere. The action in row t is `action[t]`."""

    observation: np.ndarray
    """`[rows + 1, lanes, *lane_shape]`."""
    action: np.ndarray
    """The valid ones that random numbers picked."""
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    failed: np.ndarray
    is_overwritten: bool
    """Whether an array that was returned earlier had changed by the end."""

    @property
    def ended(self) -> np.ndarray:
        """`[rows, lanes]` bool: the episode ended in this step."""
        return self.terminated | self.truncated

    @property
    def begins(self) -> np.ndarray:
        """`[rows, lanes]` bool: the action was for a final observation, so this step starts a new episode."""
        return np.concatenate([np.zeros_like(self.ended[:1]), self.ended[:-1]])


def check(env: InGraphEnv | HostEnv, *, num_steps: int = 500, seed: int = 0, num_env_workers: int = 0) -> list[Check]:
    """Plays random actions in a few lanes, several times, and returns the result of each check.

    Args:
      env: the environment, in JAX or not.
      num_steps: number of steps of each lane.
      seed: seed of the lanes and the actions.
      num_env_workers: processes for environments that can be stepped by them.

    Raises:
      RunFailed: if the environment fails too often.
      ConfigError: if its lanes can't be made.
    """
    options = LaneOptions(num_env_workers=num_env_workers)
    host = env if isinstance(env, HostEnv) else as_host(with_masks_joined(env))
    spec = host.spec
    masked = spec if spec.has_action_mask else None
    try:
        if isinstance(env, HostEnv):
            check_works(env, options)
    except NeverWorks as error:
        return [Check("the first step", False, str(error))]
    actions = np.random.default_rng(seed).integers(spec.num_actions, size=(num_steps, NUM_LANES), dtype=np.int32)
    lanes = host.make_lanes(NUM_LANES, options)
    try:
        shapes = _check_types(lanes, spec, seed)
        if not shapes.is_ok:
            return [shapes]
        first = record(lanes, seed, actions, masked)
        again = record(lanes, seed, actions, masked)
        other = record(lanes, seed + 1, actions, masked)
    finally:
        lanes.close()
    # Change only the actions for final observations.
    ignored = np.where(first.begins, (actions + 1) % spec.num_actions, actions)
    fresh = _record_once(host.make_lanes, options, seed, ignored, masked)
    evaluated = _record_once(host.make_eval_lanes, options, seed, actions, masked)
    return [
        shapes,
        *_check_rows(first, spec, "training"),
        *_check_rows(evaluated, spec, "evaluation"),
        *_check_seeds(first, again, other),
        _check_ignored_actions(first, fresh),
    ]


def record(lanes: HostLanes, seed: int, actions: np.ndarray, masked: EnvSpec | None = None) -> Recording:
    """Resets the lanes, plays `[rows, lanes]` actions and returns the rows.

    Given the spec of an environment with masks, it plays the valid actions that the numbers pick.
    """
    first = lanes.reset(seed)
    returned: list[HostStep] = []
    copies, actions = [first.copy()], actions.copy()
    for action in actions:
        if masked is not None:
            action[:] = random_valid(split_lanes(copies[-1], masked)[1], action)
        lanes.send(action)
        returned.append(lanes.recv())
        copies.append(returned[-1].observation.copy())
    later = [first, *(step.observation for step in returned)]
    reward, terminated, truncated, failed = map(np.stack, list(zip(*returned, strict=True))[1:])
    # Compare bytes, because NaN differs from itself.
    is_overwritten = any(a.tobytes() != b.tobytes() for a, b in zip(copies, later, strict=True))
    return Recording(np.stack(copies), actions, reward, terminated, truncated, failed, is_overwritten)


def as_host(env: InGraphEnv) -> HostEnv:
    """Returns an environment in JAX as lanes that step one row at a time."""

    def make_lanes(num_lanes: int, options: LaneOptions) -> HostLanes:
        return InGraphLanes(env, num_lanes)

    return HostEnv(env.spec, make_lanes, make_lanes)


class InGraphLanes:
    """`HostLanes` of an environment in JAX. They are slow, because they run one compiled row at a time."""

    def __init__(self, env: InGraphEnv, num_lanes: int) -> None:
        self._num_lanes = num_lanes
        self._init = jax.jit(functools.partial(in_graph.init_lanes, env, numbers=jnp.arange(num_lanes)))

        @jax.jit
        def step(lanes: in_graph.Lanes, action: jax.Array, key: jax.Array) -> tuple[in_graph.Lanes, in_graph.LaneStep]:
            draws = in_graph.draw_step_keys(env, key, 1, jnp.arange(num_lanes))
            return in_graph.step_lanes(env, lanes, action, jax.tree.map(lambda x: x[0], draws))

        self._step = step

    def reset(self, seed: int) -> np.ndarray:
        self._key, key = jax.random.split(jax.random.key(seed))
        self._lanes = self._init(key)
        return np.array(self._lanes.observation)

    def send(self, action: np.ndarray) -> None:
        self._key, key = jax.random.split(self._key)
        self._lanes, self._row = self._step(self._lanes, action, key)

    def recv(self) -> HostStep:
        reward, terminated, truncated = map(np.array, self._row)
        observation = np.array(self._lanes.observation)
        return HostStep(observation, reward, terminated, truncated, np.zeros(self._num_lanes, bool))

    def close(self) -> None:
        """Does nothing, because there are no processes or threads to end."""


def _record_once(
    make_lanes: Callable[[int, LaneOptions], HostLanes],
    options: LaneOptions,
    seed: int,
    actions: np.ndarray,
    masked: EnvSpec | None,
) -> Recording:
    lanes = make_lanes(NUM_LANES, options)
    try:
        return record(lanes, seed, actions, masked)
    finally:
        lanes.close()


def _check_types(lanes: HostLanes, spec: EnvSpec, seed: int) -> Check:
    """Checks shapes and dtypes in one step. The other checks rely on them."""
    first = lanes.reset(seed)
    observation = f"{spec.observation_dtype}{[NUM_LANES, *spec.lane_shape]}"
    if first.shape != (NUM_LANES, *spec.lane_shape):  # no mask can be read
        got = f"{first.dtype}{list(first.shape)}"
        return Check("shapes and dtypes", False, f"the observation of reset must be {observation}, got {got}")
    lanes.send(random_valid(split_lanes(first, spec)[1], np.zeros(NUM_LANES, np.int32)))
    step = lanes.recv()
    expected = [observation, observation, f"float32[{NUM_LANES}]", *[f"bool[{NUM_LANES}]"] * 3]
    names = ["the observation of reset", *HostStep._fields]
    found = [f"{array.dtype}{list(array.shape)}" for array in (first, *step)]
    wrong = [
        f"{name} must be {right}, got {is_now}"
        for name, right, is_now in zip(names, expected, found, strict=True)
        if right != is_now
    ]
    return Check("shapes and dtypes", not wrong, "; ".join(wrong) or f"observations are {observation}")


def _check_rows(recording: Recording, spec: EnvSpec, where: str) -> Iterator[Check]:
    """Checks the rules for every row. `where` says whether the lanes are those of training or of evaluation."""
    numbers = (recording.observation, recording.reward)
    is_finite = all(np.isfinite(array).all() for array in numbers if array.dtype.kind == "f")
    yield Check(f"{where}: numbers are finite", is_finite, "" if is_finite else "NaN or infinity came back")
    failures = int(recording.failed.sum())
    yield Check(f"{where}: no failures", not failures, f"{failures} steps of a lane failed" if failures else "")
    detail = "recv returned an array that a later step wrote to" if recording.is_overwritten else ""
    yield Check(f"{where}: arrays are left alone", not recording.is_overwritten, detail)

    begins = recording.begins
    pays = bool((recording.reward[begins] != 0).any() or recording.ended[begins].any())
    num_ends = int(begins.sum())
    detail = "a row that starts an episode has a reward or ends" if pays else f"{num_ends} of them"
    yield Check(f"{where}: rows after an end pay nothing", not pays, detail)
    # If an episode ends in step t, row t + 1 holds the final observation and row t + 2 the first of the next episode.
    same = [
        bool((recording.observation[t, i] == recording.observation[t + 1, i]).all()) for t, i in np.argwhere(begins)
    ]
    only_one = bool((recording.observation == recording.observation[0, 0]).all())
    is_kept = only_one or not same or not all(same)
    detail = f"{sum(same)} of {len(same)} are equal to the next episode's first"
    yield Check(f"{where}: final observations are kept", is_kept, detail)
    yield _check_time_limit(recording, spec, where)
    if spec.has_action_mask:
        yield _check_masks(recording, spec, where)


def _check_masks(recording: Recording, spec: EnvSpec, where: str) -> Check:
    """Checks the masks of all states but those that ended an episode by termination."""
    flags = recording.observation[..., -spec.num_actions :]
    numbers = (flags != 0).sum(axis=-1)
    has_ended = np.concatenate([np.zeros_like(recording.terminated[:1]), recording.terminated])
    what = f"{where}: masks leave a valid action"
    if not np.isin(flags, (0, 1)).all():
        return Check(what, False, "a mask has numbers other than 0 and 1")
    numbers = numbers[~has_ended]
    is_ok = bool((numbers > 0).all())
    detail = f"{numbers.min()} to {numbers.max()} of {spec.num_actions} actions, only valid ones were taken"
    return Check(what, is_ok, detail if is_ok else f"{int((numbers == 0).sum())} states that go on have none")


def _check_time_limit(recording: Recording, spec: EnvSpec, where: str) -> Check:
    what = f"{where}: the time limit truncates"
    if spec.time_limit is None:
        return Check(what, True, "there is none")
    age = np.zeros(NUM_LANES, int)
    reached = 0
    for begins, ended, failed in zip(recording.begins, recording.ended, recording.failed, strict=True):
        age = np.where(begins | failed, 0, age + 1)
        if (age > spec.time_limit).any() or (age[~ended] == spec.time_limit).any():
            return Check(what, False, f"an episode went on after {spec.time_limit} steps")
        reached += int((age == spec.time_limit).sum())
    return Check(what, True, f"after {spec.time_limit} steps, reached by {reached} episodes")


def _check_seeds(first: Recording, again: Recording, other: Recording) -> Iterator[Check]:
    difference = _first_difference(first, again)
    yield Check("the same seed gives the same rows", difference is None, difference or "")
    is_random = _first_difference(first, other) is not None
    detail = "it does" if is_random else "it doesn't: nothing in this environment seems to be random"
    yield Check("another seed gives other rows", True, detail)


def _check_ignored_actions(first: Recording, changed: Recording) -> Check:
    difference = _first_difference(first, changed)
    what = "actions for final observations are ignored"
    return Check(what, difference is None, difference or f"{int(first.begins.sum())} of them changed, in new lanes")


def _first_difference(a: Recording, b: Recording) -> str | None:
    for name in ("observation", "reward", "terminated", "truncated"):
        left, right = getattr(a, name), getattr(b, name)
        differs = (left != right) & ((left == left) | (right == right))  # two NaNs count as equal here
        differs = np.argwhere(differs.reshape(*left.shape[:2], -1).any(-1))
        if len(differs):
            return f"{name} differs, first in row {differs[0][0]}, lane {differs[0][1]}"
    return None
