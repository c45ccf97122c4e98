"""The overlapped topology: in lock step it learns what the fused one does, and failures corrupt nothing."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest

from qfleet.config import AgentConfig, FusedConfig, MeshConfig, OverlappedConfig, RunFailed, TrainConfig
from qfleet.core.player import make_player
from qfleet.core.replay import CONTINUED, NO_STEP, TERMINATED, TRUNCATED, make_replay
from qfleet.core.types import Network
from qfleet.envs.host import EnvSpec, HostEnv, HostStep
from qfleet.envs.in_graph import draw_step_keys, init_lanes, step_lanes
from qfleet.policy import Policy
from qfleet.runtime.episodes import play
from qfleet.runtime.stopwatch import TimeShares
from qfleet.topologies.fused.topology import Fused
from qfleet.topologies.overlapped.programs import HostRow, _sealed
from qfleet.topologies.overlapped.topology import Overlapped
from qfleet.topologies.schedule import rows_per_iteration

NUM_ENVS = 4
ROWS = 16

AGENTS = {
    "pqn": AgentConfig(replay="none", rollout_length=ROWS, num_minibatches=4, exploration_env_steps=1000),
    "uniform": AgentConfig(batch_size=16, replay_capacity=300, warmup_env_steps=150, env_steps_per_learner_step=6),
    "prioritised": AgentConfig(
        replay="prioritised",
        n_step=3,
        double=True,
        batch_size=16,
        replay_capacity=300,
        warmup_env_steps=50,
        env_steps_per_learner_step=2.5,
    ),
}


class InGraphLanes:
    """Host lanes of an environment written in JAX, with the random numbers that the fused program would draw."""

    def __init__(self, env, num_lanes, num_rows, seed):
        self._env, self._num_lanes, self._num_rows = env, num_lanes, num_rows
        _, lanes_key, self._key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0), 3)
        self._lanes = jax.jit(lambda key: init_lanes(env, key, jnp.arange(num_lanes)))(lanes_key)
        self._draw = jax.jit(lambda key: draw_step_keys(env, key, num_rows, jnp.arange(num_lanes)))
        self._step = jax.jit(functools.partial(step_lanes, env))
        self._row = 0

    def reset(self, seed):
        return np.array(self._lanes.observation)

    def send(self, action):
        i = self._row % self._num_rows
        if i == 0:
            self._key, env_key, _, _ = jax.random.split(self._key, 4)
            self._draws = self._draw(env_key)
        self._row += 1
        self._lanes, self._result = self._step(self._lanes, action, jax.tree.map(lambda x: x[i], self._draws))

    def recv(self):
        nobody = np.zeros(self._num_lanes, bool)
        return HostStep(np.array(self._lanes.observation), *map(np.array, self._result), failed=nobody)

    def close(self):
        pass


ONE = MeshConfig()


def config_of(kind, topology, seed=3, **settings):
    return TrainConfig(env="test", agent=AGENTS[kind], topology=topology, seed=seed, eval_episodes=5, **settings)


def make_overlapped(kind, env, lock_step=True, profile=False, seed=3, network=None, mesh=ONE):
    topology = OverlappedConfig(num_envs=NUM_ENVS, lock_step=lock_step, profile=profile, mesh=mesh)
    config = config_of(kind, topology, seed)

    def make_lanes(num_lanes, options):
        return InGraphLanes(env, num_lanes, rows_per_iteration(config.agent), seed)

    overlapped = Overlapped(
        config, HostEnv(env.spec, make_lanes, make_lanes), network or probes.linear_network(env.spec)
    )
    overlapped.start()
    return overlapped


def advance(topology, env_steps):
    records = []
    while topology.env_steps < env_steps:
        records.append(topology.advance(env_steps))
    return records


WITHOUT_OR_WITH_A_REPLAY = ("pqn", "prioritised")
"""`uniform` is `prioritised` without the priorities."""

LOCK_STEP_CASES = [(kind, MeshConfig()) for kind in AGENTS]
LOCK_STEP_CASES += [(kind, MeshConfig(data=2, model=2)) for kind in WITHOUT_OR_WITH_A_REPLAY]


@pytest.mark.parametrize(("kind", "mesh"), LOCK_STEP_CASES, ids=str)
def test_in_lock_step_it_takes_the_steps_of_the_fused_topology(kind, mesh):
    if mesh.num_devices > jax.device_count():
        pytest.skip(f"needs {mesh.num_devices} devices")
    env = probes.random_walk(frame_stack=2)
    fused = Fused(config_of(kind, FusedConfig(num_envs=NUM_ENVS, mesh=mesh)), env, probes.linear_network(env.spec))
    fused.start()
    overlapped = make_overlapped(kind, env, mesh=mesh)
    steps = 10 * NUM_ENVS * ROWS
    records = {name: advance(each, steps) for name, each in {"fused": fused, "overlapped": overlapped}.items()}
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), fused.params, overlapped.params)
    assert fused.counters == overlapped.counters
    episodes = {name: sum(record.num_episodes for record in each) for name, each in records.items()}
    assert episodes["fused"] == episodes["overlapped"] > 10
    if kind != "pqn":
        for mine, other in zip(
            jax.tree.leaves(fused.state["replay"]), jax.tree.leaves(overlapped.state["replay"]), strict=True
        ):
            np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-5)


def test_an_evaluation_can_be_stopped_and_can_cut_episodes():
    overlapped = make_overlapped("pqn", probes.random_walk(frame_stack=2))
    assert overlapped.evaluate(5, should_stop=lambda: True) is None
    cut = overlapped.evaluate(5, max_episode_steps=1)
    assert cut.lengths.tolist() == [[1] * 5] and cut.was_cut.any()


@pytest.mark.parametrize("kind", ["pqn", "uniform"])
def test_how_frames_are_stored_changes_nothing_that_is_learned(kind):
    """A network whose storage layout doubles frames and adds an axis sees such frames in both topologies."""
    env = probes.random_walk(frame_stack=2)
    plain = probes.linear_network(env.spec)

    def apply(params, view):
        assert view.shape[1:] == (1, *env.spec.agent_observation_shape)
        return plain.apply(params, view[:, 0] / 2)

    picky = Network(
        plain.init, apply, to_storage_layout=lambda obs: jnp.expand_dims(2 * obs, -1 - len(env.spec.observation_shape))
    )

    def make_fused(network):
        fused = Fused(config_of(kind, FusedConfig(num_envs=NUM_ENVS)), env, network)
        fused.start()
        return fused

    for make in (make_fused, lambda network: make_overlapped(kind, env, network=network)):
        learned = []
        for network in (plain, picky):
            topology = make(network)
            advance(topology, 400)
            learned.append((topology.params, topology.evaluate(5).returns))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *learned)
    if kind == "uniform":  # policies know nothing of how their parameters were learned
        assert_policies_do_the_same(env, plain, picky, learned[0][0])


def assert_policies_do_the_same(env, plain, picky, params):
    policies = [Policy(env, network, params, "") for network in (plain, picky)]
    seen = np.random.default_rng(0).normal(size=(3, *env.spec.agent_observation_shape)).astype(np.float32)
    np.testing.assert_allclose(*(policy.q_values(seen) for policy in policies), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(*(policy.evaluate(5) for policy in policies))
    env = env._replace(render=lambda *_: np.zeros((2, 2, 3), np.uint8))
    players = [make_player(network, env.spec.frame_stack) for network in (plain, picky)]
    returns = [[moment.episode_return for moment in next(play(env, player, params, 1, 0))] for player in players]
    assert returns[0] == returns[1]


@pytest.mark.parametrize("kind", WITHOUT_OR_WITH_A_REPLAY)
def test_lock_step_is_deterministic(kind):
    first, second = (make_overlapped(kind, probes.random_walk(frame_stack=2)) for _ in range(2))
    for each in (first, second):
        advance(each, 400)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


@pytest.mark.parametrize("kind", WITHOUT_OR_WITH_A_REPLAY)
def test_a_profiled_run_learns_what_one_in_lock_step_does(kind):
    env = probes.random_walk(frame_stack=2)
    plain, profiled = make_overlapped(kind, env), make_overlapped(kind, env, lock_step=False, profile=True)
    records, profiled_records = ([each.advance(0) for _ in range(10)] for each in (plain, profiled))
    assert plain.learner_steps > 50 and plain.counters == profiled.counters
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(assert_close, plain.params, profiled.params)
    if kind != "pqn":
        jax.tree.map(assert_close, plain.state["replay"], profiled.state["replay"])
    for mine, other in zip(records, profiled_records, strict=True):
        assert (mine.num_episodes, mine.staleness) == (other.num_episodes, other.staleness)
        assert (mine.loss is None) == (other.loss is None)
        assert mine.loss is None or mine.loss == pytest.approx(other.loss, rel=1e-3)


@pytest.mark.parametrize("kind", WITHOUT_OR_WITH_A_REPLAY)
def test_a_profiled_runs_time_splits_into_its_parts(kind):
    profiled = make_overlapped(kind, probes.random_walk(), profile=True)
    batches = "returns" if kind == "pqn" else "replay"
    shares = TimeShares(NUM_ENVS)
    for record in advance(profiled, 10 * NUM_ENVS * ROWS):
        assert set(record.part_seconds) == {"environment", "transfer", "inference", batches, "update", "other"}
        assert sum(record.part_seconds.values()) == pytest.approx(record.train_seconds)
        assert all(seconds >= 0 for seconds in record.part_seconds.values())
        assert record.metrics()["time_share_environment"] > 0
        shares.add(record)
    summary = shares.summary()
    assert all(share > 0 for share in summary["time_shares"].values())
    assert sum(summary["time_shares"].values()) == pytest.approx(1)
    assert set(summary["row_milliseconds"]) == set(summary["time_shares"])


def test_a_profiled_run_seals_what_environments_cut_short():
    script = random_script(1, 160, 3)
    states = []
    for profile in (False, True):
        overlapped, _ = scripted(script, AGENTS["prioritised"], lock_step=True, profile=profile)
        assert sum(record.num_env_failures for record in advance(overlapped, 480)) > 0
        states.append(overlapped.state["replay"].ring)
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_an_unprofiled_run_says_nothing_of_parts():
    record = make_overlapped("uniform", probes.random_walk()).advance(0)
    assert record.part_seconds is None
    assert not any("time_share" in name for name in record.metrics())


class ScriptedLanes:
    """Lanes that follow a script: `[time, lane]` of ("go" | "end" | "cut" | "fail"); observations number the rows."""

    def __init__(self, script, step_seconds=0.0):
        self._script, self._step_seconds, self._time, self.actions = script, step_seconds, 0, []
        self._is_final = np.zeros(len(script[0]), bool)
        self.is_closed = False

    def reset(self, seed):
        self.seed = seed
        return self._observation()

    def send(self, action):
        self._sent = time.perf_counter()
        self.actions.append(np.array(action))

    def recv(self):
        time.sleep(max(0.0, self._step_seconds - (time.perf_counter() - self._sent)))
        events = np.array(self._script[self._time % len(self._script)])
        self._time += 1
        live = ~self._is_final
        terminated, truncated, failed = (live & (events == name) for name in ("end", "cut", "fail"))
        self._is_final = terminated | truncated
        reward = np.where(live & ~failed, 1.0, 0.0).astype(np.float32)
        return HostStep(self._observation(), reward, terminated, truncated, failed)

    def _observation(self):
        number = self._time * len(self._script[0]) + np.arange(len(self._script[0]))
        return number[:, None].astype(np.float32)

    def close(self):
        self.is_closed = True


def scripted(script, agent, lock_step=False, profile=False, network=None, step_seconds=0.0, **settings):
    spec = EnvSpec(
        name="script", observation_shape=(1,), observation_dtype=np.dtype(np.float32), num_actions=2, frame_stack=1
    )
    lanes = ScriptedLanes(script, step_seconds)
    config = TrainConfig(
        env="script",
        agent=agent,
        topology=OverlappedConfig(num_envs=len(script[0]), lock_step=lock_step, profile=profile),
        **settings,
    )
    env = HostEnv(spec, lambda num_lanes, options: lanes, lambda num_lanes, options: ScriptedLanes(script))
    overlapped = Overlapped(config, env, network or probes.linear_network(spec))
    overlapped.start()
    return overlapped, lanes


def random_script(seed, num_rows, num_lanes):
    rng = np.random.default_rng(seed)
    return rng.choice(["go", "end", "cut", "fail"], (num_rows, num_lanes), p=[0.7, 0.1, 0.1, 0.1]).tolist()


@pytest.mark.parametrize(("n_step", "lock_step"), [(1, True), (3, False)])
def test_nothing_is_stitched_where_environments_fail(lock_step, n_step):
    """Every transition in the replay starts and ends in one episode of one environment, and sums only its rewards."""
    num_lanes, num_rows, discount = 3, 160, 0.5
    script = random_script(0, num_rows, num_lanes)
    agent = AgentConfig(
        n_step=n_step, discount=discount, replay_capacity=10_000, warmup_env_steps=9_000, batch_size=512
    )
    overlapped, _ = scripted(script, agent, lock_step)
    assert sum(record.num_env_failures for record in advance(overlapped, num_rows * num_lanes)) > 0
    replay = make_replay(EnvSpec(
        name="script", observation_shape=(1,), observation_dtype=np.dtype(np.float32), num_actions=2
    ), agent, num_lanes)  # fmt: skip
    batch = jax.device_get(
        replay.sample(replay.restore(overlapped.state["replay"]), jax.random.key(0), jnp.float32(0)).transition
    )
    seen = set()
    for obs, reward, value, next_obs in zip(batch.obs, batch.reward, batch.discount, batch.next_obs, strict=True):
        start, lane = divmod(int(obs[0]), num_lanes)
        steps, end, sums = 0, "go", 0.0
        while steps < n_step and end == "go" and script[start + steps][lane] != "fail":
            end = script[start + steps][lane]
            sums += discount**steps
            steps += 1
        assert steps > 0, "it starts with the step that failed"
        assert int(next_obs[0]) == (start + steps) * num_lanes + lane
        assert reward == pytest.approx(sums)
        assert value == (0 if end == "end" else discount**steps)
        seen.add(script[start + steps - 1][lane] if steps < n_step else "full")
    assert seen >= ({"full"} if n_step == 1 else {"full", "go", "end", "cut"})


def test_a_failed_environment_cuts_a_rollouts_returns_short():
    """If row 3 fails, row 2 bootstraps from row 3's observation, and nothing is learned from row 3 itself."""
    events = ["go", "go", "go", "fail", "go", "end", "go", "go"]
    rows = HostRow(
        obs=(),
        action=np.zeros((8, 1), np.int32),
        reward=np.array([[float(event != "fail")] for event in events], np.float32),
        terminated=np.array([[event == "end"] for event in events]),
        truncated=np.zeros((8, 1), bool),
        no_step=np.array([[event == "fail" or i == 6] for i, event in enumerate(events)]),
    )
    sealed = _sealed(rows.with_obs(rows.obs))
    np.testing.assert_array_equal(
        sealed.outcome[:, 0], [CONTINUED, CONTINUED, TRUNCATED, NO_STEP, CONTINUED, TERMINATED, NO_STEP, CONTINUED]
    )


