"""A saved replay laid out anew, for a run that goes on with other numbers of lanes, rows or segments.

On the host, in NumPy: it decides for each slot of the new ring which slot of the old one it takes, and copies once.
"""

from typing import Any, NamedTuple, cast

import jax
import numpy as np

from qfleet.core.replay.replay import SavedReplay
from qfleet.core.replay.ring import NO_STEP, Ring, Row, cut


class _Pieces(NamedTuple):
    """Rows of one lane up to a final observation: an episode, or what is left of its end. Each field `[pieces]` int."""

    lane: np.ndarray
    last_row: np.ndarray
    """Where the final observation is in the old ring."""
    length: np.ndarray
    """Rows, the last of which holds no step."""
    age: np.ndarray
    """Rows that its segment has inserted since."""


class _Places(NamedTuple):
    """Where pieces go. Each field `[pieces]` int."""

    lane: np.ndarray
    num_newer: np.ndarray
    """Rows after it in its new lane."""
    num_kept: np.ndarray
    """Of its rows, the newest; 0 where it is dropped."""


def resharded(
    saved: SavedReplay,
    num_rows: int,
    num_lanes: int,
    num_segments: int,
    *,
    n_step: int,
    frame_stack: int,
    is_prioritised: bool,
) -> tuple[SavedReplay, int]:
    """Returns the replay in another layout, in NumPy, and how many of its steps are no longer in it.

    It is what a replay would hold whose lanes had seen the same episodes, and whose environments all start new ones
    now: each lane is closed after its newest row, as by `cut`, and never joined with another. Episodes stay whole, the
    older ones first in each lane. Lanes share a cursor, so the shorter ones of a segment begin with rows that hold no
    step; lanes of like length share a segment, for a uniform draw that meets such a row is repeated.

    What is lost: each lane's newest step, for where it led to wasn't kept; of a full ring, where frames are stacked,
    the rest of each lane's oldest episode, for the frames before it are gone; and the oldest episodes, where they find
    no room. Of the last one that still finds some the newest rows are kept. They fill the lane, so its segment is full,
    and the first that would miss a frame are those that a full ring doesn't start a transition from anyway.

    Args:
      saved: the replay, in NumPy or JAX; it is left as it is.
      num_rows: that the new ring can hold.
      num_lanes: of each row, over all segments.
      num_segments: of equal numbers of lanes.
      n_step: of the run that goes on, as the following.
      frame_stack: frames seen at once.
      is_prioritised: whether leaves are wanted. Transitions keep theirs; those that had none enter at the greatest.

    Raises:
      ValueError: if the lanes don't divide over the segments.
    """
    if num_lanes % num_segments:
        raise ValueError(
            f"num_lanes must divide over the segments, got num_lanes={num_lanes}, num_segments={num_segments}; "
            f"try {-(-num_lanes // num_segments) * num_segments}"
        )
    ring = jax.tree.map(np.asarray, saved.ring)
    closed = ring
    for segment in range(len(ring.cursor)):
        closed = cut(closed, segment)
    outcome = np.asarray(closed.rows.outcome)
    pieces = _pieces_of(ring, outcome, frame_stack)
    places = _deal(pieces, num_rows, num_lanes)
    size, source = _source(ring, pieces, places, num_rows, num_lanes, num_segments)

    def moved(buffer: Any, padding: Any = 0) -> Any:
        return _moved(np.asarray(buffer), source, num_rows, padding)

    rows = Row(
        obs=moved(ring.rows.obs),
        action=moved(ring.rows.action),
        reward=moved(ring.rows.reward),
        outcome=moved(outcome, NO_STEP),
    )
    leaves: Any = ()
    if is_prioritised:
        old = () if isinstance(saved.leaves, tuple) else moved(saved.leaves)
        leaves = _leaves(rows, size, old, float(saved.max_priority), n_step, frame_stack)
    counters: Any = (size % num_rows).astype(np.int32), size.astype(np.int32), size.astype(np.uint32)
    dropped = _num_steps(ring) - int(np.sum(np.asarray(rows.outcome) != NO_STEP))
    max_priority = cast(Any, np.asarray(saved.max_priority, np.float32))
    return SavedReplay(Ring(rows, *counters), leaves, max_priority), dropped


def _held(ring: Ring, segment: int) -> tuple[np.ndarray, slice]:
    """Returns where a segment's rows are in the ring, oldest first, `[size]`, and its lanes."""
    cursor, size = int(ring.cursor[segment]), int(ring.size[segment])
    lanes = slice(segment * ring.lanes_per_segment, (segment + 1) * ring.lanes_per_segment)
    return (cursor - size + np.arange(size)) % ring.num_rows, lanes


