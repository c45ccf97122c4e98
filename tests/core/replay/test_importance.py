"""How the importance weights of a batch are normalised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.config import AgentConfig
from qfleet.core.replay import CONTINUED, Row, make_replay, normalise_weights
from qfleet.core.replicas import over_axis
from qfleet.core.types import EnvSpec, Transition


def batch_of(*weights: float) -> Transition:
    return Transition(*(jnp.zeros(len(weights)),) * 5, weight=jnp.array(weights))


@pytest.mark.parametrize(("normalisation", "expected"), [("none", [2.0, 2 / 3]), ("batch_max", [1.0, 1 / 3])])
def test_two_transitions_worked_out_by_hand(normalisation, expected):
    """TD errors of 1 and 3: the second is drawn with probability 3/4, and (2 * 1/4) ** -1 = 2, (2 * 3/4) ** -1 = 2/3.

    The four draws are from the quarters of the whole, of which the first belongs to the first transition.
    """
    config = AgentConfig(
        replay="prioritised", priority_exponent=1.0, batch_size=4, replay_capacity=8,
        importance_normalisation=normalisation,
    )  # fmt: skip
    spec = EnvSpec(name="x", observation_shape=(), observation_dtype=np.dtype(np.float32), num_actions=2)
    replay = make_replay(spec, config, 1)
    state = replay.init()
    for t in range(3):
        row = Row(np.float32([t]), np.zeros(1, np.int32), np.zeros(1, np.float32), np.full(1, CONTINUED))
        state = replay.insert(state, row, 0, np.float32([[np.nan], [1], [3]])[t])
    transition = replay.sample(state, jax.random.key(0), jnp.float32(1)).transition
    np.testing.assert_array_equal(transition.obs, [0, 1, 1, 1])
    np.testing.assert_allclose(transition.weight, [expected[0], *expected[1:] * 3], rtol=1e-5)


def test_replicas_divide_by_the_greatest_weight_of_all_of_them():
    """A half batch that was divided by its own greatest weight would count for more than it does in the whole."""
    config = AgentConfig(replay="prioritised", importance_normalisation="batch_max")
    whole = batch_of(0.5, 0.25, 0.125, 4.0, 1.0, 2.0, 0.25, 1.5)
    halves = jax.tree.map(lambda x: x.reshape(2, 4), whole)
    apart = jax.vmap(lambda half: normalise_weights(half, config, over_axis("replica", 2)), axis_name="replica")(halves)
    together = normalise_weights(whole, config).weight
    np.testing.assert_array_equal(together, whole.weight / 4)
    np.testing.assert_array_equal(apart.weight.reshape(-1), together)


@pytest.mark.parametrize("replay", ["uniform", "none"])
def test_weights_of_other_replays_are_left_alone(replay):
    """A uniform replay that holds no transition gives all draws the weight 0, by which nothing can be divided."""
    config = AgentConfig(replay=replay, importance_normalisation="batch_max")
    np.testing.assert_array_equal(normalise_weights(batch_of(0.0, 0.0), config).weight, 0)
