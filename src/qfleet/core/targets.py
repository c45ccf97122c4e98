"""Regression targets of Q-learning, for one transition or one lane. Use `jax.vmap` for more.

Suffixes name time: `_tm1` is the state acted on, and `_t` is the state after it.
"""

import jax
import jax.numpy as jnp
from jax import Array


def q_target(r_t: Array, discount_t: Array, q_t: Array) -> Array:
    """Returns the target of `q_tm1[a_tm1]`: the reward plus the discounted greatest next value.

    Args:
      r_t: `[]` float, sum of the k <= n rewards, each discounted to time t-1.
      discount_t: `[]` float, discount**k, or 0 if the episode terminated on the way.
      q_t: `[num_actions]` float, the target network's values of the last state, in units of discounted reward.

    Returns:
      `[]` float. No gradient flows through it.
    Source: Mnih et al. 2015, Nature 518, algorithm 1.
    """
    return jax.lax.stop_gradient(r_t + discount_t * jnp.max(q_t))


def double_q_target(r_t: Array, discount_t: Array, q_online_t: Array, q_target_t: Array) -> Array:
    """Returns the target of `q_tm1[a_tm1]`: the online network picks the next action, the target network values it.

    Args:
      r_t: `[]` float, sum of the k <= n rewards, each discounted to time t-1.
      discount_t: `[]` float, discount**k, or 0 if the episode terminated on the way.
      q_online_t: `[num_actions]` float, the online network's values of the last state.
      q_target_t: `[num_actions]` float, the target network's values of it.

    Returns:
      `[]` float. No gradient flows through it.
    Raises:
      ValueError: if the two value vectors differ in shape (when tracing, so free at run time).
    Source: van Hasselt, Guez and Silver 2016, arXiv 1509.06461, section "Double DQN".
    """
    if q_online_t.shape != q_target_t.shape:
        raise ValueError(f"online and target values must have one shape, got {q_online_t.shape} and {q_target_t.shape}")
    return jax.lax.stop_gradient(r_t + discount_t * take_action(q_target_t, jnp.argmax(q_online_t)))


def lambda_returns(r_t: Array, discount_t: Array, v_t: Array, lambda_t: Array) -> Array:
    """Returns the lambda-return from each step of a sequence, `G_t = r_t + discount_t ((1 - l) v_t + l G_{t+1})`.

    The caller cuts traces: where `lambda_t` is 0, the return bootstraps from `v_t` and looks no further.

    Args:
      r_t: `[time, ...]` float, the reward of each step.
      discount_t: `[time, ...]` float, the discount after the step, or 0 if it terminated the episode.
      v_t: `[time, ...]` float, the value of the state after the step.
      lambda_t: `[time, ...]` float in [0, 1].

    Returns:
      `[time, ...]` float. No gradient flows through it.
    Source: Sutton and Barto 2018, section 12.1; for Q-learning without replay: Gallici et al. 2024, section 4.
    """

    def step(g_t: Array, inputs: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        r, discount, v, trace = inputs
        g_tm1 = r + discount * ((1.0 - trace) * v + trace * g_t)
        return g_tm1, g_tm1

    _, returns = jax.lax.scan(step, v_t[-1], (r_t, discount_t, v_t, lambda_t), reverse=True)
    return jax.lax.stop_gradient(returns)


def take_action(q: Array, action: Array) -> Array:
    """Returns `q[action]`. Its gradient is a product, because a scatter is slow on a CPU.

    Args:
      q: `[..., num_actions]` float.
      action: `[...]` int.

    Returns:
      `[...]` float.
    """
    return jnp.sum(q * jax.nn.one_hot(action, q.shape[-1], dtype=q.dtype), axis=-1)
