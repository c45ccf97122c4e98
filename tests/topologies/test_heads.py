"""Heads, noise, memories and normalisation: all is the same in every topology, and goes on after a resume."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from small_servers import BATCH, batch_of, config_of, pulled

import qfleet
from qfleet.config import AgentConfig, FusedConfig, MeshConfig, OverlappedConfig, TrainConfig
from qfleet.envs.host import HostEnv, HostStep
from qfleet.envs.in_graph import draw_step_keys, init_lanes, step_lanes
from qfleet.envs.registry import make_env
from qfleet.networks import make_network
from qfleet.topologies.actor_learner.learner import GlobalLearner
from qfleet.topologies.fleet.actor import Actor
from qfleet.topologies.fused.topology import Fused
from qfleet.topologies.overlapped.topology import Overlapped
from qfleet.topologies.parameter_server.server_shard import ServerShard
from qfleet.topologies.parameter_server.worker import Worker

NUM_ENVS, ROWS = 4, 16

REPLAY = {"batch_size": 16, "replay_capacity": 800, "warmup_env_steps": 100, "env_steps_per_learner_step": 8}

AGENTS = {
    "rainbow": AgentConfig(
        **REPLAY, replay="prioritised", head="c51", num_atoms=11, noisy=True, dueling=True, double=True, n_step=3,
        exploration_start=0.0, exploration_end=0.0, hidden_sizes=(16,),
    ),
    "munchausen_iqn": AgentConfig(
        **REPLAY, head="iqn", munchausen=True, num_quantiles=4, num_cosines=8, hidden_sizes=(16,),
        exploration_max_duration=8, normalise_observations=True, normalise_rewards=True,
    ),
    "noisy_pqn": AgentConfig(
        replay="none", rollout_length=ROWS, num_minibatches=4, noisy=True, head="hl_gauss", hidden_sizes=(16,),
        exploration_start=0.0, exploration_end=0.0, normalise_observations=True, normalise_rewards=True,
    ),
    "r2d2": AgentConfig(
        **{**REPLAY, "batch_size": 4}, replay="prioritised", memory="lstm", memory_size=4, burn_in=2, sequence_length=6,
        double=True, n_step=2, value_rescaling=True, hidden_sizes=(8,),
    ),
    "recurrent_pqn": AgentConfig(
        replay="none", rollout_length=ROWS, num_minibatches=2, memory="gru", memory_size=8, head="iqn", num_quantiles=4,
        num_cosines=8, hidden_sizes=(16,), exploration_start=0.5, exploration_end=0.5, exploration_max_duration=8,
    ),
}  # fmt: skip


class InGraphLanes:
    """Host lanes of an environment written in JAX, with the random numbers that the fused program would draw."""

    def __init__(self, env, num_lanes, seed):
        self._env, self._num_lanes, self._row = env, num_lanes, 0
        _, lanes_key, self._key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0), 3)
        self._lanes = init_lanes(env, lanes_key, jnp.arange(num_lanes))
        self._draw = jax.jit(lambda key: draw_step_keys(env, key, ROWS, jnp.arange(num_lanes)))
        self._step = jax.jit(functools.partial(step_lanes, env))

    def reset(self, seed):
        return np.array(self._lanes.observation)

    def send(self, action):
        if self._row % ROWS == 0:
            self._key, env_key, _, _ = jax.random.split(self._key, 4)
            self._draws = self._draw(env_key)
        draws = jax.tree.map(lambda x: x[self._row % ROWS], self._draws)
        self._row += 1
        self._lanes, self._result = self._step(self._lanes, action, draws)

    def recv(self):
        nobody = np.zeros(self._num_lanes, bool)
        return HostStep(np.array(self._lanes.observation), *map(np.array, self._result), failed=nobody)

    def close(self):
        pass


def make(kind, topology, seed=3):
    env = probes.random_walk()
    config = TrainConfig(env="test", agent=AGENTS[kind], topology=topology, seed=seed, eval_episodes=5)
    network = make_network(env.spec, config.agent)
    if isinstance(topology, FusedConfig):
        made = Fused(config, env, network)
    else:
        host = HostEnv(env.spec, *[lambda num_lanes, options: InGraphLanes(env, num_lanes, seed)] * 2)
        made = Overlapped(config, host, network)
    made.start()
    return made


@functools.cache
def started(kind):
    """Returns a run in the fused topology that all tests of this agent share, and its first state."""
    fused = make(kind, FusedConfig(num_envs=NUM_ENVS))
    return fused, jax.tree.map(jnp.copy, fused.state), fused.counters


def fresh(kind):
    """Returns the shared run at its start again: it is traced and compiled only once."""
    fused, state, counters = started(kind)
    fused.restore(jax.tree.map(jnp.copy, state), counters)
    return fused


def advance(topology, num_iterations):
    for _ in range(num_iterations):
        topology.advance(topology.env_steps + 1)
    return jax.device_get(topology.params)


def assert_close(x, y):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-5), x, y)


@pytest.mark.parametrize("kind", AGENTS)
def test_overlapped_in_lock_step_draws_what_the_fused_program_does(kind):
    """With `profile` the learner step is compiled in parts, which must draw the same too."""
    fused = fresh(kind)
    first = jax.device_get(fused.params)
    learned = advance(fused, 6)
    assert fused.learner_steps > 0
    moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), first, learned)
    assert all(jax.tree.leaves(moved)), "every parameter learns, those of the noise included"
    overlapped = make(
        kind, OverlappedConfig(num_envs=NUM_ENVS, lock_step=True, profile=kind in ("munchausen_iqn", "noisy_pqn"))
    )
    assert_close(advance(overlapped, 6), learned)
    overlapped.close()


@pytest.mark.parametrize("kind", ["noisy_pqn", "recurrent_pqn"])
def test_a_mesh_draws_what_one_device_does(kind):
    """Without a replay all of a run is the same on any mesh: noise, episodes and minibatches."""
    mesh = FusedConfig(num_envs=NUM_ENVS, mesh=MeshConfig(data=2, model=2))
    assert_close(advance(make(kind, mesh), 4), advance(fresh(kind), 4))


def test_a_mesh_stores_the_states_that_one_device_does_and_learns_from_them():
    """The rows before the first learner step are the same on any mesh."""
    rings = []
    for fused in (fresh("r2d2"), make("r2d2", FusedConfig(num_envs=NUM_ENVS, mesh=MeshConfig(data=2)))):
        advance(fused, 1)
        rings.append(jax.device_get(fused.state["replay"].ring))
    assert np.any(rings[0].rows.carry[:ROWS] != 0)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *rings)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(advance(fused, 3)))
    assert fused.learner_steps > 0


@pytest.mark.parametrize("kind", ["rainbow", "munchausen_iqn", "recurrent_pqn", "r2d2"])
def test_a_resumed_run_draws_what_the_whole_one_does(kind):
    whole, resumed = fresh(kind), make(kind, FusedConfig(num_envs=NUM_ENVS), seed=9)
    advance(whole, 4)
    resumed.restore(jax.tree.map(jnp.copy, whole.state), whole.counters)
    jax.tree.map(np.testing.assert_array_equal, advance(resumed, 4), advance(whole, 4))


def fleet_config(env="CartPole-v1", **settings):
    settings = {"replay": "prioritised", "head": "iqn", "num_quantiles": 4, "noisy": True, **settings}
    return config_of(env, preset="dqn", exploration_start=0.0, exploration_end=0.0, **settings)


@pytest.mark.parametrize("env", ["CartPole-v1", "gym:CartPole-v1"])
def test_an_actor_explores_by_noise_and_leaves_priorities_that_it_can_not_know_to_the_learner(env):
    """Both actors have the same parameters, and no epsilon."""
    chunks = {}
    for noisy in (True, False):
        config = fleet_config(env, noisy=noisy)
        actor = Actor(config, 0)
        network = make_network(make_env(env).spec, config.agent)
        leaves = jax.tree.leaves(network.init(jax.random.key(0)))
        actor.begin(0)
        actor.receive(0, [np.asarray(leaf) for leaf in leaves])
        chunks[noisy] = [actor.collect(0.0)[1] for _ in range(3)]
        actor.close()
    assert all(np.isnan(chunk.td_error).all() for chunk in chunks[True])
    changes = {noisy: switches([chunk.rows.action for chunk in each]) for noisy, each in chunks.items()}
    assert changes[True] > 2 * changes[False], "noise is drawn anew for each step and lane"


def test_an_actor_repeats_random_actions():
    changes = {}
    for max_duration, settings in ((1, {}), (100, {"exploration_duration_exponent": 1.0})):
        config = config_of("gym:CartPole-v1", preset="dqn", exploration_max_duration=max_duration, **settings)
        actor = Actor(config, 0)
        params = make_network(make_env(config.env).spec, config.agent).init(jax.random.key(0))
        actor.begin(0)
        actor.receive(0, [np.asarray(leaf) for leaf in jax.tree.leaves(params)])
        changes[max_duration] = switches([actor.collect(1.0)[1].rows.action for _ in range(10)])
        actor.close()
    assert 2 * changes[100] < changes[1]


def switches(actions):
    """Returns how often a lane's action differs from the one before."""
    actions = np.concatenate([np.asarray(each) for each in actions])
    return int(np.sum(actions[1:] != actions[:-1]))


