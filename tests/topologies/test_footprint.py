"""A footprint equals the bytes of the real arrays, and a run that doesn't fit is refused at once."""

import dataclasses
import re

import jax
import numpy as np
import probes
import pytest

import qfleet
from qfleet.config import AgentConfig, ConfigError, FusedConfig, MeshConfig, OverlappedConfig, TrainConfig
from qfleet.core.replay import make_replay
from qfleet.core.types import stored_spec
from qfleet.envs.host import HostEnv
from qfleet.networks import make_network
from qfleet.runtime.process import show_bytes
from qfleet.topologies import footprint as footprint_module
from qfleet.topologies.fused.topology import Fused
from qfleet.topologies.overlapped.topology import Overlapped

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

ENV = probes.random_walk(frame_stack=2)
NUM_ENVS = 8
WIDE = {"hidden_sizes": (160, 160)}  # wide enough that the optimiser's moments are divided as the parameters are
AGENTS = {
    "pqn": AgentConfig(replay="none", rollout_length=16, num_minibatches=4, **WIDE),
    "uniform": AgentConfig(batch_size=16, replay_capacity=800, optimiser="rmsprop", **WIDE),
    "prioritised": AgentConfig(replay="prioritised", n_step=3, batch_size=16, replay_capacity=1208, **WIDE),
}
MESHES = [MeshConfig(data=d, model=m) for d, m in ((1, 1), (4, 1), (1, 2), (2, 2))]


def config_for(kind, topology, **settings):
    return TrainConfig(**{"env": "probe", "agent": AGENTS[kind], "topology": topology, "eval_episodes": 5, **settings})


def make_fused(kind, mesh, **settings):
    config = config_for(kind, FusedConfig(num_envs=NUM_ENVS, mesh=mesh), **settings)
    return Fused(config, ENV, make_network(ENV.spec, config.agent))


class NoLanes:
    def reset(self, seed):
        return np.zeros((NUM_ENVS, *ENV.spec.observation_shape), ENV.spec.observation_dtype)


def make_overlapped(kind, mesh):
    config = config_for(kind, OverlappedConfig(num_envs=NUM_ENVS, mesh=mesh))
    env = HostEnv(ENV.spec, lambda num_lanes, options: NoLanes(), lambda num_lanes, options: NoLanes())
    return Overlapped(config, env, make_network(ENV.spec, config.agent))


def kept_by_fused(fused):
    state = fused._on_devices.jitted().init(fused._on_devices.seeds)
    return parts_of(state.learner, state.actor, state.replay)


def kept_by_overlapped(overlapped):
    learner, replay, _ = overlapped._on_mesh.jitted().init(np.uint32(0))
    overlapped._lanes = NoLanes()
    overlapped._begin_episodes()
    return parts_of(learner, (overlapped._acting.obs, overlapped._memory), replay)


def parts_of(learner, lanes, replay):
    parts = {
        "parameters": learner.params,
        "target network": learner.target_params,
        "optimiser state": (learner.optimiser_state, learner.target_age),
        "lanes": lanes,
        "replay": replay and replay._replace(tree=()),
        "priorities": replay and replay.tree,
    }
    return {name: jax.tree.leaves(part) for name, part in parts.items() if jax.tree.leaves(part)}


CASES = [("prioritised", mesh) for mesh in MESHES]  # the agent with every part
CASES += [(kind, MeshConfig(data=2, model=2)) for kind in ("pqn", "uniform")]


