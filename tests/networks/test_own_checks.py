"""What is checked of a user's own parts before training, and that parts that copy ours do what ours do."""

import jax
import numpy as np
import pytest
from small_servers import batch_of

from qfleet.config import AgentConfig, ConfigError
from qfleet.core.agent import make_agent
from qfleet.core.exploration import make_explore
from qfleet.core.keys import Draws
from qfleet.envs.spec import EnvSpec
from qfleet.networks import check_own_parts, make_network

SPEC = EnvSpec(name="small", observation_shape=(4,), observation_dtype=np.dtype(np.float32), num_actions=2)


def own(name):
    return f"small_parts:{name}"


def check(*, computes=True, **settings):
    config = AgentConfig(hidden_sizes=(8,), **settings)
    check_own_parts(SPEC, config, computes=computes)


GOOD = [
    {"head": own("scalar")},
    {"head": own("atoms"), "own_options": {"num": 5}},
    {"target": own("double_target")},
    {"target": own("double_target"), "head": "c51", "num_atoms": 5},
    {"target": own("munchausen_like_target"), "head": "iqn", "num_quantiles": 4, "num_cosines": 4},
    {"exploration": own("explorer"), "exploration_end": 0.0},
    {"network": own("plain_network"), "head": own("scalar"), "target": own("double_target")},
]


@pytest.mark.parametrize("settings", GOOD)
def test_parts_that_keep_the_contract_pass(settings):
    check(**settings)


BAD = [
    ("head", "no_such", "small_parts has no no_such"),
    ("head", "scalr", "small_parts has no scalr. Did you mean scalar"),
    ("head", "NOT_A_FUNCTION", "got small_parts:NOT_A_FUNCTION, a int; put it into one"),
    ("head", "two_arguments", r"must name a function of \(config\), .*missing a required argument: 'other'"),
    ("network", "scalar", r"must name a function of \(spec, config\), .*too many positional arguments"),
    ("head", "raising", "which raised KeyError: 'no such thing'"),
    ("head", "returns_none", "returns a qfleet.core.heads.Head .* returned None"),
    ("target", "returns_none", r"returns target\(head, batch, outputs\), .* returned a NoneType"),
    ("exploration", "returns_none", r"returns explore\(q, exploration, uniform\), .* returned a NoneType"),
    ("network", "returns_none", "returns a qfleet.Network, .* returned a NoneType"),
    ("head", "head_of_wrong_shape", r"q_values\(outputs\) must return float32\[3, 2\] here, got float32\[3\]"),
    ("head", "head_of_wrong_loss", r"must return SampleLosses, each of its fields float32\[3\] here, got float32\[\]"),
    ("head", "head_with_an_if", "must be traceable by JAX, got ValueError: The truth value .*; compute with jax.numpy"),
    ("head", "head_that_counts", "the same each time that JAX traces it, got something else the second time"),
    ("head", "head_that_draws", "the same each time that JAX traces it, got something else the second time"),
    ("head", "head_that_keeps_tracers", "must be traceable by JAX, got TracerArrayConversionError"),
    ("target", "target_of_wrong_shape", r"must return Values, .* float32\[3, values\] each, got float32\[3\]"),
    ("target", "target_of_three", r"must return Values, .* float32\[5, values\] each, got .*float32\[3, 1\]"),
    ("head", "head_of_three", r"must return SampleLosses, each of its fields float32\[5\] here, got .*float32\[3\]"),
    ("exploration", "explorer_of_three", r"must return actions, int32\[5\] here, got int32\[3\]"),
    ("network", "network_of_three", r"must map .* to action values float32\[5, 2\], got float32\[3, 2\]"),
    ("exploration", "explorer_of_floats", r"must return actions, int32\[3\] here, got float32\[3\]"),
    ("network", "network_of_wrong_shape", r"must map .* to action values float32\[3, 2\], got float32\[3, 1\]"),
]


@pytest.mark.parametrize(("setting", "name", "message"), BAD)
def test_a_part_that_can_not_be_used_is_refused_without_computing(setting, name, message):
    with pytest.raises(ConfigError, match=f"(?s)^(a )?{setting} .*{message}"):
        check(computes=False, **{setting: own(name)})


BAD_NUMBERS = [
    ("head", "head_that_is_not_finite", r"loss\(outputs, action, target\) must return finite numbers, got nan"),
    ("head", "head_with_an_infinite_gradient", "must have a finite gradient by its outputs, got nan"),
    ("head", "head_without_a_gradient", "must depend on its outputs differentiably, got a gradient of 0 everywhere"),
    ("target", "target_of_wrong_weights", r"must return weights that add up to 1, got \[0.0, 0.0, 0.0\]"),
    ("target", "target_that_is_not_finite", r"must return finite values, got \[\[nan"),
    ("exploration", "explorer_out_of_range", r"must return actions from 0 to 1, got \["),
    ("network", "network_that_is_not_finite", r"apply\(params, observations\) must return finite numbers, got nan"),
    ("network", "network_that_does_not_learn", "must depend on its params differentiably"),
]


@pytest.mark.parametrize(("setting", "name", "message"), BAD_NUMBERS)
def test_a_part_that_returns_bad_numbers_is_refused(setting, name, message):
    with pytest.raises(ConfigError, match=f"^{setting} small_parts:{name}: .*{message}"):
        check(**{setting: own(name)})
    check(computes=False, **{setting: own(name)})  # this can't be seen in a trace


def test_parts_that_copy_ours_learn_and_act_as_ours_do():
    usual = AgentConfig(hidden_sizes=(8,), double=True)
    copied = AgentConfig(
        hidden_sizes=(8,), head=own("scalar"), target=own("double_target"), network=own("network"),
        exploration=own("explorer"),
    )  # fmt: skip
    scaled = AgentConfig(hidden_sizes=(8,), head=own("scalar"), double=True, own_options={"scale": 2.0})
    agents = [make_agent(make_network(SPEC, config), config) for config in (usual, copied, scaled)]
    params, target_params = (agents[0].init(jax.random.key(i)) for i in range(2))
    batch, draws = batch_of(16, 0), Draws(jax.random.key(2), jax.random.split(jax.random.key(3), 16))
    grads = [
        jax.jit(jax.grad(lambda params, agent=agent: agent.loss(params, target_params, batch, draws)[0]))(params)
        for agent in agents
    ]
    jax.tree.map(np.testing.assert_array_equal, grads[0], grads[1])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(2 * x, y, rtol=1e-5), grads[0], grads[2])
    assert make_explore(copied) is make_explore(usual)


def test_a_target_of_ones_own_needs_no_more_than_it_uses():
    """XLA drops the outputs that a target doesn't ask for, so it costs what the built-in one does."""
    costs = []
    for settings in ({"double": True}, {"target": own("double_target")}):
        config = AgentConfig(hidden_sizes=(64,), **settings)
        agent = make_agent(make_network(SPEC, config), config)
        params = jax.eval_shape(agent.init, jax.random.key(0))
        compiled = jax.jit(lambda *a, agent=agent: agent.loss(*a)[0]).lower(params, params, batch_of(16, 0)).compile()
        costs.append(compiled.cost_analysis()["flops"])
    assert costs[0] == costs[1]
