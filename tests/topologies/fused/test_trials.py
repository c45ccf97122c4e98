"""Trials in one program learn what each of them learns alone, and can be saved and restored one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest

from qfleet.config import AgentConfig, FusedConfig, RunFailed, TrainConfig
from qfleet.core.numbers import Numbers
from qfleet.topologies.fused.topology import Fused
from qfleet.topologies.fused.trials import FusedTrial, FusedTrials
from qfleet.topologies.fused.trials_on_devices import INPUTS, program_key

ENV = probes.random_walk()

NUM_ENVS = 4
CHUNK = NUM_ENVS * 16

AGENTS = {
    "pqn": AgentConfig(replay="none", rollout_length=16, num_minibatches=4, exploration_env_steps=1000),
    "prioritised": AgentConfig(
        replay="prioritised",
        n_step=3,
        double=True,
        batch_size=16,
        replay_capacity=300,
        warmup_env_steps=50,
        env_steps_per_learner_step=2.5,
        target_update_period=1,
        target_update_rate=0.05,
        exploration_env_steps=1000,
        importance_exponent_env_steps=1000,
    ),
}

VALUES = {
    "pqn": [
        {"learning_rate": 1e-3, "discount": 0.9, "trace_decay": 0.5, "exploration_end": 0.05},
        {"learning_rate": 1e-2, "discount": 0.99, "trace_decay": 0.9, "exploration_end": 0.3},
    ],
    "prioritised": [
        {"learning_rate": 1e-3, "discount": 0.9, "target_update_rate": 0.05, "priority_exponent": 0.6},
        {"learning_rate": 1e-2, "target_update_rate": 0.5, "priority_exponent": 0.2, "importance_exponent_start": 0.9},
        {"learning_rate": 3e-4, "exploration_start": 0.5, "exploration_schedule": "exponential"},
    ],
}
"""Settings of the trials of each kind of agent."""


def configs_of(kind, **settings):
    return [
        TrainConfig(
            env="probe",
            agent=dataclasses.replace(AGENTS[kind], **values),
            topology=FusedConfig(num_envs=NUM_ENVS),
            eval_episodes=5,
            **settings,
        )
        for values in VALUES[kind]
    ]


def together(configs):
    whole = dataclasses.replace(configs[0], num_seeds=len(configs) * configs[0].num_seeds)
    trials = FusedTrials(whole, configs, ENV, probes.linear_network(ENV.spec))
    found = [FusedTrial(trials, i) for i in range(len(configs))]
    for trial in found:
        trial.start()
    return found


def alone(config):
    fused = Fused(config, ENV, probes.linear_network(ENV.spec))
    fused.start()
    return fused


def advance(fused, until):
    records = []
    while fused.env_steps < until:
        records.append(fused.advance(until))
    return records


def advance_all(trials, until):
    """Trains all trials in turn, and returns the records of each."""
    records = [[] for _ in trials]
    while trials[0].env_steps < until:
        for trial, own in zip(trials, records, strict=True):
            own.append(trial.advance(until))
    return records


def assert_close(left, right):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), left, right)


@pytest.mark.parametrize(("kind", "num_seeds"), [("pqn", 1), ("pqn", 2), ("prioritised", 1)])
def test_a_trial_learns_beside_others_what_it_learns_alone(kind, num_seeds):
    """After some hundred learner steps, with every number that a program takes as an input."""
    steps = 16 * CHUNK
    configs = configs_of(kind, num_seeds=num_seeds, seed=3)
    trials = together(configs)
    records = advance_all(trials, steps)
    assert trials[0].learner_steps > 100
    for trial, config, own in zip(trials, configs, records, strict=True):
        lone = alone(config)
        of_lone = advance(lone, steps)
        assert trial.counters == lone.counters
        assert_close(trial.params, lone.params)
        assert jax.tree.map(jnp.shape, trial.state) == jax.tree.map(jnp.shape, lone.state)
        assert sum(each.num_episodes for each in own) == sum(each.num_episodes for each in of_lone)
        assert own[-1].exploration == of_lone[-1].exploration
        np.testing.assert_allclose(trial.evaluate(5).returns, lone.evaluate(5).returns, rtol=1e-2, atol=1e-3)
        assert trial.replay_measures() == pytest.approx(lone.replay_measures(), rel=1e-2)
    with pytest.raises(AssertionError):
        assert_close(trials[0].params, trials[1].params)


def test_every_input_is_varied_in_these_tests():
    assert {name for values in VALUES.values() for each in values for name in each} >= {*Numbers._fields}


def test_trials_go_on_from_their_own_checkpoints():
    """A trial that has none isn't trained any more, and the others don't miss it."""
    configs = configs_of("prioritised")
    trials = together(configs)
    advance_all(trials, 6 * CHUNK)
    saved = [(trial.state, trial.counters) for trial in trials]
    advance_all(trials, 9 * CHUNK)
    expected = [trial.state for trial in trials]
    again = together(configs)
    for trial, (state, counters) in list(zip(again, saved, strict=True))[1:]:
        trial.restore(state, counters)
    advance_all(again[1:], 9 * CHUNK)
    for trial, state in list(zip(again, expected, strict=True))[1:]:
        assert_close(trial.params, state["learner"].params)
        assert int(trial.state["replay"].ring.insertions[0]) == int(state["replay"].ring.insertions[0])


def test_a_trial_that_diverges_fails_alone():
    configs = configs_of("pqn")
    agent = dataclasses.replace(configs[0].agent, learning_rate=1e38, max_gradient_norm=None, loss="squared")
    other = dataclasses.replace(agent, learning_rate=1e-3)
    trials = together([dataclasses.replace(configs[0], agent=each) for each in (agent, other)])
    for _ in range(20):
        try:
            trials[0].advance(40 * CHUNK)
        except RunFailed:
            break
        trials[1].advance(40 * CHUNK)
    else:
        pytest.fail("the first trial never diverged")
    assert np.isfinite(trials[1].advance(40 * CHUNK).loss)


def test_only_trials_that_differ_in_inputs_share_a_program():
    first, second, _ = configs_of("prioritised")
    assert program_key(first) == program_key(second) is not None
    for name in ("batch_size", "n_step"):
        assert program_key(dataclasses.replace(first, agent=dataclasses.replace(first.agent, **{name: 2}))) != (
            program_key(first)
        )
    copied = dataclasses.replace(first, agent=dataclasses.replace(first.agent, target_update_rate=1.0))
    assert program_key(copied) != program_key(first)
    own = dataclasses.replace(first.agent, exploration="module:function")
    assert program_key(dataclasses.replace(first, agent=own)) is None
    assert {*INPUTS} <= {field.name for field in dataclasses.fields(first.agent)}