@pytest.mark.parametrize(
    ("kind", "mesh"), CASES, ids=lambda case: case if isinstance(case, str) else f"{case.data}x{case.model}"
)
@pytest.mark.parametrize(
    ("make", "kept_by"),
    [(make_fused, kept_by_fused), (make_overlapped, kept_by_overlapped)],
    ids=["fused", "overlapped"],
)
def test_a_footprint_is_the_bytes_of_the_real_arrays(make, kept_by, kind, mesh):
    topology = make(kind, mesh)
    footprint = topology.footprint()
    found = {part.name: part for part in footprint.parts if part.name not in ("batch", "evaluation")}
    kept = kept_by(topology)
    assert list(found) == list(kept)
    for name, leaves in kept.items():
        assert found[name].total_bytes == sum(leaf.nbytes for leaf in leaves), name
        on_each = dict.fromkeys(footprint.devices, 0)
        for leaf in leaves:
            for shard in leaf.addressable_shards:
                on_each[shard.device] += shard.data.nbytes
        assert set(on_each.values()) == {found[name].bytes_per_device}, name
    assert len(footprint.devices) == mesh.num_devices
    axes = {name: found[name].axis for name in ("parameters", "optimiser state", "lanes")}
    over_model, over_data = "model" if mesh.model > 1 else None, "data" if mesh.data > 1 else None
    assert axes == {"parameters": over_model, "optimiser state": over_model, "lanes": over_data}


def test_the_footprint_of_many_seeds_is_the_bytes_of_the_real_arrays():
    fused = make_fused("prioritised", MeshConfig(), num_seeds=12)  # 2 on each of 6 devices
    footprint = fused.footprint()
    state = fused._on_devices.jitted().init(fused._on_devices.seeds)
    found = {part.name: part for part in footprint.parts if part.name not in ("batch", "evaluation")}
    for name, leaves in parts_of(state.learner, state.actor, state.replay).items():
        assert found[name].total_bytes == sum(leaf.nbytes for leaf in leaves) == 6 * found[name].bytes_per_device
        assert found[name].axis == "seeds"
    assert footprint.axes == {"seeds": 6} and len(footprint.devices) == 6


@pytest.mark.parametrize("kind", AGENTS)
def test_the_batch_of_a_footprint_is_what_is_learned_from(kind):
    config = AGENTS[kind]
    if kind == "pqn":
        overlapped = make_overlapped(kind, MeshConfig())
        on_mesh = overlapped._on_mesh
        learner, _, key = on_mesh.jitted().init(np.uint32(0))
        overlapped._lanes = NoLanes()
        overlapped._begin_episodes()
        _, *rollout, _ = on_mesh.learn_arguments(learner, (), key, overlapped._acting.obs, overlapped._memory)
        batch = jax.eval_shape(on_mesh.programs.rollout_batch, learner.params, *rollout)
    else:
        replay = make_replay(stored_spec(ENV.spec, make_network(ENV.spec, config).to_storage_layout), config, NUM_ENVS)
        batch = jax.eval_shape(lambda: replay.sample(replay.init(), jax.random.key(0), np.float32(1)).transition)
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    for mesh, share, axis in ((MeshConfig(), 1, None), (MeshConfig(data=4, model=2), 4, "data")):
        *_, part = make_fused(kind, mesh).footprint().parts
        assert part == footprint_module.Part(
            name="batch", total_bytes=num_bytes, bytes_per_device=num_bytes // share, axis=axis
        )


def test_a_recurrent_agent_keeps_its_state_with_the_lanes_and_in_the_batch():
    found = {}
    for memory in ("none", "gru"):
        agent = AgentConfig(replay="none", rollout_length=16, num_minibatches=4, memory=memory, memory_size=16)
        config = config_for("pqn", FusedConfig(num_envs=NUM_ENVS), agent=agent)
        footprint = Fused(config, ENV, make_network(ENV.spec, agent)).footprint()
        found[memory] = {part.name: part.total_bytes for part in footprint.parts}
    state, is_first = NUM_ENVS * 16 * 4, NUM_ENVS * 16
    assert found["gru"]["lanes"] - found["none"]["lanes"] == state
    assert found["gru"]["batch"] - found["none"]["batch"] == state + is_first


@pytest.mark.parametrize("mesh", MESHES[:2], ids=lambda mesh: f"{mesh.data}x{mesh.model}")
def test_the_episodes_that_an_evaluation_plays_at_once_are_counted(mesh):
    few, many = (make_fused("uniform", mesh, eval_episodes=n).footprint() for n in (8, 8_000))
    found, larger = (footprint.bytes_per_device_of("evaluation") for footprint in (few, many))
    assert larger == 1_000 * found > 0
    assert many.bytes_per_device - few.bytes_per_device == larger - found
    stack = 2 * np.prod(ENV.spec.observation_shape) * ENV.spec.observation_dtype.itemsize
    assert found >= 8 // mesh.data * (stack + 4 + 1)  # with its return, and whether it has ended


