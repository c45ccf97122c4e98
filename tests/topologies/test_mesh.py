"""Meshes of devices: a mesh of any shape learns what one device learns, up to rounding."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from jax import P

from qfleet.config import AgentConfig, ConfigError, FusedConfig, MeshConfig, TrainConfig
from qfleet.core.agent import make_agent
from qfleet.core.learner import make_learner, update
from qfleet.core.types import EnvSpec, Regression, Transition, stored_spec
from qfleet.envs.registry import make_env
from qfleet.networks import from_nnx, make_network
from qfleet.presets import PRESETS, make_config
from qfleet.topologies.fused.topology import Fused
from qfleet.topologies.mesh import Placement

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

ONE = MeshConfig()
MESHES = [MeshConfig(data=d, model=m) for d, m in ((8, 1), (1, 4), (4, 2))]

SPECS = {
    "mlp": EnvSpec(name="mlp", observation_shape=(4,), observation_dtype=np.dtype(np.float32), num_actions=2),
    "minatar": EnvSpec(name="m", observation_shape=(10, 10, 4), observation_dtype=np.dtype(np.bool_), num_actions=3),
    "nature": EnvSpec(
        name="n", observation_shape=(36, 36), observation_dtype=np.dtype(np.uint8), num_actions=6, frame_stack=4
    ),
}
BATCH_SIZE, NUM_BATCHES = 16, {"mlp": 20, "minatar": 20, "nature": 15}


def name_of(mesh):
    return f"{mesh.data}x{mesh.model}"


def random_batches(spec, agent, num_batches, seed=0):
    """Returns random batches of the kind that the agent learns from, `[batches, samples, ...]`."""
    rng = np.random.default_rng(seed)
    shape = (num_batches, BATCH_SIZE)

    def observations():
        obs = rng.integers(256, size=(*shape, *spec.agent_observation_shape), dtype=np.uint8)
        return obs if spec.observation_dtype == np.uint8 else (obs / 128 - 1).astype(spec.observation_dtype)

    action = rng.integers(spec.num_actions, size=shape, dtype=np.int32)
    number, weight = (rng.uniform(size=shape).astype(np.float32) for _ in range(2))
    if agent.replay == "none":
        return Regression(observations(), action, number, weight)
    discount = np.where(rng.uniform(size=shape) < 0.2, 0, 0.97).astype(np.float32)
    return Transition(observations(), action, number, discount, observations(), weight)


def learned(mesh, spec, config, batches):
    """Yields the learner's parameters after each of these batches on a mesh; the start is the same on every mesh."""
    network = make_network(spec, config)
    learner = make_learner(make_agent(network, config), config)
    placement = Placement(mesh, network)

    def init():
        return learner.init(network.init(jax.random.key(0)))

    def step(state, batch):
        return update(learner, state, batch, jax.random.key(1), placement.replicas)[0]

    specs = placement.partition_learner(jax.eval_shape(init))
    state = placement.jit(init, (), specs)()
    compiled_step = placement.jit(step, (specs, P("data")), specs, (0,))
    for i in range(len(batches.action)):
        state = compiled_step(state, jax.tree.map(lambda x, i=i: x[i], batches))
        yield as_vector((state.params, state.target_params))


@functools.cache
def learned_by_one_device(kind, preset):
    """Returns the batches, and the parameters after each of them on one device, for `expect_close`."""
    config = agent_for(kind, preset)
    batches = random_batches(
        stored_spec(SPECS[kind], make_network(SPECS[kind], config).to_storage_layout), config, NUM_BATCHES[kind]
    )
    return batches, list(learned(ONE, SPECS[kind], config, batches))


def expect_close(mesh, kind, preset):
    """Expects what one device learns, up to rounding, which grows with the steps."""
    batches, expected = learned_by_one_device(kind, preset)
    found = list(learned(mesh, SPECS[kind], agent_for(kind, preset), batches))
    for i, tolerance in ((0, 1e-6), (-1, 1e-4)):
        assert np.linalg.norm(found[i] - expected[i]) <= tolerance * np.linalg.norm(expected[i])


