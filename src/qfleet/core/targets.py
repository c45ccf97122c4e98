"""Parts of the targets of Q-learning: lambda-returns, and the regularised policy of Munchausen.

Suffixes name time: `_tm1` is the state acted on, and `_t` is the state after it.
"""

import jax
import jax.numpy as jnp
from jax import Array


def soft_policy(q: Array, temperature: float, is_valid: Array | None = None) -> Array:
    """Returns the log-probabilities of the policy softmax(q / temperature): `[..., num_actions]` float, both.

    With `is_valid`, `[..., num_actions]` bool, of which one at least is True in each row, the policy takes valid
    actions only. The log-probability of the others is finite, but so low that the probability is 0.
    """
    if is_valid is None:
        return jax.nn.log_softmax(q / temperature, axis=-1)
    log_policy = jax.nn.log_softmax(jnp.where(is_valid, q / temperature, -jnp.inf), axis=-1)
    return jnp.where(is_valid, log_policy, jnp.finfo(q.dtype).min)


def munchausen_bonus(log_policy: Array, action: Array, temperature: float, weight: float, clip: float) -> Array:
    """Returns what is added to the reward of an action: its scaled log-probability, at least `clip`.

    Args:
      log_policy: `[..., num_actions]` float, of the policy softmax(q / temperature) where the action was taken.
      action: `[...]` int.
      temperature: in units of discounted reward.
      weight: alpha, in [0, 1].
      clip: the least scaled log-probability, below 0.

    Source: Vieillard et al. 2020, arXiv 2007.14430, equation 1 and section 3 ("clipping").
    """
    return weight * jnp.clip(temperature * take_action(log_policy, action), clip, 0.0)


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
