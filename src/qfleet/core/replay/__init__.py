"""The replay: a ring of rows, priorities beside it, and transitions that are assembled when they are sampled."""

from qfleet.core.replay.importance import normalise_weights
from qfleet.core.replay.layout import resharded
from qfleet.core.replay.replay import (
    DrawShare,
    Replay,
    ReplayState,
    Sample,
    SavedReplay,
    make_replay,
    partition,
    partition_saved,
)
from qfleet.core.replay.ring import CONTINUED, NO_STEP, TERMINATED, TRUNCATED, Row, outcome_of, sealed_outcomes
from qfleet.core.replay.window import num_ring_rows, window_of

__all__ = [
    "CONTINUED",
    "NO_STEP",
    "TERMINATED",
    "TRUNCATED",
    "DrawShare",
    "Replay",
    "ReplayState",
    "Row",
    "Sample",
    "SavedReplay",
    "make_replay",
    "normalise_weights",
    "num_ring_rows",
    "outcome_of",
    "partition",
    "partition_saved",
    "resharded",
    "sealed_outcomes",
    "window_of",
]
