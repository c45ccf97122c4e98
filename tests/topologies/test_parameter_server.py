"""The parameter server: its pieces, its workers, what is decided about gradients, and all of them on Ray."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qfleet
from qfleet.config import ConfigError, ParameterServerConfig, TrainConfig
from qfleet.core import pieces
from qfleet.core.agent import make_agent
from qfleet.core.learner import ELEMENTWISE, make_learner, update
from qfleet.core.types import Transition
from qfleet.envs.registry import make_env
from qfleet.networks import make_network
from qfleet.topologies.limiter import CHUNKS_AHEAD
from qfleet.topologies.parameter_server_gate import Gate
from qfleet.topologies.parameter_server_shard import Division, ServerShard, TargetClock
from qfleet.topologies.parameter_server_worker import Worker

BATCH = 16


def config_of(env: str = "CartPole-v1", preset: str = "double_dqn", **settings: Any) -> TrainConfig:
    sizes = {
        "num_workers": 4, "lanes_per_worker": 2, "rows_per_chunk": 8, "hidden_sizes": (16,), "batch_size": BATCH,
        "replay_capacity": 1024, "warmup_env_steps": 64, "env_steps_per_learner_step": 4.0, "target_update_period": 7,
    }  # fmt: skip
    return qfleet.make_config(env, preset, "parameter-server", **{**sizes, **settings})


def division_of(config: TrainConfig) -> Division:
    agent = make_agent(make_network(make_env(config.env).spec, config.agent), config.agent)
    return Division(agent, config.agent, config.topology.num_server_shards)


def batch_of(size: int, seed: int) -> Transition:
    random = np.random.default_rng(seed)
    return Transition(
        obs=random.normal(size=(size, 4)).astype(np.float32),
        action=random.integers(2, size=size).astype(np.int32),
        reward=3 * random.normal(size=size).astype(np.float32),
        discount=np.full(size, 0.9, np.float32),
        next_obs=random.normal(size=(size, 4)).astype(np.float32),
        weight=random.random(size).astype(np.float32),
    )


def pulled(server: list[ServerShard]) -> tuple[np.ndarray, ...]:
    handed = [shard.params() for shard in server]
    return (*(each.params for each in handed), *(each.target_params for each in handed))


# --- Pieces ---


@pytest.mark.parametrize("num_pieces", [2, 3])
@pytest.mark.parametrize("hidden_sizes", [(8,), (160, 160)], ids=["one vector", "many arrays"])
@pytest.mark.parametrize("optimiser", ELEMENTWISE)
def test_a_learner_divided_and_joined_is_the_same(optimiser, hidden_sizes, num_pieces):
    config = config_of(optimiser=optimiser, hidden_sizes=hidden_sizes, num_server_shards=num_pieces)
    division = division_of(config)
    shapes = jax.eval_shape(division.init_whole, np.uint32(0))
    random = np.random.default_rng(0)
    whole = jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), shapes)
    again = division.join(division.split(whole))
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_the_vector_of_a_tree_gives_the_tree():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": [jnp.float32(7), jnp.ones(2)]}
    vector = pieces.to_vector(tree)
    np.testing.assert_array_equal(vector, [0, 1, 2, 3, 4, 5, 7, 1, 1])
    jax.tree.map(np.testing.assert_array_equal, pieces.to_tree(vector, tree), tree)
    assert pieces.bounds(10, 3) == [(0, 3), (3, 6), (6, 10)]


@pytest.mark.parametrize("max_gradient_norm", [None, 0.5, 1000.0])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("num_gradients", [1, 4])
def test_gradients_of_workers_together_are_those_of_one_learner_on_the_joined_batch(
    num_gradients, num_shards, max_gradient_norm
):
    """Synchronous: each step is the mean of the workers' gradients with the newest parameters."""
    config = config_of(
        num_server_shards=num_shards, max_gradient_norm=max_gradient_norm, num_replay_shards=1,
        gradients_per_learner_step=num_gradients, max_staleness=0,
    )  # fmt: skip
    server = [ServerShard(config, i) for i in range(num_shards)]
    workers = [Worker(config, i) for i in range(num_gradients)]
    agent = make_agent(make_network(make_env(config.env).spec, config.agent), config.agent)
    learner = make_learner(agent, config.agent)
    division = division_of(config)
    expected: Any = learner.init(division.join([shard.state()[1] for shard in server]).params)
    one_step = jax.jit(functools.partial(update, learner))
    for step in range(50):
        batches = [batch_of(BATCH, 100 * step + i) for i in range(num_gradients)]
        gradients = []
        for worker, batch in zip(workers, batches, strict=True):
            worker.pull(step, pulled(server))
            lesson, *gradient = worker.gradient_of([np.arange(BATCH)], (batch,))
            gradients.append(gradient[:num_shards])
        columns = list(zip(*gradients, strict=True))
        if num_shards > 1 and max_gradient_norm is not None:
            squares = [shard.add_up(*column)[1] for shard, column in zip(server, columns, strict=True)]
            handed = [shard.apply(None, *squares) for shard in server]
        else:
            handed = [shard.step(None, *column) for shard, column in zip(server, columns, strict=True)]
        joined = jax.tree.map(lambda *x: np.concatenate(x), *batches)
        expected, info = one_step(expected, joined)
        if num_gradients == 1:
            np.testing.assert_allclose(lesson.loss, info.loss, rtol=1e-4)
        ours = division.params_of([each.params for each in handed])
        tolerance = 1e-6 if step == 0 else 1e-4
        assert distance(ours, expected.params) < tolerance, f"after step {step + 1}"
        assert (handed[0].target_params is not None) == ((step + 1) % config.agent.target_update_period == 0)
    state = division.join([shard.state()[1] for shard in server])
    assert distance(state.target_params, expected.target_params) < 1e-4
    assert state.target_age == expected.target_age == 50 % 7


