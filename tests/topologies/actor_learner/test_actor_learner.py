"""The actor-learner topology: what each of its classes does by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_fleets import BATCH, config_of

import qfleet
from qfleet.config import ActorLearnerConfig, AgentConfig, ConfigError, MeshConfig, TrainConfig
from qfleet.core.replay import NO_STEP, DrawShare
from qfleet.envs.registry import make_env
from qfleet.networks import make_network
from qfleet.topologies.actor_learner import learner as learner_module
from qfleet.topologies.actor_learner.learner import GlobalLearner, batches_per_round
from qfleet.topologies.fleet import actor as actor_module
from qfleet.topologies.fleet import replay_shard as shard_module
from qfleet.topologies.fleet.actor import Actor, Chunk
from qfleet.topologies.fleet.env_and_agent import make_env_and_agent
from qfleet.topologies.fleet.rate_limiter import CHUNKS_AHEAD, RateLimiter
from qfleet.topologies.fleet.replay_shard import ReplayShard, Writer
from qfleet.topologies.fleet.replay_shares import deal, join_shards, share_of


def leaves_for(config: TrainConfig, seed: int = 0) -> list[np.ndarray]:
    network = make_network(make_env(config.env, **config.env_options).spec, config.agent)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(network.init(jax.random.key(seed)))]


def actor_of(config: TrainConfig, number: int = 0, incarnation: int = 0) -> Actor:
    actor = Actor(config, number)
    actor.begin(incarnation)
    actor.receive(1, leaves_for(config))
    return actor


# --- Actors ---


@pytest.mark.parametrize("env", ["CartPole-v1", "gym:CartPole-v1"])
def test_chunks_follow_each_other_whatever_makes_the_environments(env):
    config = config_of(env)
    actor = actor_of(config)
    chunks = [actor.collect(1.0)[1] for _ in range(10)]  # of random actions, so that episodes are short
    rows = jax.tree.map(lambda *x: np.concatenate(x), *(chunk.rows for chunk in chunks))
    error = np.concatenate([chunk.td_error for chunk in chunks])
    actor.close()
    assert rows.obs.shape == (80, 2, 4) and rows.outcome.shape == error.shape == (80, 2)
    assert np.all(np.isnan(error[:3])), "what an actor completes first was not its own"
    for lane in range(2):
        ends = np.flatnonzero(rows.outcome[:-1, lane] != 0)
        assert len(ends) > 2
        for t in range(79):
            if rows.outcome[t, lane] in (1, 2):
                assert rows.outcome[t + 1, lane] == NO_STEP
            elif rows.outcome[t, lane] == 0:  # CartPole's position moves by its speed, 0.02 s of it
                position, speed = rows.obs[t, lane, :2]
                np.testing.assert_allclose(rows.obs[t + 1, lane, 0], position + 0.02 * speed, atol=1e-5)
    # An action's error is the reward and the discounted next value, less its own, by the parameters that it acted with.
    network = make_network(make_env(config.env).spec, config.agent)
    params = jax.tree.unflatten(jax.tree.structure(network.init(jax.random.key(0))), leaves_for(config))
    q = np.asarray(network.apply(params, jnp.asarray(rows.obs.reshape(-1, 4)))).reshape(80, 2, 2)
    for t, lane in np.ndindex(76, 2):
        if np.all(rows.outcome[t : t + 3, lane] == 0):
            target = sum(0.99**i * rows.reward[t + i, lane] for i in range(3)) + 0.99**3 * q[t + 3, lane].max()
            own = target - q[t, lane, rows.action[t, lane]]
            np.testing.assert_allclose(error[t + 3, lane], own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("initial_priorities", ["td_error", "greatest"])
def test_new_transitions_enter_with_the_actors_errors_or_with_the_greatest_priority_so_far(initial_priorities):
    config = config_of("CartPole-v1", num_actors=1, num_replay_shards=1, initial_priorities=initial_priorities)
    actor, shard = actor_of(config), ReplayShard(config, 0)
    for number in range(3):
        shard.insert(0, Writer(0, number), actor.collect(1.0)[1])
    actor.close()
    priorities = np.unique(shard.state.tree.levels[0])
    assert (set(priorities) == {0.0, 1.0}) == (initial_priorities == "greatest"), priorities


def test_initial_priorities_are_refused_where_no_replay_has_any():
    with pytest.raises(ConfigError, match=r"initial_priorities must be left out with a replay that isn't prioritised"):
        config_of(replay="uniform", initial_priorities="greatest")


def test_actors_explore_by_an_epsilon_each_of_a_ladder():
    topology = ActorLearnerConfig(num_actors=4)
    epsilons = [topology.epsilon(i) for i in range(4)]
    np.testing.assert_allclose(epsilons, [0.4**1, 0.4 ** (1 + 7 / 3), 0.4 ** (1 + 14 / 3), 0.4**8])
    assert ActorLearnerConfig(num_actors=1).epsilon(0) == 0.4
    config = config_of(rows_per_chunk=400)
    explored = actor_of(config).collect(1.0)[1].rows.action
    assert 0.4 < explored.mean() < 0.6
    chunk = actor_of(config).collect(epsilons[3])[1]
    network = make_network(make_env(config.env).spec, config.agent)
    params = jax.tree.unflatten(jax.tree.structure(network.init(jax.random.key(0))), leaves_for(config))
    greedy = np.argmax(network.apply(params, jnp.asarray(chunk.rows.obs.reshape(-1, 4))), axis=-1)
    assert np.mean(chunk.rows.action.reshape(-1) == greedy) > 0.98


def test_an_actor_that_comes_back_does_not_repeat_the_one_before():
    config = config_of()
    first, again, next_one, other = (
        actor_of(config, number, incarnation).collect(0.4)[1].rows.obs
        for number, incarnation in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.any(first == next_one) and not np.any(first == other)


def test_what_a_process_has_built_is_not_built_again(monkeypatch):
    config = config_of()
    built = make_env_and_agent(config)

    def build_again(_: TrainConfig) -> None:
        raise AssertionError

    for module in (actor_module, shard_module):
        monkeypatch.setattr(module, "make_env_and_agent", build_again)
    assert Actor(config, 0, built).version == -1
    assert ReplayShard(config, 0, built.stored_spec).stats().num_transitions == 0


# --- Shards ---


def numbered(config: TrainConfig, actor: int, incarnation: int, chunk: int) -> Chunk:
    """A chunk without ends whose observations are numbers of their own: actor, incarnation, row, lane."""
    topology = config.topology
    assert isinstance(topology, ActorLearnerConfig)
    num_rows, num_lanes = topology.rows_per_chunk, topology.lanes_per_actor
    t = chunk * num_rows + np.arange(num_rows)[:, None]
    obs = np.zeros((num_rows, num_lanes, 4), np.float32)
    obs[..., 0], obs[..., 1], obs[..., 2], obs[..., 3] = actor, incarnation, t, np.arange(num_lanes)
    shape = (num_rows, num_lanes)
    rows = qfleet.core.replay.Row(obs, np.zeros(shape, np.int32), np.ones(shape, np.float32), np.zeros(shape, np.uint8))
    return Chunk(rows, np.random.default_rng(actor * 1000 + chunk).random(shape).astype(np.float32))


def held(shard: ReplayShard, segment: int) -> np.ndarray:
    """What the rows of a segment show, oldest first, `[rows, 4]` of the first lane, and their outcomes beside it."""
    saved = shard.snapshot()
    size, cursor = int(saved.ring.size[segment]), int(saved.ring.cursor[segment])
    order = (cursor - size + np.arange(size)) % len(saved.ring.rows.outcome)
    obs, outcome = saved.ring.rows.obs[order, 2 * segment], saved.ring.rows.outcome[order, 2 * segment]
    return np.column_stack([obs, outcome])


def test_a_chunk_that_comes_twice_is_stored_once():
    config = config_of()
    shard = ReplayShard(config, 0)
    assert shard.insert(0, Writer(0, 0), numbered(config, 0, 0, 0))[1]
    assert shard.insert(0, Writer(0, 1), numbered(config, 0, 0, 1))[1]
    before = held(shard, 0)
    for again in range(2):
        assert not shard.insert(0, Writer(0, again), numbered(config, 0, 0, again))[1]
    np.testing.assert_array_equal(held(shard, 0), before)
    np.testing.assert_array_equal(before[:, 2], np.arange(16))
    assert np.all(before[:, 4] == 0), "chunks that follow each other are one episode"


def test_nothing_is_stitched_where_a_chunk_is_missing_or_an_actor_was_replaced():
    config = config_of()
    shard = ReplayShard(config, 1)
    for writer in (Writer(0, 0), Writer(0, 2), Writer(2, 0)):
        assert shard.insert(0, writer, numbered(config, 1, writer.incarnation, writer.num_chunks))[1]
    assert not shard.insert(0, Writer(1, 7), numbered(config, 1, 1, 7))[1], "an actor that was replaced has no say"
    assert not shard.insert(0, Writer(0, 3), numbered(config, 1, 0, 3))[1]
    rows = held(shard, 0)
    np.testing.assert_array_equal(rows[:, 2], [*range(8), *range(16, 24), *range(8)])
    ends = np.flatnonzero(rows[:, 4] == NO_STEP)
    np.testing.assert_array_equal(ends, [7, 15])  # each row before is cut short there
    assert np.all(rows[ends - 1, 4] == 2)


def test_errors_that_come_back_late_or_for_nothing_do_no_harm():
    config = config_of()
    shard = ReplayShard(config, 0)
    for k in range(6):
        shard.insert(0, Writer(0, k), numbered(config, 0, 0, k))
    draws = DrawShare(np.int32(10), np.float32(1), np.float32(80))
    shard_stats, transition = shard.sample_share(5, 1, 0.4, draws, BATCH)
    assert len(transition.obs) == 10 and shard_stats.num_transitions > 0
    for k in range(6, 40):  # round the ring and further
        shard.insert(0, Writer(0, k), numbered(config, 0, 0, k))
    before = shard.snapshot()
    shard.set_priorities(5, np.full(10, 1e6, np.float32))
    shard.set_priorities(99, np.full(10, 1e6, np.float32))
    np.testing.assert_array_equal(shard.snapshot().leaves, before.leaves)


@pytest.mark.parametrize("num_draws", [10, BATCH])  # in one turn, in two
def test_errors_become_the_priorities_of_the_transitions_that_they_are_of(num_draws):
    config = config_of()
    shard = ReplayShard(config, 0)
    for k in range(6):
        shard.insert(0, Writer(0, k), numbered(config, 0, 0, k))
    _, transition = shard.sample_share(1, 3, 0.4, DrawShare(np.int32(num_draws), np.float32(1), np.float32(80)), BATCH)
    assert len(transition.obs) == num_draws
    errors = transition.obs[:, 2] + 1
    shard.set_priorities(1, errors)
    leaves = shard.snapshot().leaves
    for obs, error in zip(transition.obs, errors, strict=True):
        np.testing.assert_allclose(leaves[int(obs[2]), int(obs[3])], (error + 1e-6) ** 0.6, rtol=1e-5)


@pytest.mark.parametrize("num_shards", [2, 4])
@pytest.mark.parametrize("kind", ["prioritised", "uniform"])
def test_what_is_drawn_over_shards_is_as_from_one_replay(num_shards, kind):
    """With everything frozen: how often each slot is drawn, and each weight, by rounds as the director deals them."""
    config = config_of(num_replay_shards=num_shards, replay=kind)
    topology = config.topology
    shards = [ReplayShard(config, i) for i in range(num_shards)]
    for actor in range(4):
        for k in range(2 + actor * 3):  # some go round, some are hardly begun
            shards[actor % num_shards].insert(actor // num_shards, Writer(0, k), numbered(config, actor, 0, k))
    whole = join_shards([shard.snapshot() for shard in shards], topology.actor_pool)
    stats_of_shards = [shard.stats() for shard in shards]
    num_transitions = sum(each.num_transitions for each in stats_of_shards)
    assert num_transitions == np.sum(whole.leaves > 0)
    random, counts, weights = np.random.default_rng(0), {}, {}
    exponent = 0.6 if kind == "prioritised" else 0.0
    for number in range(300):
        dealt, shares = deal(BATCH, np.array([each.total_priority for each in stats_of_shards]), random)
        assert dealt.sum() == BATCH
        for shard, count, share in zip(shards, dealt, shares, strict=True):
            if count:
                draws = DrawShare(np.int32(count), np.float32(share), np.float32(num_transitions))
                _, drawn = shard.sample_share(number, int(random.integers(2**32)), exponent, draws, BATCH)
                for obs, weight in zip(drawn.obs, drawn.weight, strict=True):
                    key = (int(obs[0]), int(obs[2]), int(obs[3]))
                    counts[key], weights[key] = counts.get(key, 0) + 1, weight
    probability = {}
    for row, lane in zip(*np.nonzero(whole.leaves), strict=True):
        obs = whole.ring.rows.obs[row, lane]
        probability[int(obs[0]), int(obs[2]), int(obs[3])] = whole.leaves[row, lane] / whole.leaves.sum()
    assert set(counts) <= set(probability)
    expected = np.array([probability[key] for key in sorted(probability)], np.float64)
    observed = np.array([counts.get(key, 0) for key in sorted(probability)])
    assert stats.chisquare(observed, expected / expected.sum() * observed.sum()).pvalue > 1e-4
    for key, weight in weights.items():
        np.testing.assert_allclose(weight, (num_transitions * probability[key]) ** -exponent, rtol=1e-4)


def test_a_replay_goes_on_in_another_number_of_shards():
    config = config_of()
    shards = [ReplayShard(config, i) for i in range(2)]
    for actor in range(4):
        for k in range(3 + actor):
            shards[actor % 2].insert(actor // 2, Writer(0, k), numbered(config, actor, 0, k))
    whole = join_shards([shard.snapshot() for shard in shards], config.topology.actor_pool)
    for actor in range(4):
        lanes = whole.ring.rows.obs[: int(whole.ring.size[actor]), 2 * actor : 2 * actor + 2, 0]
        assert np.all(lanes == actor) and lanes.size
    wider = config_of(num_replay_shards=4)
    again = [ReplayShard(wider, i) for i in range(4)]
    for i, shard in enumerate(again):
        shard.restore(share_of(whole, wider.topology.actor_pool, i))
    same = join_shards([shard.snapshot() for shard in again], wider.topology.actor_pool)
    jax.tree.map(np.testing.assert_array_equal, same, whole)


# --- The rate limiter ---


def test_the_learner_owes_what_the_replay_ratio_says_and_the_actors_wait_for_it():
    config = config_of(env_steps=10_000)
    rate_limiter = RateLimiter(config, config.topology.actor_pool, num_batches=4)
    assert [rate_limiter.due(n) for n in (0, 64, 68, 464)] == [0, 0, 1, 100], "nothing in the warm-up, then one in four"
    wave = CHUNKS_AHEAD * 8 * 8 // 4  # all actors' chunks, in learner steps; and three rounds of four
    assert not rate_limiter.is_far_ahead(4_064, 1_000 - wave - 12)
    assert rate_limiter.is_far_ahead(4_064, 1_000 - wave - 13)
    assert rate_limiter.is_far_ahead(9_980, rate_limiter.due(9_980) - 6), (
        "nobody waits after the end: it must be near before"
    )
    assert not rate_limiter.is_far_ahead(9_980, rate_limiter.due(9_980) - 5)
    rate_limiter.begin_anew(5_000, 777)
    assert [rate_limiter.due(n) for n in (5_000, 5_064, 5_068)] == [777, 777, 778]
    rate_limiter.resume(0, 464, 90)
    assert [rate_limiter.due(n) for n in (464, 504)] == [90, 100], "what it owed elsewhere is forgotten"


# --- The learner ---


@pytest.mark.parametrize(
    ("most_batches", "num_parts", "settings"),
    [
        (1, 1, {}), (1, 2, {}), (16, 1, {}), (16, 2, {}), (16, 2, {"importance_normalisation": "batch_max"}),
        (16, 2, {"importance_normalisation": "batch_max", "mesh": MeshConfig(data=2)}),
    ],
    ids=str,
)  # fmt: skip
def test_a_round_is_so_many_steps_of_one_learner(monkeypatch, most_batches, num_parts, settings):
    """Batches that come from several shards, in any order, are learned from as by `update`; errors go back to them.

    Importance weights are divided by the greatest of each batch, whatever the shards and the devices.
    """
    from qfleet.core.agent import make_agent
    from qfleet.core.learner import make_learner, update
    from qfleet.core.types import Transition

    monkeypatch.setattr(learner_module, "MOST_BATCHES", most_batches)
    config = config_of(**settings)
    if jax.device_count() < config.topology.mesh.num_devices:
        pytest.skip("needs two devices")
    spec = make_env(config.env).spec
    num_batches = batches_per_round(config, spec)
    assert num_batches == most_batches
    size = num_batches * BATCH
    random = np.random.default_rng(0)
    whole = Transition(
        obs=random.normal(size=(size, 4)).astype(np.float32),
        action=random.integers(2, size=size).astype(np.int32),
        reward=random.normal(size=size).astype(np.float32),
        discount=np.full(size, 0.9, np.float32),
        next_obs=random.normal(size=(size, 4)).astype(np.float32),
        weight=random.random(size).astype(np.float32),
    )
    order = random.permutation(size)
    places = [order] if num_parts == 1 else [order[: size // 3], order[size // 3 :]]
    learner = GlobalLearner(config)
    _, leaves = learner.state()
    result, errors = learner.learn(places, *(jax.tree.map(lambda x, p=place: x[p], whole) for place in places))
    assert result.learner_steps == num_batches

    agent = make_agent(make_network(spec, config.agent), config.agent)
    functions = make_learner(agent, config.agent)
    state = jax.tree.unflatten(
        jax.tree.structure(jax.eval_shape(lambda: functions.init(agent.init(jax.random.key(0))))),
        map(jnp.asarray, leaves),
    )
    td_error, loss = np.empty(size, np.float32), 0.0
    for i in range(num_batches):
        batch = slice(i * BATCH, (i + 1) * BATCH)
        own = jax.tree.map(lambda x, b=batch: x[b], whole)
        if "importance_normalisation" in settings:
            own = own._replace(weight=own.weight / own.weight.max())
        state, info = update(functions, state, own)
        td_error[batch] = info.td_error
        loss += float(info.loss)
    for place, error in zip(places, errors, strict=True):
        np.testing.assert_allclose(error, td_error[place], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-4)
    for ours, theirs in zip(learner.publish()[1], jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_learner_goes_on_where_another_stopped():
    config = config_of()
    first, second = GlobalLearner(config), GlobalLearner(dataclasses.replace(config, seed=1))
    assert not np.array_equal(first.publish()[1][-1], second.publish()[1][-1])
    second.restore(*first.state())
    jax.tree.map(np.testing.assert_array_equal, second.state(), first.state())


# --- What is refused ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replay": "none"}, "replay must be uniform or prioritised.*got none"),
        ({"exploration": "softmax"}, "exploration must be epsilon_greedy.*got softmax"),
        ({"num_replay_shards": 5}, "num_replay_shards must be at most num_actors=4, got 5"),
        ({"num_envs": 8}, "num_envs must come with topology fused.*got topology actor-learner"),
        (
            {"exploration_end": 0.01},
            "exploration_end must come with a topology whose exploration decays.*actor_epsilon_base",
        ),
        ({"actor_epsilon_base": -0.1}, r"actor_epsilon_base must be in \[0, 1\], got -0.1"),
        ({"ray_address": "nowhere"}, "ray_address must be auto, local or HOST:PORT, got nowhere"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**settings)


def test_what_a_fleet_cannot_do_is_refused_before_the_run_is_made(tmp_path):
    config = config_of(run_dir=str(tmp_path / "run"))
    network = make_network(make_env("CartPole-v1").spec, AgentConfig())
    with pytest.raises(ConfigError, match="builds its network and optimiser from the config"):
        qfleet.iterate(config, network=network)
    with pytest.raises(ConfigError, match="replay_capacity must hold at least"):
        qfleet.iterate(dataclasses.replace(config, agent=dataclasses.replace(config.agent, replay_capacity=36)))
    assert not (tmp_path / "run").exists()
