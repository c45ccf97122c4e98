"""The contract of environments that live outside the compiled program: Gymnasium's, ALE's, EnvPool's, a user's own.

Lanes step together and follow NEXT_STEP autoreset, as those inside the program do: after an episode's end the next
step ignores its action, pays nothing and starts a new episode. So what `recv` returns becomes a row as it stands.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from qfleet.config.lane_options import LaneOptions
from qfleet.core.types import EnvSpec

__all__ = ["EnvSpec", "HostEnv", "HostLanes", "HostStep", "LaneOptions", "RenderedLanes", "seed_of"]


class HostStep(NamedTuple):
    """What one step of all lanes returns. `[lanes]` everywhere, in arrays that nobody writes to again."""

    observation: np.ndarray
    """`[lanes, *observation_shape]`, what the next row holds: an episode's final observation where it has just ended,
    the first one of a new episode where it had ended before or its environment failed."""
    reward: np.ndarray
    """float32; 0 where the action was ignored or the environment failed."""
    terminated: np.ndarray
    """bool, the episode ended in a state without a future."""
    truncated: np.ndarray
    """bool, the episode was cut short; its last state still has a value."""
    failed: np.ndarray
    """bool, the environment raised, hung, died or returned a number that isn't finite, and was replaced: the row that
    was acted on holds no step, and nothing may be learned across it."""


class HostLanes(Protocol):
    """Environments under way, one per lane. Not safe to use from several threads at once."""

    def reset(self, seed: int) -> np.ndarray:
        """Starts an episode in every lane, from seeds that only `seed` and the lane decide. Not with a step under way.

        Returns:
          `[lanes, *observation_shape]`.
        """
        ...

    def send(self, action: np.ndarray) -> None:
        """Begins a step of every lane with `[lanes]` int32 actions; returns at once where the backend can."""
        ...

    def recv(self) -> HostStep:
        """Waits for the step that `send` began.

        Raises:
          RunFailed: once more environments have failed than `LaneOptions.max_failures` allows.
        """
        ...

    def close(self) -> None:
        """Ends every process and thread of theirs; may be called twice."""
        ...


class RenderedLanes(HostLanes, Protocol):
    """One lane that can be looked at."""

    def render(self) -> np.ndarray:
        """Returns a picture of where the lane stands, `[height, width, 3]` uint8, RGB. Not with a step under way."""
        ...


def seed_of(*numbers: int) -> int:
    """Returns a seed for lanes, 32 bits, that differs wherever one of the numbers does."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class HostEnv(NamedTuple):
    """One environment as a maker of lanes; what `InGraphEnv` is to environments written in JAX."""

    spec: EnvSpec
    make_lanes: Callable[[int, LaneOptions], HostLanes]
    """`make_lanes(num_lanes, options)`: lanes to train in."""
    make_eval_lanes: Callable[[int, LaneOptions], HostLanes]
    """The same for evaluation: whole episodes and true rewards, where training clips or cuts them."""
    make_rendered_lanes: Callable[[LaneOptions], RenderedLanes] | None = None
    """One lane of evaluation with pictures, for `qfleet watch`. None: observations are drawn where they are pictures
    themselves."""