def distance(ours: Any, theirs: Any) -> float:
    """Returns how far apart two trees are, relative to the second."""
    ours, theirs = (np.asarray(pieces.to_vector(tree)) for tree in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_gradients_travel_as_bfloat16_where_that_is_asked_for():
    vectors = {}
    for dtype in ("float32", "bfloat16"):
        config = config_of(gradient_dtype=dtype, num_replay_shards=1)
        worker = Worker(config, 0)
        worker.pull(0, pulled([ServerShard(config, 0)]))
        vectors[dtype] = worker.gradient_of([np.arange(BATCH)], (batch_of(BATCH, 0),))[1]
    assert vectors["bfloat16"].nbytes == vectors["float32"].nbytes / 2
    assert 0 < distance(vectors["bfloat16"].astype(np.float32), vectors["float32"]) < 0.01


def test_a_server_goes_on_where_another_stopped():
    config = config_of(num_server_shards=2)
    first, second = ServerShard(config, 1), ServerShard(dataclasses.replace(config, seed=1), 1)
    assert not np.array_equal(first.params().params, second.params().params)
    gradient = np.ones(len(first.params().params), np.float32)
    for _ in range(5):
        first.step(None, gradient)
    second.restore(first.state()[1])
    for _ in range(4):
        ours, theirs = second.step(None, gradient), first.step(None, gradient)
        np.testing.assert_array_equal(ours.params, theirs.params)
        assert (ours.target_params is None) == (theirs.target_params is None)
    second.reset()
    fresh = ServerShard(dataclasses.replace(config, seed=1), 1)
    np.testing.assert_array_equal(second.params().params, fresh.params().params)


@pytest.mark.parametrize("max_gradient_norm", [None, 0.5])
def test_steps_taken_at_once_are_those_taken_one_by_one(max_gradient_norm):
    config = config_of(num_server_shards=2, gradients_per_learner_step=2, max_gradient_norm=max_gradient_norm)
    random, (together, apart) = np.random.default_rng(0), [[ServerShard(config, i) for i in range(2)] for _ in range(2)]
    gradients = [[random.normal(size=len(shard.params().params)).astype(np.float32) for shard in together]
                 for _ in range(2 * 9)]  # fmt: skip

    def take(server: list[ServerShard], some: list[list[np.ndarray]]) -> list[Any]:
        columns = list(zip(*some, strict=True))
        if max_gradient_norm is None:
            return [shard.step(None, *column) for shard, column in zip(server, columns, strict=True)]
        squares = [shard.add_up(*column)[1] for shard, column in zip(server, columns, strict=True)]
        return [shard.apply(None, *squares) for shard in server]

    first, second = take(together, gradients[: 2 * 6]), take(together, gradients[2 * 6 :])
    assert first[0].target_params is None and second[0].target_params is not None, "it moves after 7"
    for i in range(9):
        alone = take(apart, gradients[2 * i : 2 * i + 2])
    for ours, theirs in zip(second, alone, strict=True):
        np.testing.assert_array_equal(ours.params, theirs.params)
    for ours, theirs in zip(together, apart, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours.state()[1], theirs.state()[1])


def test_the_clock_moves_when_the_target_network_does():
    clock = TargetClock(3)
    assert [clock.tick() for _ in range(7)] == [False, False, True, False, False, True, False]
    assert [clock.tick(n) for n in (1, 2, 2, 7)] == [False, True, True, True] and clock.age == 1


# --- Workers ---


def test_a_worker_learns_from_its_own_replay_and_sets_its_priorities():
    config = config_of(replay="prioritised", num_server_shards=2)
    worker, division = Worker(config, 1), division_of(config)
    server = [ServerShard(config, i) for i in range(2)]
    worker.begin(0)
    worker.pull(3, pulled(server))
    assert worker.version == 3
    for _ in range(6):
        report, stock, chunk = worker.act(1.0)
        assert chunk is None
    assert report.received_bytes == 0 and stock.num_transitions > 40
    store = worker._store
    before = jax.tree.map(np.array, store.state)
    lesson, *gradient = worker.gradient(0.4)
    leaves = np.asarray(store.replay.leaves(store.state)), np.asarray(store.replay.leaves(before))
    assert np.any(leaves[0] != leaves[1]), "priorities were set"
    # The same, by hand.
    key = functools.reduce(jax.random.fold_in, [6, 1, 0, 0], jax.random.key(config.seed))
    sample = store.replay.sample(jax.tree.map(jnp.array, before), key, np.float32(0.4))
    state = division.join([shard.state()[1] for shard in server])
    expected, info = division.learner.gradients(jax.tree.map(jnp.array, state), sample.transition)
    np.testing.assert_allclose(np.concatenate(gradient), pieces.to_vector(expected), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lesson.loss, info.loss, rtol=1e-5)
    assert not np.array_equal(np.concatenate(worker.gradient(0.4)[1:]), np.concatenate(gradient)), "another batch"


# --- The gate ---


def test_stale_gradients_are_dropped_and_those_of_before_a_step_back():
    gate = Gate(ParameterServerConfig(max_staleness=2))
    assert [gate.verdict(v, 10, 1.0) for v in (10, 8, 7)] == ["applied", "applied", "stale"]
    gate.oldest_version = 10
    assert [gate.verdict(v, 10, 1.0) for v in (10, 9)] == ["applied", "stale"]


def test_gradients_of_unusual_loss_are_dropped_until_it_is_usual():
    gate = Gate(ParameterServerConfig(max_loss_deviations=5.0))
    random = np.random.default_rng(0)
    assert gate.verdict(0, 0, 1e6) == "applied", "nothing is known yet"
    gate = Gate(ParameterServerConfig(max_loss_deviations=5.0))
    losses = 1 + 0.1 * random.normal(size=500)
    assert {gate.verdict(0, 0, loss) for loss in losses} == {"applied"}
    assert gate.verdict(0, 0, 2.0) == "outlier"  # ten deviations
    assert gate.verdict(0, 0, 0.0) == "applied", "a small loss harms nobody"
    verdicts = [gate.verdict(0, 0, 2.0) for _ in range(100)]
    assert verdicts[0] == "outlier" and verdicts[-1] == "applied", "and no loss is unusual for good"
    assert {gate.verdict(0, 0, loss) for loss in (np.inf, np.nan)} == {"applied"}, "the run fails of it"
    keeps_all = Gate(ParameterServerConfig(max_loss_deviations=None))
    assert {keeps_all.verdict(0, 0, loss) for loss in [*losses, 1e6]} == {"applied"}


# --- What is refused ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replay": "none"}, "replay must be uniform or prioritised with topology parameter-server.*got none"),
        ({"num_replay_shards": 5}, "num_replay_shards must be at most num_workers=4, got 5"),
        ({"gradient_dtype": "float16"}, "gradient_dtype must be one of float32, bfloat16, got 'float16'"),
        ({"max_staleness": -1}, "max_staleness must be a whole number, at least 0, got -1"),
        ({"max_loss_deviations": 0.0}, "max_loss_deviations must be positive, or None, got 0.0"),
        ({"num_envs": 8}, "num_envs must come with topology fused.*got topology parameter-server"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**settings)


def test_an_optimiser_that_needs_the_whole_network_is_refused_in_pieces(tmp_path):
    config = config_of(optimiser="lamb", num_server_shards=2, run_dir=str(tmp_path / "run"))
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match="num_server_shards must be 1 with .*got num_server_shards=2 and .*lamb"):
        qfleet.iterate(config)
    assert not (tmp_path / "run").exists()
    division_of(dataclasses.replace(config, topology=dataclasses.replace(config.topology, num_server_shards=1)))