def as_vector(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def agent_for(kind, preset):
    config = make_config("any", preset, "fused").agent
    if kind != "mlp" or config.noisy:
        config = dataclasses.replace(config, hidden_sizes=(64,))
    if kind == "nature":
        config = dataclasses.replace(
            config, learning_rate=6.25e-5
        )  # as published for Adam; a higher rate amplifies noise
    if config.optimiser != "rmsprop":
        # Adam divides by the gradient's own size. If a gradient is only rounding error, a different order of summation
        # leads to a different step, unless eps is larger than the error.
        config = dataclasses.replace(config, optimiser_options={"eps": 1e-4})
    return dataclasses.replace(config, torso=kind, batch_size=BATCH_SIZE, target_update_period=7)


CASES = [("mlp", mesh) for mesh in MESHES]
CASES += [(kind, MeshConfig(data=4, model=2)) for kind in ("minatar", "nature")]


@pytest.mark.parametrize(("kind", "mesh"), CASES, ids=lambda case: case if isinstance(case, str) else name_of(case))
def test_every_mesh_learns_what_one_device_learns(kind, mesh):
    expect_close(mesh, kind, "double_dqn")


ON_A_MESH = ("ape_x", "btr", "pqn", "qr_dqn", "rainbow")
"""Presets that have, with `double_dqn`, every part of a learner that any preset has."""


@pytest.mark.parametrize("preset", ON_A_MESH)
def test_presets_learn_the_same_on_a_mesh(preset):
    expect_close(MeshConfig(data=4, model=2), "mlp", preset)


PARTS = ("head", "dueling", "noisy", "munchausen", "double", "replay", "layer_norm", "loss", "optimiser")


def test_no_preset_has_a_part_that_is_not_tried_on_a_mesh():
    """Neither the presets of other sizes only count, nor those that remember, which `test_heads` has on a mesh."""
    tried = {part for preset in (*ON_A_MESH, "double_dqn") for part in parts_of(preset)}
    for name, preset in PRESETS.items():
        if not preset.for_pixels and "memory" not in preset.settings:
            assert parts_of(name) <= tried, name


def parts_of(preset):
    config = agent_for("mlp", preset)
    return {(part, getattr(config, part)) for part in PARTS}


def test_a_network_over_devices_takes_its_share_of_each():
    """With layers of 4,096 units, each device has its share of the parameters and of the optimiser's moments."""
    config = AgentConfig(hidden_sizes=(4096, 4096), optimiser="adam")
    spec, num_devices = SPECS["mlp"], 4
    network = make_network(spec, config)
    learner = make_learner(make_agent(network, config), config)
    placement = Placement(MeshConfig(model=num_devices), network)

    def init():
        return learner.init(network.init(jax.random.key(0)))

    shapes = jax.eval_shape(init)
    state = placement.jit(init, (), placement.partition_learner(shapes))()
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for device in range(num_devices):
        share = sum(leaf.addressable_shards[device].data.nbytes for leaf in jax.tree.leaves(state))
        assert share <= whole * (1 / num_devices + 0.05)


def test_a_modules_own_partitioning_counts():
    from flax import nnx

    class Module(nnx.Module):
        def __init__(self, axes, rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), axes)
            self.linear = nnx.Linear(8, 4, kernel_init=init, rngs=rngs)

        def __call__(self, obs):
            return self.linear(obs)

    def kernel(axes, size):
        placement = Placement(MeshConfig(model=size), network := from_nnx(functools.partial(Module, axes)))
        config = AgentConfig()
        learner = make_learner(make_agent(network, config), config)
        shapes = jax.eval_shape(lambda: learner.init(network.init(jax.random.key(0))))
        return placement.partition_learner(shapes).params["linear"]["kernel"]

    assert kernel((None, None), 4) == P(None, None)
    assert kernel((None, "model"), 4) == P(None, "model")
    with pytest.raises(
        ConfigError, match=r"divide over mesh.model, got .*kernel.* \[8, 4\].*over 8 devices; make it 8"
    ):
        kernel((None, "model"), 8)
    with pytest.raises(ConfigError, match="mesh axis 'model' only, got .*'heads'"):
        kernel(("heads", None), 4)


AGENTS = {
    "pqn": AgentConfig(replay="none", rollout_length=16, num_minibatches=4, exploration_env_steps=1000),
    "uniform": AgentConfig(batch_size=16, replay_capacity=800, warmup_env_steps=100, env_steps_per_learner_step=8),
    "prioritised": AgentConfig(
        replay="prioritised",
        n_step=3,
        double=True,
        batch_size=16,
        replay_capacity=800,
        warmup_env_steps=100,
        env_steps_per_learner_step=8,
    ),
}
NUM_ENVS = 8


