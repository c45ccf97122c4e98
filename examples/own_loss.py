"""Adds an idea from a paper without a fork: conservative Q-learning's regulariser, as a head in a module of one's own.

    python examples/own_loss.py [--env-steps N] [--run-dir DIR]
    cd examples && qfleet train CartPole-v1 --preset dqn --head own_loss:conservative --own-options cql_weight 0.1

The loss gains `weight * (logsumexp_a q(s, a) - q(s, a_taken))`, which keeps the values of other actions low.
Source: Kumar et al. 2020, arXiv 2006.04779, equation 4 (CQL(H)), which learns from a fixed data set.
"""

import argparse

import jax

import qfleet
from qfleet.core.heads import Head, SampleLosses, Values, scalar_head
from qfleet.core.losses import make_loss
from qfleet.core.targets import take_action


def conservative(config: qfleet.AgentConfig) -> Head:
    """Returns the head for Q-values, with the regulariser in its loss."""
    head, weight = scalar_head(make_loss(config)), config.own_options.get("cql_weight", 0.1)

    def loss(q: jax.Array, action: jax.Array, target: Values) -> SampleLosses:
        found = head.loss(q, action, target)
        return found._replace(loss=found.loss + weight * (jax.nn.logsumexp(q, axis=-1) - take_action(q, action)))

    return head._replace(loss=loss)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--env-steps", type=int, default=100_000)
    parser.add_argument("--run-dir")
    options = {"head": "own_loss:conservative", "own_options": {"cql_weight": 0.1}, **vars(parser.parse_args())}
    summary = qfleet.train(qfleet.make_config("CartPole-v1", "double_dqn", **options))
    print(f"after {summary['env_steps']:,} environment steps: mean return {summary['eval_return_mean']:.0f}")
