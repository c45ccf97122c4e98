"""A learner in pieces: cut and joined, and what each piece does to its part of the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_servers import config_of, learner_of

from qfleet.core.learner import ELEMENTWISE
from qfleet.core.sharded_learner import TargetUpdateTracker, piece_bounds, to_tree, to_vector


@pytest.mark.parametrize("num_pieces", [2, 3])
@pytest.mark.parametrize("hidden_sizes", [(8,), (160, 160)], ids=["one vector", "many arrays"])
@pytest.mark.parametrize("optimiser", ELEMENTWISE)
def test_a_learner_divided_and_joined_is_the_same(optimiser, hidden_sizes, num_pieces):
    config = config_of(optimiser=optimiser, hidden_sizes=hidden_sizes, num_server_shards=num_pieces)
    sharded = learner_of(config)
    shapes = jax.eval_shape(sharded.init, np.uint32(0))
    random = np.random.default_rng(0)
    whole = jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), shapes)
    again = sharded.join(sharded.split(whole))
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_the_vector_of_a_tree_gives_the_tree():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": [jnp.float32(7), jnp.ones(2)]}
    vector = to_vector(tree)
    np.testing.assert_array_equal(vector, [0, 1, 2, 3, 4, 5, 7, 1, 1])
    jax.tree.map(np.testing.assert_array_equal, to_tree(vector, tree), tree)
    assert piece_bounds(10, 3) == [(0, 3), (3, 6), (6, 10)]


def test_the_clock_moves_when_the_target_network_does():
    tracker = TargetUpdateTracker(3)
    assert [tracker.advance() for _ in range(7)] == [False, False, True, False, False, True, False]
    assert [tracker.advance(n) for n in (1, 2, 2, 7)] == [False, True, True, True] and tracker.age == 1
