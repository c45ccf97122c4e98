"""The contract of environments outside the compiled program, such as Gymnasium's, ALE's, EnvPool's or a user's own.

Lanes step together and follow NEXT_STEP autoreset, like lanes inside the program: after the end of an episode, the next
step ignores its action, pays nothing and starts a new episode. So a result of `recv` becomes a row without any change.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from qfleet.config.lane_options import LaneOptions
from qfleet.core.types import EnvSpec
from qfleet.envs.actions import Actions
from qfleet.envs.observations import Encoder

__all__ = ["EnvSpec", "HostEnv", "HostLanes", "HostStep", "LaneOptions", "RenderedLanes", "seed_of"]


class HostStep(NamedTuple):
    """Results of one step of all lanes, `[lanes]` everywhere. Nothing writes to these arrays again."""

    observation: np.ndarray
    """`[lanes, *lane_shape]`: the observations of the next row, each joined with its action mask if there are masks.

    If the episode of a lane ended in this step, this is its final observation. If it had ended one step before, or if
    the environment failed, this is the first observation of a new episode."""
    reward: np.ndarray
    """float32; 0 where the action was ignored or the environment failed."""
    terminated: np.ndarray
    """bool: the episode ended in a state without a future."""
    truncated: np.ndarray
    """bool: the episode was cut short. Its last state still has a value."""
    failed: np.ndarray
    """bool: the environment was replaced because it raised, hung, died or returned a number that isn't finite.

    The action of this row led to no step, so nothing may be learned across the row."""


class HostLanes(Protocol):
    """Running environments, one per lane. Several threads must not use them at the same time."""

    def reset(self, seed: int) -> np.ndarray:
        """Starts an episode in every lane, from seeds that depend only on `seed` and the lane.

        Don't call this between `send` and `recv`.

        Returns:
          `[lanes, *lane_shape]`, as `HostStep.observation`.
        """
        ...

    def send(self, action: np.ndarray) -> None:
        """Begins a step of every lane with `[lanes]` int32 actions. Returns at once if the backend can do that."""
        ...

    def recv(self) -> HostStep:
        """Waits for the step that `send` began, and returns its results.

        Raises:
          RunFailed: if more environments have failed than `LaneOptions.max_failures` allows.
        """
        ...

    def close(self) -> None:
        """Ends all processes and threads of the lanes. Idempotent."""
        ...


class RenderedLanes(HostLanes, Protocol):
    """One lane that can be watched."""

    def render(self) -> np.ndarray:
        """Returns a picture of the lane's state, `[height, width, 3]` uint8, RGB.

        Don't call this between `send` and `recv`.
        """
        ...


def seed_of(*numbers: int) -> int:
    """Returns a 32-bit seed for lanes. It differs if any of the numbers differs."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class HostEnv(NamedTuple):
    """One environment as a maker of lanes: the counterpart of `InGraphEnv` outside JAX."""

    spec: EnvSpec
    make_lanes: Callable[[int, LaneOptions], HostLanes]
    """`make_lanes(num_lanes, options)` returns lanes for training."""
    make_eval_lanes: Callable[[int, LaneOptions], HostLanes]
    """`make_eval_lanes(num_lanes, options)` returns lanes for evaluation.

    They play whole episodes and pay true rewards, even if training cuts episodes or clips rewards."""
    make_rendered_lanes: Callable[[LaneOptions], RenderedLanes] | None = None
    """`make_rendered_lanes(options)` returns one evaluation lane with pictures, for `qfleet watch`.

    Without it, observations are shown if they are pictures."""
    encoder: Encoder | None = None
    """Converts what the environment itself returns to observations of `spec`. None if it returns these."""
    actions: Actions | None = None
    """What the environment itself takes for each of the agent's actions. None if it takes their numbers."""