def _num_steps(ring: Ring) -> int:
    segments = (_held(ring, segment) for segment in range(len(ring.cursor)))
    return sum(int(np.sum(ring.rows.outcome[held, lanes] != NO_STEP)) for held, lanes in segments)


def _pieces_of(ring: Ring, outcome: np.ndarray, frame_stack: int) -> _Pieces:
    """Returns the pieces that hold a step, except those that begin with frames that miss others below them."""
    found = []
    for segment in range(len(ring.cursor)):
        held, lanes = _held(ring, segment)
        lane, end = np.nonzero(outcome[held, lanes].T == NO_STEP)  # lane by lane, oldest first
        is_oldest = np.diff(lane, prepend=-1) > 0
        length = end - np.where(is_oldest, -1, np.roll(end, 1))
        lacks_frames = is_oldest & (len(held) == ring.num_rows and frame_stack > 1)
        pieces = _Pieces(lane + lanes.start, held[end], length, len(held) - 1 - end)
        found.append([x[(length > 1) & ~lacks_frames] for x in pieces])
    return _Pieces(*(np.concatenate(x) for x in zip(*found, strict=True)))


def _deal(pieces: _Pieces, num_rows: int, num_lanes: int) -> _Places:
    """Returns places in lanes of `num_rows` rows: the newest is dealt first, each to the lane with the fewest rows."""
    lane, num_newer, num_kept = (np.zeros(len(pieces.age), np.int64) for _ in range(3))
    filled = np.zeros(num_lanes, np.int64)
    for i in np.argsort(pieces.age, kind="stable"):
        chosen = filled.argmin()
        kept = min(pieces.length[i], num_rows - filled[chosen])
        if not kept:
            break
        lane[i], num_newer[i], num_kept[i] = chosen, filled[chosen], kept
        filled[chosen] += kept
    return _Places(lane, num_newer, num_kept)


def _source(
    ring: Ring, pieces: _Pieces, places: _Places, num_rows: int, num_lanes: int, num_segments: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of each new segment, `[segments]`, and the old slot that each new one takes, -1 for none.

    The latter is `[rows held by the fullest segment, lanes]`.
    """
    length = np.bincount(places.lane, places.num_kept, num_lanes).astype(np.int64)
    order = np.argsort(-length, kind="stable")
    size = length[order].reshape(num_segments, -1).max(axis=1)
    lane = np.argsort(order)[places.lane]
    newest = size[lane // (num_lanes // num_segments)] - 1 - places.num_newer
    # One entry per row that is kept, its number counted back from the last of its piece.
    kept = places.num_kept
    back = np.arange(kept.sum()) - np.repeat(np.cumsum(kept) - kept, kept)
    old_row = (np.repeat(pieces.last_row, kept) - back) % ring.num_rows
    source = np.full((size.max(), num_lanes), -1, np.int64)
    source[np.repeat(newest, kept) - back, np.repeat(lane, kept)] = old_row * ring.num_lanes + np.repeat(
        pieces.lane, kept
    )
    return size, source


def _moved(buffer: np.ndarray, source: np.ndarray, num_rows: int, padding: Any) -> np.ndarray:
    """Returns `[num_rows, lanes, ...]` of what a buffer, `[old rows, old lanes, ...]`, holds in the source slots."""
    new = np.zeros((num_rows, source.shape[1], *buffer.shape[2:]), buffer.dtype)
    if padding:
        new[:] = padding
    # "clip" writes to `out` at once, where the default would go through a copy of it.
    flat = buffer.reshape(-1, *buffer.shape[2:])
    np.take(flat, source, axis=0, out=new[: len(source)], mode="clip")
    new[: len(source)][source < 0] = padding
    return new


def _leaves(
    rows: Row, size: np.ndarray, old: np.ndarray | tuple[()], max_priority: float, n_step: int, frame_stack: int
) -> np.ndarray:
    """Returns the leaf of each slot: 0 where `insert` would have left, or made, it 0.

    The newest `n_step` rows get theirs when rows to come complete their windows; the next `frame_stack - 1` to be
    overwritten have lost theirs.
    """
    outcome = np.asarray(rows.outcome)
    num_rows, num_lanes = outcome.shape
    first = np.maximum(size + frame_stack - 1 - num_rows, 0)
    row = np.arange(num_rows)[:, None]
    is_drawable = np.repeat((row >= first) & (row < size - n_step), num_lanes // len(size), axis=1)
    known = np.zeros(outcome.shape, np.float32) if isinstance(old, tuple) else old
    leaves = np.where(known > 0, known, np.float32(max_priority))
    return np.where(is_drawable & (outcome != NO_STEP), leaves, np.float32(0))