# --- The director, with parts in this process that answer when they are told to ---


class Reference:
    """What a part returned, or will."""

    def __init__(self) -> None:
        self.value: Any = None
        self.is_there = self.has_failed = False


@dataclasses.dataclass
class Ask:
    method: str
    arguments: tuple
    references: list[Reference]
    then: Callable[..., None]
    dropped: Callable[[], None]


class FakePart:
    """A part of the run, as the object itself."""

    def __init__(self, name: str, kind: type, arguments: tuple, resources: Any, environment: Any, on_lost: Any) -> None:
        self.name, self.resources, self.on_lost = name, resources, on_lost
        self._make = functools.partial(next(base for base in kind.__mro__ if base.__name__ in KINDS), *arguments)
        self.worker = self._make()
        self.asks: list[Ask] = []
        self.is_there = True

    def die(self) -> None:
        """Is replaced by another."""
        self.worker, asks = self._make(), self.asks
        self.asks = []
        self.on_lost()
        for ask in asks:
            for reference in ask.references:
                reference.has_failed = True
            ask.dropped()

    def answer(self) -> bool:
        """Answers the first ask, and returns whether it could: what the ask needs must be there."""
        if not self.asks:
            return False
        needs = [x for x in self.asks[0].arguments if isinstance(x, Reference)]
        if not all(need.is_there or need.has_failed for need in needs):
            return False
        ask = self.asks.pop(0)
        if any(need.has_failed for need in needs):
            ask.dropped()
            return True
        values = [x.value if isinstance(x, Reference) else x for x in ask.arguments]
        result = self._call(ask.method, values)
        results = result if len(ask.references) > 1 else [result]
        for reference, value in zip(ask.references, results, strict=True):
            reference.value, reference.is_there = value, True
        ask.then(ask.references[0].value, *ask.references[1:])
        return True

    def _call(self, method: str, values: list[Any]) -> Any:
        worker = self.worker
        from qfleet.topologies.parameter_server_parts import RemoteWorker

        if method.startswith("pull"):
            return getattr(RemoteWorker, method)(worker, *values)
        return getattr(worker, method)(*values)