def make_fused(kind, mesh, env=None, **settings):
    env = env or probes.random_walk(frame_stack=2)
    config = TrainConfig(
        env="probe",
        agent=AGENTS[kind],
        topology=FusedConfig(num_envs=NUM_ENVS, mesh=mesh),
        eval_episodes=10,
        **settings,
    )
    fused = Fused(config, env, probes.linear_network(env.spec))
    fused.start()
    return fused


def snapshot(fused):
    """Returns copies, because the next call of the program deletes the arrays of the state."""
    return jax.tree.map(jnp.copy, fused.state), fused.counters


@functools.cache
def started(kind, mesh):
    """Returns a topology that all tests of this agent and mesh share, and its first state: it is compiled only once."""
    fused = make_fused(kind, mesh)
    return fused, snapshot(fused)


def fresh(kind, mesh):
    fused, (state, counters) = started(kind, mesh)
    fused.restore(jax.tree.map(jnp.copy, state), counters)
    return fused


@pytest.mark.parametrize("mesh", [MeshConfig(data=4), MeshConfig(data=2, model=2)], ids=name_of)
def test_the_whole_fused_program_takes_the_same_steps_on_any_mesh(mesh):
    """Without a replay everything is the same: episodes, exploration, minibatches and evaluation."""
    one, many = (fresh("pqn", each) for each in (ONE, mesh))
    for _ in range(6):
        records = [fused.advance(fused.env_steps + 1) for fused in (one, many)]
        assert records[0].num_episodes == records[1].num_episodes
        assert records[0].episode_return_mean == pytest.approx(records[1].episode_return_mean, rel=1e-5)
        assert records[0].q_mean == pytest.approx(records[1].q_mean, rel=1e-4, abs=1e-5)
        assert records[0].loss == pytest.approx(records[1].loss, rel=1e-4, abs=1e-6)
    assert_trees_close(one.params, many.params)
    mine, others = one.evaluate(10), many.evaluate(10)
    np.testing.assert_allclose(mine.returns, others.returns, rtol=1e-5)
    np.testing.assert_array_equal(mine.lengths, others.lengths)
    assert others.num_different().item() == mine.num_different().item()
    np.testing.assert_allclose(mine.first_values, others.first_values, rtol=1e-4)
    np.testing.assert_allclose(mine.discounted_returns, others.discounted_returns, rtol=1e-4)


def assert_trees_close(x, y):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), on_host(x), on_host(y))


