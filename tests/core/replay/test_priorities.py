"""The sum tree against a plain list of priorities."""

import bisect
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.core.replay.priorities import FAN_OUT, find_leaves, get_leaves, init_tree, sample_leaves, set_leaves, total

SIZES = [1, 7, 8, 9, 100, 512, 513, 5000]  # on either side of whole groups of `FAN_OUT`, and of one more level

find = jax.jit(find_leaves)
put = jax.jit(set_leaves)


@jax.jit
def sample(tree, uniforms):
    return sample_leaves(tree, uniforms, total(tree)[None], jnp.uint32(0))


def assert_levels_agree(tree):
    """Asserts that every node is the sum of its children, and that all padding is 0."""
    for children, sums in itertools.pairwise(tree.levels):
        expected = np.asarray(children, np.float64).reshape(-1, FAN_OUT).sum(axis=1)
        np.testing.assert_allclose(sums[: len(expected)], expected, rtol=1e-6)
        assert not np.any(sums[len(expected) :])
    assert not np.any(tree.levels[0][tree.num_leaves :])
    assert tree.levels[-1].size == FAN_OUT


@pytest.mark.parametrize("num_leaves", SIZES)
def test_random_updates_and_searches_equal_those_of_a_list(num_leaves):
    """The priorities are whole numbers, so float32 sums are exact and the answers must be equal, not just close."""
    dice = random.Random(num_leaves)
    leaves = [0] * num_leaves
    tree = init_tree(num_leaves)
    for _ in range(30):
        indices = [dice.randrange(num_leaves) for _ in range(20)]
        values = {index: dice.choice([0, 0, 1, 2, 7, 1000]) for index in indices}
        keep = {index: dice.random() < 0.8 for index in indices}
        tree = put(
            tree,
            jnp.array([index if keep[index] else dice.choice([-1, num_leaves]) for index in indices]),
            jnp.array([float(values[index]) for index in indices]),
        )
        for index in values:
            if keep[index]:
                leaves[index] = values[index]
        assert_levels_agree(tree)
        assert total(tree) == sum(leaves)
        np.testing.assert_array_equal(get_leaves(tree, jnp.arange(num_leaves)), leaves)
        if any(leaves):
            targets = [dice.randrange(sum(leaves)) + dice.choice([0, 0.5]) for _ in range(50)]
            ends = list(itertools.accumulate(leaves))
            expected = [bisect.bisect_right(ends, target) for target in targets]
            np.testing.assert_array_equal(find(tree, jnp.array(targets, jnp.float32)), expected)


@pytest.mark.parametrize("num_leaves", SIZES)
def test_indices_outside_the_tree_change_nothing(num_leaves):
    """Not even indices that would fall on the padding, or that would count from the end in Python."""
    tree = put(init_tree(num_leaves), jnp.arange(num_leaves), jnp.arange(1.0, num_leaves + 1))
    outside = [num_leaves, num_leaves + 1, num_leaves + FAN_OUT, 10**9, 2**31 - 1, -1, -num_leaves, -(2**31)]
    after = put(tree, jnp.array(outside, jnp.int32), jnp.full(len(outside), 1e6))
    jax.tree.map(np.testing.assert_array_equal, after, tree)


def test_dropped_updates_leave_the_others_alone():
    """A batch has one valid update among masked ones, and only the valid one has an effect."""
    tree = put(init_tree(1000), jnp.array([3, 1000, 1003, -1]), jnp.full(4, 2.0))
    assert total(tree) == 2.0
    assert find(tree, jnp.array([1.0])) == 3
    assert_levels_agree(tree)


def test_one_of_equal_indices_wins_and_the_sums_follow_it():
    tree = put(init_tree(1000), jnp.array([7, 7, 7, 900]), jnp.array([1.0, 2.0, 4.0, 8.0]))
    (winner,) = get_leaves(tree, jnp.array([7]))
    assert winner in (1.0, 2.0, 4.0)
    assert total(tree) == winner + 8.0
    assert_levels_agree(tree)


@pytest.mark.parametrize("seed", range(5))
def test_a_leaf_of_zero_is_never_found_whatever_the_rounding(seed):
    """Priorities span 60 orders of magnitude, among zeros. Targets are on, beside and beyond every boundary."""
    rng = np.random.default_rng(seed)
    leaves = (10.0 ** rng.uniform(-30, 30, 2000)).astype(np.float32)
    leaves[rng.uniform(size=2000) < 0.7] = 0.0
    tree = put(init_tree(2000), jnp.arange(2000), jnp.asarray(leaves))
    whole = np.asarray(total(tree))
    ends = np.cumsum(leaves, dtype=np.float32)
    targets = np.concatenate([
        ends, np.nextafter(ends, np.float32(np.inf)), np.nextafter(ends, np.float32(0)), rng.uniform(0, whole, 2000),
        [0.0, whole, np.nextafter(whole, np.float32(0)), 2 * whole],
    ]).astype(np.float32)  # fmt: skip
    found = find(tree, jnp.asarray(targets))
    assert np.all(leaves[found] > 0)


def test_a_single_leaf_above_zero_is_found_wherever_it_stands():
    """Its neighbours and all padding are 0, and a draw of 1 - 2**-24 scales to the total itself."""
    for index in [0, 1, 7, 8, 63, 64, 511, 512, 998, 999]:
        tree = put(init_tree(1000), jnp.array([index]), jnp.array([0.1]))
        indices, _, probabilities = sample(tree, jnp.full(64, 1 - 2.0**-24))
        assert np.all(indices == index)
        assert np.all(probabilities == 1.0)