KINDS = ("Worker", "ServerShard")


class FakeParts:
    """`Parts` without processes."""

    num_restarts = 0

    def add(self, part: FakePart) -> FakePart:
        return part

    def ask(
        self, part, method, *arguments, then=lambda *_: None, num_returns=1, needs=(), is_repeated=False,
        dropped=lambda: None,
    ):  # fmt: skip
        references = [Reference() for _ in range(num_returns)]
        part.asks.append(Ask(method, arguments, references, then, dropped))
        return references


@pytest.fixture
def simulated(monkeypatch) -> Callable[..., Any]:
    """Returns a maker of directors of parts in this process."""
    pytest.importorskip("ray")
    from qfleet.topologies import parameter_server_director as module
    from qfleet.topologies import parameter_server_vectors

    monkeypatch.setattr(module, "has_failed", lambda reference: reference.has_failed)
    monkeypatch.setattr(parameter_server_vectors, "is_local", lambda: True)

    def make(**settings: Any) -> Any:
        config = config_of(env_steps=10**9, **settings)

        def nothing(*_: Any) -> None:
            raise AssertionError("there is no checkpoint to read")

        director = module.ServerDirector(config, division_of(config), nothing, nothing)
        director._parts = FakeParts()
        director._make_part = FakePart
        director._make_parts()
        return director

    return make


