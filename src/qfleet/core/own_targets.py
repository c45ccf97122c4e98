"""Targets of one's own: what a function that a config names as MODULE:NAME is given, and what it returns."""

from collections.abc import Callable
from typing import NamedTuple

from qfleet.config import AgentConfig
from qfleet.config.own_parts import make_own_function
from qfleet.core.heads import Head, Outputs, Values
from qfleet.core.types import Transition


class NetworkOutputs(NamedTuple):
    """What the online and the target network return for a batch. The target is computed from these, without gradient.

    What a target doesn't use isn't computed. Suffixes name time, as in `qfleet.core.targets`.
    """

    online_tm1: Outputs
    """Outputs of the online network, for the observations acted on."""
    target_tm1: Outputs
    """Outputs of the target network, for the observations acted on."""
    online_t: Outputs
    """Outputs of the online network, for the observations after the action, or after n steps."""
    target_t: Outputs
    """Outputs of the target network, for the observations after the action, or after n steps."""


Target = Callable[[Head, Transition, NetworkOutputs], Values]
"""`target(head, batch, outputs) -> values`: what the value of each action of the batch should be, as a distribution.

`head` reads Q-values and distributions off the outputs. `qfleet.core.heads` has functions for what is returned:
`point_values` for a target that is one number, `[batch]`, and `backed_up` for a reward plus a discounted distribution.
"""


def make_own_target(config: AgentConfig) -> Target | None:
    """Returns the target that `config` names, or None if it names none.

    Raises:
      ConfigError: if the user's function can't be imported, or doesn't return a function.
    """
    if config.target is None:
        return None
    return make_own_function("target", config.target, "target(head, batch, outputs)", config)