def on_host(tree):
    def plain(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    return jax.device_get(jax.tree.map(plain, tree))


@pytest.mark.parametrize("kind", ["uniform", "prioritised"])
def test_what_is_stored_and_when_is_learned_is_the_same_on_any_mesh(kind):
    """Lanes see the same until the first learner step. Then the batches differ, but are equally likely."""
    one, many = (fresh(kind, each) for each in (ONE, MeshConfig(data=4)))
    for fused in (one, many):
        fused.advance(NUM_ENVS * 16)
    rows = [jax.device_get(fused.state["replay"].ring.rows) for fused in (one, many)]
    for mine, other in zip(*rows, strict=True):
        np.testing.assert_array_equal(mine[:12], other[:12])
    assert one.counters == many.counters
    mine, others = (fused.replay_measures() for fused in (one, many))
    assert mine == {
        name: pytest.approx(value, rel=0.5 if "priority" in name else 1e-6) for name, value in others.items()
    }


@pytest.mark.parametrize("kind", AGENTS)
def test_a_run_goes_on_on_another_mesh_as_on_its_own(kind):
    """Another mesh goes on from the state of the first, and its next step gives the same result, up to rounding."""
    first = fresh(kind, MeshConfig(data=4))
    while first.env_steps < 1600:
        first.advance(1600)
    state, counters = snapshot(first)
    first.advance(first.env_steps + 1)
    continued = [first]
    for mesh in (MeshConfig(data=2, model=2), ONE):
        fused = fresh(kind, mesh)
        like = fused.state
        fused.restore(jax.tree.map(lambda x, like: jax.device_put(jnp.copy(x), like.sharding), state, like), counters)
        assert_trees_close(fused.state, state)
        fused.advance(fused.env_steps + 1)
        continued.append(fused)
    for fused in continued:
        assert fused.counters == continued[0].counters
        assert np.all(np.isfinite(fused.evaluate(5).returns))
    if kind == "pqn":
        assert_trees_close(continued[0].params, continued[1].params)
        assert_trees_close(continued[0].params, continued[2].params)
    else:
        leaves = [fused.state["replay"].ring.rows.outcome for fused in continued]
        np.testing.assert_array_equal(leaves[0], leaves[2])


@pytest.mark.parametrize("kind", AGENTS)
def test_a_run_resumed_on_the_same_mesh_is_one_that_never_stopped(kind):
    mesh = MeshConfig(data=4)
    whole, resumed = fresh(kind, mesh), make_fused(kind, mesh)
    for _ in range(5):
        whole.advance(whole.env_steps + 1)
    resumed.restore(*snapshot(whole))
    for fused in (whole, resumed):
        for _ in range(3):
            fused.advance(fused.env_steps + 1)
    jax.tree.map(np.testing.assert_array_equal, on_host(whole.state), on_host(resumed.state))


@pytest.mark.parametrize("kind", AGENTS)
def test_a_learner_step_reduces_gradients_once(kind):
    """The text of the compiled program has one all-reduce."""
    spec = SPECS["mlp"]
    config = dataclasses.replace(AGENTS[kind], hidden_sizes=(64, 64))
    network = make_network(spec, config)
    learner = make_learner(make_agent(network, config), config)
    placement = Placement(MeshConfig(data=4), network)
    state = jax.eval_shape(lambda: learner.init(network.init(jax.random.key(0))))
    batch = jax.tree.map(lambda x: x[0], random_batches(spec, config, 1))

    def step(state, batch):
        return update(learner, state, batch, replicas=placement.replicas)[0]

    specs = placement.partition_learner(state)
    compiled = placement.jit(step, (specs, P("data")), specs).lower(state, batch).compile()
    assert len(all_reduces(compiled.as_text())) == 1


def all_reduces(program):
    return re.findall(r"^.* = .* all-reduce(?:-start)?\(.*$", program, flags=re.MULTILINE)


def test_a_fused_run_reduces_gradients_once_a_learner_step():
    """The compiled program has one all-reduce of gradients, in the loop of learner steps. Priorities go with them."""
    fused, _ = started("prioritised", MeshConfig(data=4))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(fused.params))
    size_of_step = num_params + AGENTS["prioritised"].batch_size
    sizes = [
        sum(map(elements, re.findall(r"f32\[([\d,]*)\]", line.split(" all-reduce")[0])))
        for line in all_reduces(fused._run.as_text())
    ]
    assert sizes.count(size_of_step) == 1
    assert all(size <= 8 for size in sizes if size != size_of_step)  # counts and sums over a chunk, or for sampling


@pytest.mark.parametrize(("kind", "num_messages"), [("pqn", 1), ("uniform", 3), ("prioritised", 3)])
def test_a_learner_step_takes_few_messages(kind, num_messages):
    """Between processes on CPUs each exchange is a message, which takes longer than what it carries.

    With a replay there is one for the draw, one that deals the batch, and one for gradients and priorities. Only a
    uniform draw that often hits no step takes more. The end of a chunk takes three.
    """
    fused, _ = started(kind, MeshConfig(data=4))
    exchanges = "all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute"
    found = re.findall(rf"^.* = .* ({exchanges})(?:-start)?\(.*$", fused._run.as_text(), flags=re.MULTILINE)
    assert len(found) <= num_messages + 3, found
    assert "reduce-scatter" not in found


def elements(dimensions):
    return int(np.prod([int(n) for n in dimensions.split(",") if n]))


@pytest.mark.parametrize(
    ("agent", "topology", "message"),
    [
        ({}, {"num_envs": 10, "data": 4}, "num_envs must divide over mesh.data, got num_envs=10, mesh.data=4; try 12"),
        ({"batch_size": 30}, {"num_envs": 8, "data": 4}, "batch_size must divide over mesh.data, got .*30.*; try 32"),
        (
            {"replay": "none", "rollout_length": 2, "num_minibatches": 8},
            {"num_envs": 8, "data": 4},
            "num_minibatches must divide .* got num_minibatches=8, 8 x 2 / 4 = 4; try 4",
        ),
        ({}, {"num_envs": 8, "data": 0}, "mesh.data must be a whole number, at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_one_that_does(agent, topology, message):
    data = topology.pop("data")
    with pytest.raises(ConfigError, match=message):
        TrainConfig(env="x", agent=AgentConfig(**agent), topology=FusedConfig(**topology, mesh=MeshConfig(data=data)))


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="at most the number of devices, got 4 x 4 = 16 for 8 cpu devices"):
        Placement(MeshConfig(data=4, model=4), probes.linear_network(make_env("CartPole-v1").spec))