def step(director: Any, parts: list[FakePart]) -> None:
    """Lets the director ask, and some parts answer one ask each."""
    director._issue()
    for part in parts:
        part.answer()


def workers_of(director: Any) -> list[FakePart]:
    return [worker.part for worker in director._actors]


def answer_all(parts: list[FakePart]) -> None:
    while any(part.answer() for part in parts):
        pass


def target_ages(director: Any) -> list[int]:
    """Returns how old the target network of each shard is, in learner steps."""
    states = [part.worker.state()[1] for part in director._server]
    return [int(director._division.structured(leaves, i).target_age) for i, leaves in enumerate(states)]


def train(director: Any, until_learner_steps: int, *, slow: tuple[int, ...] = (), every: int = 100) -> None:
    """Lets all answer in turn; the slow workers once every so many turns."""
    for turn in range(100_000):
        if director.learner_steps >= until_learner_steps:
            return
        workers = workers_of(director)
        ready = [part for i, part in enumerate(workers) if i not in slow or turn % every == 0]
        step(director, [*director._server, *ready])
    raise AssertionError("it came to a standstill")


def test_with_as_many_gradients_a_step_as_workers_and_no_staleness_all_are_in_step(simulated):
    director = simulated(num_server_shards=2, gradients_per_learner_step=4, max_staleness=0)
    train(director, 40)
    tally = director._tally
    assert set(tally.staleness) == {0} and tally.num_gradients["stale"] == 0
    assert len(tally.losses) == 4 * 40


def test_learning_goes_on_without_a_slow_worker_whose_gradients_are_refused(simulated):
    director = simulated(num_server_shards=2, max_staleness=8)
    train(director, 900, slow=(3,))
    tally = director._tally
    assert max(tally.staleness) <= 8
    assert tally.num_gradients["stale"] >= 3 and tally.num_gradients["outlier"] == 0
    assert tally.num_gradients["applied"] == director.learner_steps
    assert len(tally.staleness) == director.learner_steps + len(director._waiting)
    assert tally.actor_env_steps[3] < 0.25 * tally.actor_env_steps[:3].min()
    answer_all(director._server)
    assert target_ages(director) == [director.learner_steps % 7] * 2


def test_a_lost_shard_has_all_go_back_to_one_snapshot_and_refuses_older_gradients(simulated, caplog):
    director = simulated(num_server_shards=2, snapshot_period_learner_steps=20)
    train(director, 110)
    version, applied = director.version, director._tally.num_gradients["applied"]
    answer_all(director._server)
    director._issue()
    pending = sum(worker.is_learning for worker in director._actors)
    assert pending
    with caplog.at_level(logging.WARNING, logger="qfleet"):
        director._server[1].die()
    assert "server shard 1 was lost: the server goes back from learner step" in caplog.text
    back_at = director.learner_steps
    assert 80 <= back_at < 111 and director.version > version, "steps go back, versions never"
    director._server[0].die()  # before it could go back
    assert director.learner_steps == back_at
    answer_all(director._server)
    assert target_ages(director) == [back_at % 7] * 2, "all shards go on from the same step"
    train(director, 160)
    assert director._tally.num_gradients["stale"] == pending
    assert director._tally.num_gradients["applied"] >= applied + 160 - back_at


