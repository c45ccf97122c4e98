"""Parts of an agent of a user's own, good and bad ones, which tests name as small_parts:NAME."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from qfleet.core.exploration import epsilon_greedy
from qfleet.core.heads import backed_up, make_head, point_values, scalar_head
from qfleet.core.losses import huber_loss
from qfleet.core.targets import take_action
from qfleet.core.types import Network
from qfleet.networks import make_network

NOT_A_FUNCTION = 3


def init(key):
    return jax.random.normal(key, (4, 2))


def scalar(config):
    """The built-in head, as a user would write it."""
    return scalar_head(lambda error: config.own_options.get("scale", 1.0) * huber_loss(error, 1.0))


def double_target(config):
    """The built-in target of double Q-learning."""

    def target(head, batch, outputs):
        action = jnp.argmax(head.q_values(outputs.online_t), axis=-1)
        return backed_up(batch.reward, batch.discount, head.values_of(outputs.target_t, action))

    return target


def munchausen_like_target(config):
    """Uses the outputs for the observations acted on."""

    def target(head, batch, outputs):
        both = jnp.minimum(head.q_values(outputs.online_tm1), head.q_values(outputs.target_tm1))
        return point_values(batch.reward + take_action(both, batch.action))

    return target


def explorer(config):
    return epsilon_greedy


def network(spec, config):
    return make_network(spec, type(config)(hidden_sizes=config.hidden_sizes))


def plain_network(spec, config):
    return Network(init, lambda params, x: x @ params)


def atoms(config):
    """A head with several outputs for each action, whose mean is the value."""
    return make_head(type(config)(head="qr", num_quantiles=config.own_options["num"]))


# --- What breaks the contract ---


def two_arguments(config, other):
    return scalar(config)


def raising(config):
    raise KeyError("no such thing")


def returns_none(*arguments):
    return None


def head_of_wrong_shape(config):
    return scalar(config)._replace(q_values=lambda q: q[:, 0])


def head_of_wrong_loss(config):
    return scalar(config)._replace(loss=lambda q, action, target: jnp.mean(q))


def head_with_an_if(config):
    return scalar_head(lambda error: error if error > 0 else -error)


def head_that_is_not_finite(config):
    return scalar_head(lambda error: jnp.log(error - 100.0))


def head_with_an_infinite_gradient(config):
    return scalar_head(lambda error: jnp.sqrt(error - error) + error)


def head_without_a_gradient(config):
    return scalar_head(lambda error: jnp.round(jax.lax.stop_gradient(error)))


_count = itertools.count()


def head_that_counts(config):
    return scalar_head(lambda error: error * next(_count))


_kept = []


def head_that_keeps_tracers(config):
    def loss(error):
        _kept.append(error)
        return error + _kept[0]

    return scalar_head(loss)


def head_that_draws(config):
    return scalar_head(lambda error: error + np.random.default_rng().normal(size=error.shape))


def target_of_wrong_shape(config):
    return lambda head, batch, outputs: batch.reward


def target_of_wrong_weights(config):
    return lambda head, batch, outputs: point_values(batch.reward)._replace(weight=jnp.zeros((len(batch.reward), 1)))


def target_that_is_not_finite(config):
    return lambda head, batch, outputs: point_values(jnp.log(-1 - batch.reward))


def explorer_of_floats(config):
    return lambda q, exploration, uniform: jnp.max(q, axis=-1)


def explorer_out_of_range(config):
    return lambda q, exploration, uniform: jnp.argmax(q, axis=-1).astype(jnp.int32) + 2


def network_that_is_not_finite(spec, config):
    return Network(init, lambda params, x: jnp.log(-jnp.abs(x @ params) - 1.0))


def network_that_does_not_learn(spec, config):
    return Network(init, lambda params, x: jnp.round(x @ params))


def network_of_wrong_shape(spec, config):
    return Network(init, lambda params, x: (x @ params)[:, :1])


def head_of_three(config):
    return scalar(config)._replace(
        loss=lambda q, action, target: jax.tree.map(lambda x: x[:3], scalar(config).loss(q, action, target))
    )


def target_of_three(config):
    return lambda head, batch, outputs: point_values(jnp.zeros(3))


def explorer_of_three(config):
    return lambda q, exploration, uniform: jnp.zeros(3, jnp.int32)


def network_of_three(spec, config):
    return Network(init, lambda params, x: (x @ params)[:3])
