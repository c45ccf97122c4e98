"""Numbers of an agent's config that a compiled program can take as inputs, so that one program serves many values."""

from typing import NamedTuple

from jax import Array

from qfleet.config import AgentConfig


class Numbers(NamedTuple):
    """Settings that only enter into arithmetic: constants of a program, or `[]` float32 where it takes them as inputs.

    Each has the name of the setting in `AgentConfig` that it stands for.
    """

    learning_rate: float | Array
    discount: float | Array
    target_update_rate: float | Array
    priority_exponent: float | Array
    trace_decay: float | Array


def numbers_of(config: AgentConfig) -> Numbers:
    """Returns the numbers that a config holds, as constants."""
    return Numbers(*(getattr(config, name) for name in Numbers._fields))