def test_steps_that_wait_when_a_shard_is_lost_are_refused_and_learning_goes_on(simulated):
    director = simulated(num_server_shards=2, snapshot_period_learner_steps=20, max_gradient_norm=10.0)
    train(director, 50)
    for _ in range(40):
        step(director, workers_of(director))
        if director._waiting:
            break
        answer_all(director._server)
    assert director._is_stepping and director._waiting
    waiting, learner_steps = len(director._waiting), director.learner_steps
    director._server[0].die()
    assert not director._waiting and director._tally.num_gradients["stale"] >= waiting
    assert director.learner_steps < learner_steps
    train(director, 100)
    answer_all(director._server)
    assert target_ages(director) == [director.learner_steps % 7] * 2
    states = [part.worker.state()[1] for part in director._server]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states))


def test_a_server_lost_before_any_snapshot_begins_anew(simulated, caplog):
    director = simulated(num_server_shards=1, snapshot_period_learner_steps=10**6)
    train(director, 5)
    director._snapshot = None
    with caplog.at_level(logging.WARNING, logger="qfleet"):
        director._server[0].die()
    assert "the beginning: there is neither snapshot nor checkpoint" in caplog.text
    assert director.learner_steps == 0
    train(director, 20)


def test_a_worker_that_is_lost_begins_with_an_empty_replay_and_warms_up_again(simulated, caplog):
    director = simulated()
    train(director, 30)
    env_steps = director.env_steps
    held = director._actors[2].stock.num_transitions
    assert held > 0
    with caplog.at_level(logging.WARNING, logger="qfleet"):
        director._actors[2].part.die()
    assert f"worker 2 held {held} transitions; 0 are back: there is no checkpoint that has them" in caplog.text
    assert director.incarnations == [0, 0, 1, 0]
    train(director, 120)
    assert director.env_steps > env_steps and director._actors[2].stock.num_transitions > 0


def test_vectors_in_shared_memory_are_kept_as_long_as_anybody_needs_them(simulated, monkeypatch):
    """What is free is spoilt: whoever read it, or gave back what another still reads, would learn something else."""
    from qfleet.topologies import parameter_server_vectors as module
    from qfleet.topologies.shared_memory import SharedMemory, Slot, Window

    num_leased = 0

    class SpoiltMemory(SharedMemory):
        def slot(self) -> Slot | None:
            nonlocal num_leased
            window, length = Window(self.path), self._piece_bytes // 4
            for number in self._free:
                for place in self.places(Slot(number, []), "float32"):
                    window.get(place._replace(length=length))[:] = np.nan
            slot = super().slot()
            num_leased += slot is not None
            return slot

    class FewSlots(SpoiltMemory):
        """Some vectors go by Ray, and others of the same step don't."""

        def __init__(self, num_slots: int, lengths: list[int]) -> None:
            super().__init__(min(num_slots, 5), lengths)

    settings = {
        "num_server_shards": 2, "target_update_period": 5, "max_gradient_norm": 10.0, "gradients_per_learner_step": 2
    }  # fmt: skip
    learned = []
    for memory in (SpoiltMemory, FewSlots, None):
        monkeypatch.setattr(module, "can_share", lambda memory=memory: memory is not None)
        monkeypatch.setattr(module, "SharedMemory", memory)
        director = simulated(**settings)
        for turn in range(400):  # a server that is late, and takes several steps at once
            parts = workers_of(director)
            step(director, [*parts[:3], *(parts[3:] if turn % 17 == 0 else [])])
            for part in director._server if turn % 5 == 4 else []:
                while part.answer():
                    pass
        answer_all(director._server)
        assert director.learner_steps > 40
        learned.append([part.worker.state()[1] for part in director._server])
    assert num_leased > 120
    for other in learned[1:]:
        jax.tree.map(np.testing.assert_array_equal, learned[0], other)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(learned))


def test_the_replay_ratio_is_kept(simulated):
    director = simulated(env_steps_per_learner_step=8.0)
    train(director, 300)
    learned_from = director.env_steps - 64
    slack = 2 * 4 * 2 * 8 + 4 * 8
    assert abs(learned_from / 8.0 - 300) <= slack / 8.0 + 3


# --- On Ray ---


