"""Moves a saved replay to a ring of another shape, for a run that resumes with other lanes, rows or segments.

This runs on the host, in NumPy. It first decides which slot of the old ring each slot of the new ring takes, and then
copies every array once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from qfleet.core.replay.replay import SavedReplay
from qfleet.core.replay.ring import NO_STEP, Ring, Row, cut
from qfleet.core.replay.window import Window


class _Pieces(NamedTuple):
    """Runs of rows of one lane that end in a final observation: an episode, or the part of it that is left.

    Each field is `[pieces]` int.
    """

    lane: np.ndarray
    last_row: np.ndarray
    """Row of the final observation in the old ring."""
    length: np.ndarray
    """Number of rows. The last one holds no step."""
    age: np.ndarray
    """Number of rows that its segment has inserted since."""


class _Places(NamedTuple):
    """The places of the pieces in the new ring. Each field is `[pieces]` int."""

    lane: np.ndarray
    num_newer: np.ndarray
    """Number of rows after it in its new lane."""
    num_kept: np.ndarray
    """Number of its rows that are kept, which are its newest ones; 0 if the piece is dropped."""


def resharded(
    saved: SavedReplay,
    num_rows: int,
    num_lanes: int,
    num_segments: int,
    *,
    window: Window,
    is_prioritised: bool,
) -> tuple[SavedReplay, int]:
    """Returns the replay in a ring of another shape, and the number of steps that it lost on the way.

    The result is what a replay would hold if its lanes had seen the same episodes, and all of its environments started
    new ones now. Each lane is closed after its newest row, as `cut` closes it, and is never joined with another lane.
    Episodes stay whole, and the older ones come first in each lane. The lanes of a segment share a cursor, so the
    shorter ones begin with rows that hold no step. A uniform draw that meets such a row must be repeated; to keep them
    few, lanes of similar length share a segment.

    Three kinds of steps are lost:

    - the newest step of each lane, because the observation that it led to wasn't saved;
    - if the ring is full and frames are stacked, the rest of each lane's oldest episode, because the frames before it
      have been overwritten;
    - the oldest episodes, if there is no room for them. If there is room for a part of one, its newest rows are kept.
      They fill the lane, so its segment is full, and a full ring starts no transition from rows that lack frames.

    Args:
      saved: the replay, in NumPy or JAX. It is not changed.
      num_rows: rows that the new ring can hold.
      num_lanes: lanes of each row, over all segments.
      num_segments: segments of the new ring. All have the same number of lanes.
      window: the rows of a sample of the resumed run.
      is_prioritised: whether the new replay needs leaves. Transitions keep theirs. Those that had none enter with the
        greatest priority.

    Returns:
      The replay, as NumPy arrays, and the number of lost steps.
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
    pieces = _pieces_of(ring, outcome, window.frame_stack)
    places = _deal(pieces, num_rows, num_lanes)
    size, source = _source(ring, pieces, places, num_rows, num_lanes, num_segments)

    move: Callable[..., Any] = functools.partial(_moved, source=source, num_rows=num_rows)
    rows = Row(
        obs=move(ring.rows.obs),
        action=move(ring.rows.action),
        reward=move(ring.rows.reward),
        outcome=move(outcome, padding=NO_STEP),
        carry=jax.tree.map(move, ring.rows.carry),
    )
    leaves: Any = ()
    if is_prioritised:
        old = () if isinstance(saved.leaves, tuple) else move(np.asarray(saved.leaves))
        leaves = _leaves(rows, size, old, float(saved.max_priority), window)
    counters: Any = (size % num_rows).astype(np.int32), size.astype(np.int32), size.astype(np.uint32)
    dropped = _num_steps(ring) - int(np.sum(np.asarray(rows.outcome) != NO_STEP))
    max_priority = cast(Any, np.asarray(saved.max_priority, np.float32))
    return SavedReplay(Ring(rows, *counters), leaves, max_priority), dropped


