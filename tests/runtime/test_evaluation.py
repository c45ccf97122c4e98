"""Greedy episodes: their returns are those of whole episodes, each counted once."""

import jax
import jax.numpy as jnp
import numpy as np
import probes

from qfleet.core.types import Params
from qfleet.envs.registry import make_env
from qfleet.runtime.evaluation import greedy_returns


def constant_q(params: Params, obs: jax.Array) -> jax.Array:
    return jnp.broadcast_to(params, (obs.shape[0], len(params)))


def test_an_episode_counts_up_to_its_time_limit() -> None:
    env = probes.time_limit(steps=5)
    returns = greedy_returns(env, constant_q, jnp.zeros(1), jax.random.key(0), 3)
    np.testing.assert_array_equal(returns, [5.0, 5.0, 5.0])


def test_a_step_after_the_end_does_not_count() -> None:
    env = probes.delayed_reward()  # stepped further than its end, it would go on to give rewards of 1
    returns = greedy_returns(env, constant_q, jnp.zeros(1), jax.random.key(0), 4)
    np.testing.assert_array_equal(returns, np.ones(4))


def test_actions_are_the_greedy_ones() -> None:
    env = probes.action_reward()
    for q, expected in (([1.0, 0.0], -1.0), ([0.0, 1.0], 1.0)):
        returns = greedy_returns(env, constant_q, jnp.array(q), jax.random.key(0), 2)
        np.testing.assert_array_equal(returns, [expected, expected])


def test_episodes_of_different_lengths_each_count_their_own_steps() -> None:
    env = make_env("CartPole-v1")
    returns = np.asarray(greedy_returns(env, constant_q, jnp.array([0.0, 1.0]), jax.random.key(0), 32))
    assert len(set(returns.tolist())) > 1
    assert np.all((returns >= 8) & (returns <= 11))  # pushed one way, the pole falls within 8 to 11 steps


def test_the_key_decides_the_episodes() -> None:
    env = probes.observation_reward()
    first, again, other = (
        np.asarray(greedy_returns(env, constant_q, jnp.zeros(1), jax.random.key(i), 64)) for i in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