def sizes(**settings: Any) -> TrainConfig:
    return config_of("CartPole-v1", "rainbow_lite", replay_capacity=8192, **settings)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_it_trains_is_saved_and_goes_on_in_other_sizes_and_elsewhere(cluster, tmp_path):
    path = tmp_path / "run"
    config = sizes(
        num_workers=2, num_server_shards=2, env_steps=2_000, run_dir=str(path), eval_period_env_steps=1_000,
        gradient_dtype="bfloat16",
    )  # fmt: skip
    run = qfleet.iterate(config)
    director = run._topology._director
    has_memory = director._vectors._memory is not None
    assert has_memory == hasattr(os, "memfd_create"), "they share memory, where the system has it"
    with director._lock:  # a run begins with one worker, which could be at the end before the other one is there
        director._lock.wait_for(lambda: director.num_actors_there == 2)
    for _ in run:
        pass
    summary = run.summary
    assert summary["stopped"] == "env steps" and summary["topology"] == "parameter-server"
    steps = summary["learner_steps"]
    assert steps > 300 and summary["num_restarts"] == 0
    found = records(path)
    assert max(record.get("fleet_workers_there", 0) for record in found) == 2
    assert any(record.get("fleet_pushed_bytes_per_second", 0) > 0 for record in found)
    policy = qfleet.load(path)
    assert np.isfinite(policy.evaluate(num_episodes=2)).all()
    shared = dataclasses.replace(config.topology, num_workers=3, num_server_shards=1, num_replay_shards=1)
    run = qfleet.resume(path, env_steps=3_000, topology=shared)
    for _ in run:
        pass
    assert run.summary["env_steps"] >= 3_000 and run.summary["learner_steps"] > steps
    steps = run.summary["learner_steps"]
    run = qfleet.resume(path, env_steps=4_000, topology=qfleet.config.FusedConfig(num_envs=8))
    for _ in run:
        pass
    assert run.summary["env_steps"] >= 4_000 and run.summary["learner_steps"] > steps


@pytest.mark.slow
def test_it_survives_the_loss_of_a_worker_and_of_a_shard_of_the_server(cluster, tmp_path, monkeypatch, caplog):
    from qfleet.topologies import parameter_server_vectors

    monkeypatch.setattr(parameter_server_vectors, "can_share", lambda: False)  # as on a cluster
    path = tmp_path / "run"
    config = sizes(
        num_workers=2, num_server_shards=2, env_steps=10**7, run_dir=str(path), checkpoint_period_seconds=1.0
    )
    run = qfleet.iterate(config)
    director = run._topology._director
    env_steps = 0

    def go_on_until(is_so: Callable[[], bool]) -> None:
        nonlocal env_steps
        while True:
            with director._lock:
                if is_so():
                    return
            progress = next(records)
            assert progress.env_steps >= env_steps, "environment steps never go back"
            env_steps = progress.env_steps

    def is_whole(version: int) -> bool:
        """Whether each worker has brought chunks since it was started, and the server was sent steps beyond that."""
        return director.version > version and all(worker.num_asked > CHUNKS_AHEAD for worker in director._actors)

    with contextlib.closing(iter(run)) as records:
        go_on_until(lambda: is_whole(0))
        for num_restarts, name in enumerate(("worker 1", "server shard 0"), start=1):
            part = next(part for part in director._parts._parts if part.name == name)
            os.kill(part.place[0], signal.SIGKILL)
            go_on_until(lambda n=num_restarts: director.num_restarts == n)
            with director._lock:  # steps go back when the server does, versions never
                learner_steps, version = director.learner_steps, director.version
            go_on_until(lambda v=version: is_whole(v))
    assert run.summary["num_restarts"] == 2
    assert "server shard 0 was lost: the server goes back from learner step" in caplog.text
    assert run.summary["learner_steps"] > learner_steps, "it goes on from where it went back to"


@pytest.mark.slow
def test_it_learns_cartpole(cluster, tmp_path):
    config = qfleet.make_config(
        "CartPole-v1", "rainbow_lite", "parameter-server", stop_return=195.0, env_steps=200_000,
        run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    assert qfleet.train(config)["stopped"] == "return reached"
