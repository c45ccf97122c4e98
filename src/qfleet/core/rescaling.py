"""The rescaling of values, which squashes large returns and can be inverted exactly."""

import jax.numpy as jnp
from jax import Array

EPSILON = 1e-3
"""Weight of the linear term, which keeps the inverse Lipschitz continuous (Pohlen et al. 2018, proposition A.2)."""


def rescale(x: Array) -> Array:
    """Returns `h(x) = sign(x) (sqrt(|x| + 1) - 1) + EPSILON x`, of any shape.

    Source: Pohlen et al. 2018, arXiv 1805.11593, section 3.2.
    """
    # |x| / (sqrt(|x| + 1) + 1) is the same as sqrt(|x| + 1) - 1, but keeps the digits of a small x.
    return x / (jnp.sqrt(jnp.abs(x) + 1.0) + 1.0) + EPSILON * x


def unscale(x: Array) -> Array:
    """Returns the inverse of `rescale`, of any shape.

    Source: Pohlen et al. 2018, proposition A.2 (iii), in a form that keeps the digits of a small x.
    """
    size = jnp.abs(x)
    # With s = sqrt(|y| + 1), where y is the result, |x| = (s - 1) + EPSILON (s**2 - 1) is quadratic in s - 1.
    slope = 1.0 + 2.0 * EPSILON
    step = 2.0 * size / (slope + jnp.sqrt(slope * slope + 4.0 * EPSILON * size))
    return jnp.sign(x) * step * (step + 2.0)