def _held(ring: Ring, segment: int) -> tuple[np.ndarray, slice]:
    """Returns the rows of the ring that a segment has filled, oldest first, `[size]`, and the segment's lanes."""
    cursor, size = int(ring.cursor[segment]), int(ring.size[segment])
    lanes = slice(segment * ring.lanes_per_segment, (segment + 1) * ring.lanes_per_segment)
    return (cursor - size + np.arange(size)) % ring.num_rows, lanes


def _num_steps(ring: Ring) -> int:
    """Returns the number of steps that the ring holds."""
    segments = (_held(ring, segment) for segment in range(len(ring.cursor)))
    return sum(int(np.sum(ring.rows.outcome[held, lanes] != NO_STEP)) for held, lanes in segments)


def _pieces_of(ring: Ring, outcome: np.ndarray, frame_stack: int) -> _Pieces:
    """Returns the pieces that hold a step, except those whose first rows have lost the frames below them."""
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
    """Returns a place for each piece in lanes of `num_rows` rows.

    The newest piece is placed first, and each piece goes to the lane with the fewest rows so far.
    """
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
    """Returns the number of rows of each new segment, `[segments]`, and the old slot that each new slot takes.

    The old slots are `[rows held by the fullest segment, lanes]` int64, -1 where the new slot stays empty.
    """
    length = np.bincount(places.lane, places.num_kept, num_lanes).astype(np.int64)
    order = np.argsort(-length, kind="stable")
    size = length[order].reshape(num_segments, -1).max(axis=1)
    lane = np.argsort(order)[places.lane]
    newest = size[lane // (num_lanes // num_segments)] - 1 - places.num_newer
    # One entry for each row that is kept: its distance from the last row of its piece.
    kept = places.num_kept
    back = np.arange(kept.sum()) - np.repeat(np.cumsum(kept) - kept, kept)
    old_row = (np.repeat(pieces.last_row, kept) - back) % ring.num_rows
    source = np.full((size.max(), num_lanes), -1, np.int64)
    source[np.repeat(newest, kept) - back, np.repeat(lane, kept)] = old_row * ring.num_lanes + np.repeat(
        pieces.lane, kept
    )
    return size, source


def _moved(buffer: np.ndarray, source: np.ndarray, num_rows: int, padding: Any = 0) -> np.ndarray:
    """Returns what a buffer, `[old rows, old lanes, ...]`, holds in the source slots, as `[num_rows, lanes, ...]`."""
    new = np.zeros((num_rows, source.shape[1], *buffer.shape[2:]), buffer.dtype)
    if padding:
        new[:] = padding
    # With "clip", NumPy writes straight into `out`. With the default mode it would write into a copy first.
    flat = buffer.reshape(-1, *buffer.shape[2:])
    np.take(flat, source, axis=0, out=new[: len(source)], mode="clip")
    new[: len(source)][source < 0] = padding
    return new


def _leaves(
    rows: Row, size: np.ndarray, old: np.ndarray | tuple[()], max_priority: float, window: Window
) -> np.ndarray:
    """Returns the leaf of each slot, `[rows, lanes]` float32: 0 where `insert` would have left it at 0, or set it to 0.

    The newest `window.num_after` rows get a leaf later, when further rows complete their windows. The `frame_stack - 1`
    rows that are overwritten next have already lost theirs.
    """
    outcome = np.asarray(rows.outcome)
    num_rows, num_lanes = outcome.shape
    first = np.maximum(size + window.frame_stack - 1 - num_rows, 0)
    row = np.arange(num_rows)[:, None]
    is_drawable = (row >= first) & (row < size - window.num_after) & (row % window.period == 0)
    known = np.zeros(outcome.shape, np.float32) if isinstance(old, tuple) else old
    leaves = np.where(known > 0, known, np.float32(max_priority))
    is_step = outcome != NO_STEP
    holds_step = np.zeros_like(is_step)
    for i in range(window.first_learned, window.first_learned + window.num_learned):
        holds_step |= np.roll(is_step, -i, axis=0)
    return np.where(np.repeat(is_drawable, num_lanes // len(size), axis=1) & holds_step, leaves, np.float32(0))