def test_fewer_episodes_are_a_remedy_where_an_evaluation_does_not_fit(tmp_path, monkeypatch):
    limit(monkeypatch, 3_500_000)
    config = config_with_replay(tmp_path, eval_episodes=1_000_000)
    num_episodes = int(re.search(r"evaluation .*try eval_episodes (\d+)$", refusal(config)).group(1))
    assert 1_000 < num_episodes < 100_000
    fitting = dataclasses.replace(config, eval_episodes=num_episodes)
    assert qfleet.training.assembly.footprint(fitting).bytes_per_device <= 3_500_000


def limit(monkeypatch, num_bytes):
    monkeypatch.setattr(footprint_module, "available_bytes", lambda devices: num_bytes)


def config_with_replay(tmp_path, **settings):
    return qfleet.make_config(
        "CartPole-v1", "rainbow_lite", num_envs=8, replay_capacity=100_000, run_dir=str(tmp_path / "run"), **settings
    )


def refusal(config):
    with pytest.raises(ConfigError, match="a run must fit into memory") as caught:
        qfleet.iterate(config)
    return str(caught.value)


def test_a_run_that_does_not_fit_is_refused_before_anything_is_made_and_told_what_fits(tmp_path, monkeypatch):
    limit(monkeypatch, 1_000_000)
    config = config_with_replay(tmp_path)
    message = refusal(config)
    assert re.search(r"got 2\.50 MB replay \+ 457 kB priorities \+ .* = 3\.\d\d MB per device of 1\.00 MB", message)
    assert list(tmp_path.iterdir()) == []
    assert message.count("try ") == 1 and "mesh.data" not in message  # more CPU devices would have no more memory
    capacity = int(re.search(r"try replay_capacity (\d+)$", message).group(1))
    assert 10_000 < capacity < 40_000
    fitting = dataclasses.replace(config, agent=dataclasses.replace(config.agent, replay_capacity=capacity))
    assert 0.8e6 < qfleet.training.assembly.footprint(fitting).bytes_per_device <= 1e6


def test_a_resumed_run_must_fit_as_well(tmp_path, monkeypatch):
    config = config_with_replay(tmp_path, env_steps=128, warmup_env_steps=16, hidden_sizes=(4,))
    qfleet.train(config)
    before = sorted(tmp_path.rglob("*"))
    limit(monkeypatch, 1_000_000)
    with pytest.raises(ConfigError, match="a run must fit into memory"):
        qfleet.resume(config.run_dir, env_steps=256)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_larger_mesh_is_a_remedy_where_devices_have_memory_of_their_own(tmp_path, monkeypatch):
    limit(monkeypatch, 2_000_000)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert re.search(r"try replay_capacity \d+ or mesh.data 2$", refusal(config_with_replay(tmp_path)))
    limit(monkeypatch, 1_200_000)  # 3 would be enough, but 8 lanes don't divide over 3
    assert refusal(config_with_replay(tmp_path)).endswith(" or mesh.data 4")


def test_what_no_replay_could_make_fit_is_told_apart(tmp_path, monkeypatch):
    limit(monkeypatch, 1000)
    message = refusal(config_with_replay(tmp_path))
    assert message.endswith("try a smaller hidden_sizes, num_envs or batch_size")


def test_without_a_known_limit_nothing_is_refused(tmp_path, monkeypatch):
    limit(monkeypatch, None)
    run = qfleet.iterate(config_with_replay(tmp_path, env_steps=8, warmup_env_steps=0, hidden_sizes=(4,)))
    for _ in run:
        break
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (99_960, "100 kB"), (7_065_000_032, "7.07 GB"), (1e15, "1000 TB")],
)
def test_bytes_are_shown_in_three_digits(count, shown):
    assert show_bytes(count) == shown
