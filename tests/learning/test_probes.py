"""Learns every probe environment from end to end, and compares the values with those worked out by hand.

The probes are ordered: the first one that fails says what is wrong (see `probes`).
"""

import functools

import numpy as np
import probes
import pytest

from qfleet.config import AgentConfig, FusedConfig, TrainConfig
from qfleet.networks import make_network
from qfleet.topologies.fused.topology import Fused

pytestmark = pytest.mark.slow

DISCOUNT = 0.8
NUM_ENVS = 8

make_agent_config = functools.partial(
    AgentConfig,
    discount=DISCOUNT,
    hidden_sizes=(32,),
    layer_norm=True,
    exploration_start=0.5,
    exploration_end=0.5,
    learning_rate=2e-2,
    learning_rate_schedule="linear",
    batch_size=64,
    replay_capacity=2_000,
    warmup_env_steps=200,
    env_steps_per_learner_step=8,
    target_update_period=20,
)

AGENTS = {
    "pqn": make_agent_config(replay="none", num_epochs=4, learning_rate_learner_steps=1_500),
    "dqn": make_agent_config(learning_rate_learner_steps=2_000),
    "prioritised_double_n_step": make_agent_config(
        replay="prioritised",
        double=True,
        dueling=True,
        n_step=3,
        target_update_period=1,
        target_update_rate=0.05,
        importance_exponent_env_steps=8_000,
        learning_rate_learner_steps=2_000,
    ),
}
ENV_STEPS = {"pqn": 48_000, "dqn": 16_000, "prioritised_double_n_step": 16_000}

PROBES = [
    (probes.constant_reward, {probes.FIRST: [1.0]}),
    (probes.observation_reward, {-1.0: [-1.0], 1.0: [1.0]}),
    (probes.delayed_reward, {probes.FIRST: [DISCOUNT], probes.SECOND: [1.0]}),
    (probes.action_reward, {probes.FIRST: [-1.0, 1.0]}),
    (probes.observation_action_reward, {-1.0: [1.0, -1.0], 1.0: [-1.0, 1.0]}),
    (probes.time_limit, {probes.FIRST: [1 / (1 - DISCOUNT)]}),
]


IMPLIED = (probes.constant_reward, probes.observation_reward, probes.action_reward)
"""Whatever fails these also fails a probe after them. So one agent is enough to tell which part is wrong."""

CASES = [
    pytest.param(probe, values, kind, id=f"{probe.__name__}-{kind}")
    for probe, values in PROBES
    for kind in (["dqn"] if probe in IMPLIED else AGENTS)
]


@pytest.mark.parametrize(("probe", "values", "kind"), CASES)
def test_the_values_of_a_probe_are_learned(probe, values, kind):
    env, agent = probe(), AGENTS[kind]
    network = make_network(env.spec, agent)
    config = TrainConfig(env=env.spec.name, agent=agent, topology=FusedConfig(num_envs=NUM_ENVS), eval_episodes=1)
    fused = Fused(config, env, network)
    fused.start()
    while fused.env_steps < ENV_STEPS[kind]:
        fused.advance(ENV_STEPS[kind])
    learned = network.apply(fused.params, np.array(list(values), np.float32)[:, None])
    np.testing.assert_allclose(learned, list(values.values()), atol=0.05)