def test_the_learner_of_a_fleet_draws_anew_in_each_step_and_again_after_a_resume():
    config = qfleet.make_config(
        "CartPole-v1", "dqn", "actor-learner", head="iqn", num_quantiles=4, batch_size=BATCH, hidden_sizes=(16,)
    )
    learner = GlobalLearner(config)
    size = learner._num_batches * BATCH
    whole, places = jax.tree.map(np.asarray, batch_of(size, 0)), [np.arange(size)]
    same = jax.tree.map(lambda x: np.repeat(x[:1], size, axis=0), whole)
    _, (priorities,) = learner.learn(places, same)
    assert len(np.unique(priorities[:BATCH])) == BATCH, "each sample has fractions of its own"
    steps, leaves = learner.state()
    resumed = GlobalLearner(config)
    resumed.restore(steps, leaves)
    for again, expected in zip(resumed.learn(places, whole)[1], learner.learn(places, whole)[1], strict=True):
        np.testing.assert_array_equal(again, expected)


def test_each_gradient_of_a_worker_draws_anew():
    config = fleet_config(num_replay_shards=1, munchausen=True)
    batch, places = batch_of(BATCH, 0), [np.arange(BATCH)]
    worker = Worker(config, 0)
    worker.pull(0, *pulled([ServerShard(config, 0)]))
    first, second = (worker.compute_gradient_of(places, (batch,)) for _ in range(2))
    assert not np.allclose(first.pieces[0], second.pieces[0])
    assert np.all(first.priorities[0] >= 0), "the priority is the loss"