def test_learning_goes_on_while_environments_step():
    """The learner gets each row while the environments take the next one, and staleness counts that."""
    overlapped, lanes = scripted([["go"] * 2] * 7 + [["cut"] * 2], AGENTS["uniform"])
    order = []
    learn, recv = overlapped._learning.learn, lanes.recv
    overlapped._learning.learn = lambda *arguments: order.append("learn") or learn(*arguments)
    lanes.recv = lambda: order.append("recv") or recv()
    records = advance(overlapped, 640)
    assert order[:5] == ["recv", "learn", "recv", "learn", "recv"]
    staleness = sum(record.staleness * record.new_env_steps / 2 for record in records)  # of each row of two lanes
    assert staleness == pytest.approx(overlapped.learner_steps, rel=0.05) and staleness > 50


def test_a_run_goes_on_from_a_checkpoint_with_new_episodes_and_seals_the_old_ones():
    script = [["go"] * 2] * 1000
    agent = AgentConfig(replay_capacity=5000, warmup_env_steps=4000, batch_size=512, n_step=2, discount=0.5)
    overlapped, lanes = scripted(script, agent)
    advance(overlapped, 64)
    state = jax.tree.map(jnp.copy, overlapped.state)
    resumed, new_lanes = scripted(script, agent)
    resumed.restore(state, overlapped.counters)
    assert new_lanes.seed != lanes.seed
    advance(resumed, 128)
    assert (resumed.env_steps, resumed.learner_steps) == (128, 0)
    rows = jax.device_get(resumed.state["replay"].ring.rows)
    outcome = rows.outcome[:, 0].tolist()
    assert outcome[:34] == [CONTINUED] * 31 + [TRUNCATED, NO_STEP, CONTINUED]
    assert rows.obs[:34, 0, 0].tolist() == [2.0 * i for i in range(33)] + [0.0]


def test_values_that_diverge_stop_the_run():
    overlapped, lanes = scripted(
        [["go"] * 4] * 5, dataclasses.replace(AGENTS["uniform"], loss="squared", learning_rate=1e38)
    )
    with pytest.raises(RunFailed, match="loss must be finite.*learning_rate"):
        advance(overlapped, 10_000)
    overlapped.close()
    assert lanes.is_closed