def test_found_leaves_hold_their_targets_within_rounding():
    """For uneven priorities of ordinary size, the exact interval of the leaf is at most 1e-6 of the total away."""
    rng = np.random.default_rng(0)
    leaves = rng.exponential(size=100_003).astype(np.float32)
    tree = put(init_tree(100_003), jnp.arange(100_003), jnp.asarray(leaves))
    whole = float(total(tree))
    targets = rng.uniform(0, whole, 10_000).astype(np.float32)
    found = np.asarray(find(tree, jnp.asarray(targets)))
    ends = np.cumsum(leaves, dtype=np.float64)
    assert np.all(ends[found] - leaves[found] <= targets + 1e-6 * whole)
    assert np.all(targets <= ends[found] + 1e-6 * whole)


def test_sampled_frequencies_follow_the_priorities():
    """Chi-square over 40 leaves, 5 of them 0. Batches have one draw, because strata would even the counts out."""
    rng = np.random.default_rng(1)
    leaves = rng.exponential(size=40).astype(np.float32)
    leaves[[0, 8, 9, 20, 39]] = 0.0
    tree = put(init_tree(40), jnp.arange(40), jnp.asarray(leaves))
    draws = jax.vmap(lambda key: sample(tree, jax.random.uniform(key, (1,))))
    indices, _, probabilities = jax.jit(draws)(jax.random.split(jax.random.key(0), 40_000))
    shares = leaves.astype(np.float64) / leaves.sum(dtype=np.float64)
    np.testing.assert_allclose(probabilities[:, 0], shares[indices[:, 0]], rtol=1e-6)
    expected = 40_000 * shares
    counts = np.bincount(indices[:, 0], minlength=40)
    assert np.all(counts[expected == 0] == 0)
    possible = expected > 0
    chi_square = np.sum((counts - expected)[possible] ** 2 / expected[possible])
    assert chi_square < 65.2  # 34 degrees of freedom, p = 0.001


def test_a_batch_draws_once_from_each_equal_slice_of_the_total():
    """Sampling is stratified: with `k` equal leaves and `k` draws, each leaf is drawn exactly once, in order."""
    tree = put(init_tree(512), jnp.arange(512), jnp.ones(512))
    indices, _, probabilities = sample(tree, jax.random.uniform(jax.random.key(0), (512,)))
    np.testing.assert_array_equal(indices, np.arange(512))
    np.testing.assert_allclose(probabilities, 1 / 512)


def test_trees_side_by_side_equal_separate_ones():
    def run(key):
        def step(tree, key):
            place_key, value_key, draw_key = jax.random.split(key, 3)
            indices = jax.random.randint(place_key, (64,), -10, 710)
            tree = set_leaves(tree, indices, jax.random.exponential(value_key, (64,)))
            return tree, sample(tree, jax.random.uniform(draw_key, (16,)))

        return jax.lax.scan(step, init_tree(700), jax.random.split(key, 10))

    keys = jax.random.split(jax.random.key(0), 3)
    together_tree, (together_indices, _, _) = jax.jit(jax.vmap(run))(keys)
    for i, key in enumerate(keys):
        alone_tree, (alone_indices, _, _) = jax.jit(run)(key)
        for together, alone in zip(together_tree.levels, alone_tree.levels, strict=True):
            np.testing.assert_allclose(together[i], alone, rtol=1e-6)
        np.testing.assert_array_equal(together_indices[i], alone_indices)


def test_sums_do_not_drift_over_ten_thousand_updates():
    """Each of eight passes over all leaves sets values a hundredth as large. Nothing of the first may remain."""
    rng = np.random.default_rng(2)
    indices = np.concatenate([rng.permutation(10_000).reshape(-1, 8) for _ in range(8)])
    scales = np.repeat(10.0 ** np.arange(6, -10, -2), len(indices) // 8)
    values = (scales[:, None] * rng.uniform(0.5, 1.5, indices.shape)).astype(np.float32)

    @jax.jit
    def run(tree, indices, values):
        return jax.lax.scan(lambda tree, update: (set_leaves(tree, *update), None), tree, (indices, values))[0]

    tree = run(init_tree(10_000), jnp.asarray(indices), jnp.asarray(values))
    leaves = np.zeros(10_000)
    leaves[indices[-1250:]] = values[-1250:]
    np.testing.assert_array_equal(get_leaves(tree, jnp.arange(10_000)), leaves)
    np.testing.assert_allclose(total(tree), leaves.sum(), rtol=1e-5)
    assert_levels_agree(tree)


def test_an_update_writes_in_place_when_the_tree_is_donated():
    """Otherwise each update would copy the leaves, which takes 40 times as long as the update itself for 1M leaves."""
    tree = init_tree(100_000)
    compiled = jax.jit(set_leaves, donate_argnums=0).lower(tree, jnp.arange(64), jnp.ones(64)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= tree.levels[0].nbytes
    assert memory.temp_size_in_bytes < tree.levels[0].nbytes / 2


@pytest.mark.parametrize("num_updates", [1, 64])
def test_an_update_in_a_loop_copies_no_level(num_updates):
    def run(tree, batches):
        return jax.lax.scan(lambda tree, i: (set_leaves(tree, i, jnp.ones(num_updates)), None), tree, batches)[0]

    tree = init_tree(100_000)
    batches = jnp.zeros((10, num_updates), jnp.int32)
    compiled = jax.jit(run, donate_argnums=0).lower(tree, batches).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tree.levels[0].nbytes / 2
