"""Which rows of a lane a sample is made of, and at which rows it may start."""

from typing import NamedTuple

from qfleet.config import AgentConfig


class Window(NamedTuple):
    """The rows of a transition or of a sequence, by their distance from its first row."""

    num_after: int
    """Rows that must follow the first one."""
    frame_stack: int = 1
    """Frames seen at once: the first row's stack reaches back `frame_stack - 1` rows."""
    period: int = 1
    """A sample may start at every so many rows of the ring, counted from its first place. It divides the ring."""
    first_learned: int = 0
    """The first row that is learned from."""
    num_learned: int = 1
    """Rows that are learned from. A sample can be drawn if any of them holds a step."""


def window_of(config: AgentConfig, frame_stack: int) -> Window:
    """Returns the window of what an agent learns from: transitions of n steps, or sequences if it has a memory."""
    if not config.learns_sequences:
        return Window(config.n_step, frame_stack)
    return Window(config.rows_after_start, frame_stack, config.rows_per_start, config.burn_in, config.sequence_length)


def num_ring_rows(config: AgentConfig, num_lanes: int) -> int:
    """Returns the number of rows of a replay of `num_lanes` lanes, a multiple of the rows between two starts."""
    return config.replay_capacity // num_lanes // config.rows_per_start * config.rows_per_start
