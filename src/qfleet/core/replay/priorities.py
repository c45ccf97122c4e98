"""An array sum tree: proportional sampling and priority updates, at a cost that hardly grows with the replay.

Each node is the sum of its `FAN_OUT` children, and each level is one flat array. Siblings lie side by side, so a step
down the tree reads one short row per draw. After an update, the sums above it are computed again from their children.
Nothing is incremented, so nothing drifts.

Source: Schaul et al. 2016, arXiv 1511.05952, section 3.3 and appendix B.2.1 (a binary tree there).
"""

import dataclasses

import jax
import jax.numpy as jnp

FAN_OUT = 8  # the fastest of 4, 8, 16, 32, 64 and 128 on a CPU, for batches of 512 from 1M leaves


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SumTree:
    """Priorities of `num_leaves` slots, and the sums over them."""

    levels: tuple[jax.Array, ...]
    """Float32 vectors: the leaves, then the sums of `FAN_OUT` neighbours each, down to one last group.

    Each vector is padded with zeros to whole groups. The levels are stored flat and viewed as rows to read them,
    because XLA copies a level that is stored as rows at every update of a single leaf.
    """
    num_leaves: int = dataclasses.field(metadata={"static": True})


def init_tree(num_leaves: int) -> SumTree:
    """Returns a tree of `num_leaves` zeros, at least one. It takes 8/7 of the memory of its leaves."""
    groups = [-(-num_leaves // FAN_OUT)]
    while groups[-1] > 1:
        groups.append(-(-groups[-1] // FAN_OUT))
    return SumTree(tuple(jnp.zeros(n * FAN_OUT, jnp.float32) for n in groups), num_leaves)


def tree_of(leaves: jax.Array) -> SumTree:
    """Returns the tree over these leaves, `[n]` float32. It equals the tree in which each of them was set."""
    empty = init_tree(len(leaves))
    levels = [jnp.pad(leaves, (0, empty.levels[0].size - len(leaves)))]
    for level in empty.levels[1:]:
        sums = _row_sums(levels[-1].reshape(-1, FAN_OUT))
        levels.append(jnp.pad(sums, (0, level.size - len(sums))))
    return SumTree(tuple(levels), len(leaves))


def set_leaves(tree: SumTree, indices: jax.Array, values: jax.Array) -> SumTree:
    """Returns the tree with `values` at `indices`; in place if the tree is donated or carried through a loop.

    Args:
      tree: the tree.
      indices: `[n]` integers. An index outside `[0, num_leaves)` is dropped, so a caller can use one to mask a late
        update. If an index occurs several times, one of its values is set: the last one on a CPU, any on a GPU.
      values: `[n]` float32, non-negative and finite. Their total must be finite too. A leaf of 0 is never drawn.
    """
    leaves, *sums = tree.levels
    indices = indices.astype(jnp.uint32)  # a negative index becomes greater than any leaf's
    leaves = leaves.at[jnp.where(indices < tree.num_leaves, indices, jnp.uint32(leaves.size))].set(values, mode="drop")
    # For a dropped index, any leaf will do: computing a sum again is right whether or not a child changed.
    nodes = jnp.minimum(indices, jnp.uint32(tree.num_leaves - 1))
    levels = [leaves]
    for level in sums:
        rows = levels[-1].reshape(-1, FAN_OUT)
        nodes = nodes // jnp.uint32(FAN_OUT)
        if len(rows) <= len(nodes):
            level = jnp.pad(_row_sums(rows), (0, level.size - len(rows)))
        else:
            level = level.at[nodes].set(_row_sums(_take(rows, nodes)), mode="promise_in_bounds")
        levels.append(level)
    return SumTree(tuple(levels), tree.num_leaves)


def get_leaves(tree: SumTree, indices: jax.Array) -> jax.Array:
    """Returns the values at `indices`, `[n]` float32. The indices are `[n]` integers in `[0, num_leaves)`."""
    return _take(tree.levels[0], indices)


def total(tree: SumTree) -> jax.Array:
    """Returns the sum of all leaves, `[]` float32."""
    return tree.levels[-1].sum()


def find_leaves(tree: SumTree, targets: jax.Array) -> jax.Array:
    """Returns the leaf that each target falls on if the leaves are laid end to end: `[n]` float32 to `[n]` uint32.

    It is the leaf `i` with `sum(leaves[:i]) <= target < sum(leaves[:i + 1])`, up to float32 rounding. It is never a
    leaf of 0, whatever the rounding: a target at or beyond the total finds the last leaf above 0. In a tree without a
    leaf above 0, the result is leaf 0.
    """
    child = jnp.arange(FAN_OUT, dtype=jnp.uint32)
    nodes = jnp.zeros(targets.shape, jnp.uint32)
    for level in reversed(tree.levels):
        rows = level.reshape(-1, FAN_OUT)
        # Both orders give the same numbers. The one that adds up fewer rows is faster.
        starts = _take(_row_starts(rows), nodes) if len(rows) <= len(nodes) else _row_starts(_take(rows, nodes))
        # The first sibling above 0 starts at exactly 0, so there is always one to choose, and the rest of the target is
        # never negative. A search for the *end* of a sibling could stop at a leaf of 0 after rounding.
        chosen = jnp.max(jnp.where(starts <= targets[:, None], child, jnp.uint32(0)), axis=1)
        targets = targets - jnp.take_along_axis(starts, chosen[:, None], axis=1, mode="promise_in_bounds")[:, 0]
        nodes = nodes * jnp.uint32(FAN_OUT) + chosen
    return nodes


def sample_leaves(
    tree: SumTree,
    uniforms: jax.Array,
    totals: jax.Array,
    rank: jax.Array,
    num_draws: jax.Array | int | None = None,
    first: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns leaves drawn in proportion to their values, one from each equal slice of the total (stratified sampling).

    There may be several trees, of which this is one. They are laid end to end, and leaves are drawn as from one tree.

    Args:
      tree: the tree.
      uniforms: `[n]` float32 in [0, 1), the position of each draw in its slice.
      totals: `[trees]` float32, `total` of each tree. Their sum must be above 0.
      rank: `[]` uint32, the number of this tree among them.
      num_draws: `[]`, the number of slices; n by default. Draws beyond it mean nothing.
      first: `[]`, the slice of the first draw.

    Returns:
      The indices, `[n]` uint32, ascending, which mean nothing if they are in another tree; whether each is in this
      tree, `[n]` bool; and the probabilities, `[n]` float32, each leaf's share of the total over all trees.
    """
    ends = jnp.cumsum(totals)
    whole = ends[-1]
    slices = (first + jnp.arange(len(uniforms))).astype(jnp.float32)
    # Rounding must not move a target beyond the end, because the last trees may be empty.
    width = whole / (len(uniforms) if num_draws is None else jnp.maximum(num_draws, 1))
    targets = jnp.minimum((slices + uniforms) * width, jnp.nextafter(whole, 0.0))
    owners = jnp.sum(ends[:-1] <= targets[:, None], axis=1, dtype=jnp.uint32)
    starts = jnp.concatenate([jnp.zeros(1), ends[:-1]])
    indices = find_leaves(tree, targets - starts[owners])
    return indices, owners == rank, get_leaves(tree, indices) / whole


def _take(array: jax.Array, indices: jax.Array) -> jax.Array:
    return array.at[indices].get(mode="promise_in_bounds")


# Both functions multiply by ones and zeros: on a CPU a small matrix product takes half the time of a reduction or a
# cumulative sum. It is exact only at the highest precision. A GPU's default would round the priorities to 10 bits.


def _row_sums(rows: jax.Array) -> jax.Array:
    """Returns the sum of each row: `[n, FAN_OUT]` to `[n]`."""
    return jnp.dot(rows, jnp.ones(FAN_OUT, jnp.float32), precision="highest")


def _row_starts(rows: jax.Array) -> jax.Array:
    """Returns for each element the sum of those before it in its row, or infinity if it is 0: `[n, FAN_OUT]`."""
    before = jnp.dot(rows, jnp.triu(jnp.ones((FAN_OUT, FAN_OUT), jnp.float32), k=1), precision="highest")
    return jnp.where(rows > 0, before, jnp.inf)
