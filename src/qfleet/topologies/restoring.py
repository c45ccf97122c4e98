"""Reading checkpoints: arrays as they were saved if the layout is the same, and divided anew otherwise."""

import logging
import re
from typing import Any

import jax
import numpy as np

from qfleet.config import AgentConfig
from qfleet.core.replay import SavedReplay
from qfleet.core.replay.layout import resharded
from qfleet.core.replay.ring import Ring, Row
from qfleet.core.replay.window import window_of
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.base import Layout, Topology

logger = logging.getLogger("qfleet")


def read_state(
    topology: Topology,
    checkpoints: Checkpoints,
    checkpoint: int | None,
    metadata: dict[str, Any],
    config: AgentConfig,
    frame_stack: int,
) -> dict[str, Any]:
    """Implements `Topology.read` for a topology that keeps all state as JAX arrays, in one segment.

    Args:
      topology: the topology that will be restored.
      checkpoints: the run's checkpoints.
      checkpoint: the environment steps of the one to read; None reads the newest.
      metadata: the metadata of that checkpoint.
      config: the agent's config.
      frame_stack: number of frames that the agent sees at once.
    """
    like = topology.state
    if saved_layout(metadata) == topology.layout:
        return checkpoints.restore(checkpoint, like)[0]
    state: dict[str, Any] = {"learner": checkpoints.restore_item("learner", like["learner"], checkpoint)}
    if like.get("replay") and "replay" in checkpoints.items(checkpoint):
        wanted: SavedReplay = like["replay"]
        num_rows, num_lanes = wanted.ring.rows.outcome.shape
        saved = resharded_replay(
            saved_replay(checkpoints.restore_item("replay", env_steps=checkpoint)),
            (num_rows, num_lanes, 1),
            config,
            frame_stack,
            is_prioritised=not isinstance(wanted.leaves, tuple),
        )
        state["replay"] = jax.tree.map(_placed_like, saved, wanted)
    return state


def saved_layout(metadata: dict[str, Any]) -> Layout | None:
    """Returns the layout of a checkpoint, None if it isn't known.

    Older checkpoints hold it in words: "fused, 32 lanes" or "actor-learner, 4 x 8 lanes".
    """
    layout: Layout | str = metadata["layout"]
    if not isinstance(layout, str):
        return layout
    words = re.fullmatch(r"(?P<topology>.+), (?:(?P<segments>\d+) x )?(?P<lanes>\d+) lanes", layout)
    if not words:
        return None
    return Layout(
        topology=words["topology"],
        num_segments=int(words["segments"] or 1),
        lanes_per_segment=int(words["lanes"]),
    )


def saved_replay(item: dict[str, Any]) -> SavedReplay:
    """Returns the replay of a checkpoint, which holds it as nested dictionaries of arrays."""
    ring = item["ring"]
    return SavedReplay(Ring(**{**ring, "rows": Row(**ring["rows"])}), item.get("leaves", ()), item["max_priority"])


def resharded_replay(
    saved: SavedReplay, shape: tuple[int, int, int], config: AgentConfig, frame_stack: int, *, is_prioritised: bool
) -> SavedReplay:
    """Returns a saved replay divided anew, and logs a warning if that drops some of its steps.

    Args:
      saved: the replay.
      shape: rows, lanes and segments that it is to have.
      config: the agent's config.
      frame_stack: number of frames that the agent sees at once.
      is_prioritised: whether the result is to have priorities.
    """
    num_rows, num_lanes, num_segments = shape
    saved, num_dropped = resharded(
        saved,
        num_rows,
        num_lanes,
        num_segments,
        window=window_of(config, frame_stack),
        is_prioritised=is_prioritised,
    )
    if num_dropped:
        logger.warning("dividing the replay anew over %d lanes dropped %d of its steps", num_lanes, num_dropped)
    return saved


def _placed_like(array: np.ndarray, like: jax.Array) -> jax.Array:
    """Returns an array on the devices, divided as `like` is."""
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: array[index])
