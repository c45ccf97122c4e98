"""The director, with processes that are objects in this process and answer when they are told to."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from small_servers import config_of, learner_of


class Reference:
    """Refers to what a process has returned, or will return."""

    def __init__(self) -> None:
        self.value: Any = None
        self.is_ready = self.has_failed = False


@dataclasses.dataclass
class Request:
    method: str
    arguments: tuple
    references: list[Reference]
    on_reply: Callable[..., None]
    on_dropped: Callable[[], None]


class FakeProcess:
    """A process of the run: the object that would run in it, without the process."""

    def __init__(self, name: str, kind: type, arguments: tuple, resources: Any, environment: Any, on_lost: Any) -> None:
        self.name, self.resources, self.on_lost = name, resources, on_lost
        self._kind = kind
        self._make = functools.partial(next(base for base in kind.__mro__ if base.__name__ in KINDS), *arguments)
        self.worker = self._make()
        self.requests: list[Request] = []
        self.is_ready = True

    def die(self) -> None:
        """Loses the object and all requests, as when a process dies and is replaced."""
        self.worker, requests = self._make(), self.requests
        self.requests = []
        self.on_lost()
        for request in requests:
            for reference in request.references:
                reference.has_failed = True
            request.on_dropped()

    def answer(self) -> bool:
        """Answers the first request; returns False if there is none, or something that it needs is missing."""
        if not self.requests:
            return False
        needs = [x for x in self.requests[0].arguments if isinstance(x, Reference)]
        if not all(need.is_ready or need.has_failed for need in needs):
            return False
        request = self.requests.pop(0)
        if any(need.has_failed for need in needs):
            request.on_dropped()
            return True
        values = [x.value if isinstance(x, Reference) else x for x in request.arguments]
        result = getattr(self._kind, request.method)(self.worker, *values)
        results = result if len(request.references) > 1 else [result]
        for reference, value in zip(request.references, results, strict=True):
            reference.value, reference.is_ready = value, True
        request.on_reply(request.references[0].value, *request.references[1:])
        return True


KINDS = ("Worker", "ServerShard")


class FakeSupervisor:
    """`Supervisor` without processes."""

    num_restarts = 0

    def add(self, process: FakeProcess) -> FakeProcess:
        return process

    def submit(
        self, process, method, *arguments, on_reply=lambda *_: None, num_returns=1, needs=(), is_repeated=False,
        on_dropped=lambda: None,
    ):  # fmt: skip
        references = [Reference() for _ in range(num_returns)]
        process.requests.append(Request(method, arguments, references, on_reply, on_dropped))
        return references


@pytest.fixture
def simulated(monkeypatch) -> Callable[..., Any]:
    """Returns a function that makes directors of fake processes."""
    pytest.importorskip("ray")
    from qfleet.topologies.parameter_server import director as module
    from qfleet.topologies.parameter_server import remote, sharded_server

    monkeypatch.setattr(remote, "is_reference", lambda value: isinstance(value, Reference))
    monkeypatch.setattr(sharded_server, "has_failed", lambda reference: reference.has_failed)
    monkeypatch.setattr(module, "is_local", lambda: True)

    def make(**settings: Any) -> Any:
        config = config_of(env_steps=10**9, **settings)

        def nothing(*_: Any) -> None:
            raise AssertionError("there is no checkpoint to read")

        director = module.ServerDirector(config, learner_of(config), nothing, nothing)
        director._supervisor = director._server._supervisor = director._gradient_requests._supervisor = FakeSupervisor()
        director._make_process = FakeProcess
        director._start_processes()
        return director

    return make


def step(director: Any, processes: list[FakeProcess]) -> None:
    """Lets the director make its requests, and some processes answer one request each."""
    director._issue()
    for process in processes:
        process.answer()


def workers_of(director: Any) -> list[FakeProcess]:
    return [worker.process for worker in director._actors]


def answer_all(processes: list[FakeProcess]) -> None:
    while any(process.answer() for process in processes):
        pass


def target_ages(director: Any) -> list[int]:
    """Returns how old the target network of each shard is, in learner steps."""
    states = [process.worker.state().leaves for process in director._server.processes]
    return [int(director._learner.shard_state(leaves, i).target_age) for i, leaves in enumerate(states)]


def train(director: Any, until_learner_steps: int, *, slow: tuple[int, ...] = (), every: int = 100) -> None:
    """Lets all processes answer in turn; the slow workers answer once every so many turns."""
    for turn in range(100_000):
        if director.learner_steps >= until_learner_steps:
            return
        workers = workers_of(director)
        ready = [process for i, process in enumerate(workers) if i not in slow or turn % every == 0]
        step(director, [*director._server.processes, *ready])
    raise AssertionError("it came to a standstill")


def test_with_as_many_gradients_a_step_as_workers_and_no_staleness_all_are_in_step(simulated):
    director = simulated(num_server_shards=2, gradients_per_learner_step=4, max_staleness=0)
    train(director, 40)
    stats = director._stats
    assert set(stats.staleness) == {0} and stats.num_gradients["stale"] == 0
    assert len(stats.losses) == 4 * 40


def test_learning_goes_on_without_a_slow_worker_whose_gradients_are_refused(simulated):
    director = simulated(num_server_shards=2, max_staleness=8)
    train(director, 900, slow=(3,))
    stats = director._stats
    assert max(stats.staleness) <= 8
    assert stats.num_gradients["stale"] >= 3 and stats.num_gradients["outlier"] == 0
    assert stats.num_gradients["applied"] == director.learner_steps
    assert len(stats.staleness) == director.learner_steps + director._server.num_pending_steps
    assert stats.actor_env_steps[3] < 0.25 * stats.actor_env_steps[:3].min()
    answer_all(director._server.processes)
    assert target_ages(director) == [director.learner_steps % 7] * 2


def test_a_lost_shard_has_all_go_back_to_one_snapshot_and_refuses_older_gradients(simulated, caplog):
    director = simulated(num_workers=2, num_server_shards=2, snapshot_period_learner_steps=20)
    train(director, 110)
    version, applied = director.version, director._stats.num_gradients["applied"]
    answer_all(director._server.processes)
    director._issue()
    pending = sum(worker.is_learning for worker in director._actors)
    assert pending
    with caplog.at_level(logging.WARNING, logger="qfleet"):
        director._server.processes[1].die()
    assert "server shard 1 was lost: the server goes back from learner step" in caplog.text
    back_at = director.learner_steps
    assert 80 <= back_at < 111 and director.version > version, "steps go back, versions never"
    director._server.processes[0].die()  # before it could go back
    assert director.learner_steps == back_at
    answer_all(director._server.processes)
    assert target_ages(director) == [back_at % 7] * 2, "all shards go on from the same step"
    train(director, 160)
    assert director._stats.num_gradients["stale"] == pending
    assert director._stats.num_gradients["applied"] >= applied + 160 - back_at


def test_steps_that_wait_when_a_shard_is_lost_are_refused_and_learning_goes_on(simulated):
    director = simulated(num_workers=2, num_server_shards=2, snapshot_period_learner_steps=20, max_gradient_norm=10.0)
    train(director, 50)
    for _ in range(40):
        step(director, workers_of(director))
        if director._server.num_pending_steps:
            break
        answer_all(director._server.processes)
    assert director._server.is_stepping and director._server.num_pending_steps
    waiting, learner_steps = director._server.num_pending_steps, director.learner_steps
    director._server.processes[0].die()
    assert not director._server.num_pending_steps and director._stats.num_gradients["stale"] >= waiting
    assert director.learner_steps < learner_steps
    train(director, 100)
    answer_all(director._server.processes)
    assert target_ages(director) == [director.learner_steps % 7] * 2
    states = [process.worker.state().leaves for process in director._server.processes]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states))


def test_a_server_lost_before_any_snapshot_begins_anew(simulated, caplog):
    director = simulated(num_workers=1, num_server_shards=1, snapshot_period_learner_steps=10**6)
    train(director, 5)
    director._server._snapshot = None
    with caplog.at_level(logging.WARNING, logger="qfleet"):
        director._server.processes[0].die()
    assert "the beginning: there is neither snapshot nor checkpoint" in caplog.text
    assert director.learner_steps == 0
    train(director, 20)


def test_a_worker_that_is_lost_begins_with_an_empty_replay_and_warms_up_again(simulated, caplog):
    director = simulated()
    train(director, 30)
    env_steps = director.env_steps
    held = director._actors[2].stats.num_transitions
    assert held > 0
    with caplog.at_level(logging.WARNING, logger="qfleet"):
        director._actors[2].process.die()
    assert f"worker 2 held {held} transitions; 0 are back: there is no checkpoint that has them" in caplog.text
    assert director.incarnations == [0, 0, 1, 0]
    train(director, 120)
    assert director.env_steps > env_steps and director._actors[2].stats.num_transitions > 0


def test_vectors_in_shared_memory_are_kept_as_long_as_anybody_needs_them(simulated, monkeypatch):
    """Free buffers are filled with NaN: if one were read, or freed too soon, the runs would learn different things."""
    from qfleet.topologies.parameter_server.shared_memory import Lease, RegionMapping, SharedRegion

    from qfleet.topologies.parameter_server import transport as module

    num_leased = 0

    class SpoiltRegion(SharedRegion):
        def lease(self) -> Lease | None:
            nonlocal num_leased
            mapping, length = RegionMapping(self.path), self._piece_bytes // 4
            for number in self._free:
                for buffer in self.buffers(Lease(number, []), "float32"):
                    mapping.read(buffer._replace(length=length))[:] = np.nan
            lease = super().lease()
            num_leased += lease is not None
            return lease

    class FewVectors(SpoiltRegion):
        """Some vectors of a step go through Ray, and others through shared memory."""

        def __init__(self, num_vectors: int, piece_lengths: list[int]) -> None:
            super().__init__(min(num_vectors, 5), piece_lengths)

    settings = {
        "num_workers": 3, "num_server_shards": 2, "target_update_period": 5, "max_gradient_norm": 10.0,
        "gradients_per_learner_step": 2,
    }  # fmt: skip
    learned = []
    for memory in (SpoiltRegion, FewVectors, None):
        monkeypatch.setattr(module, "can_share", lambda memory=memory: memory is not None)
        monkeypatch.setattr(module, "SharedRegion", memory)
        director = simulated(**settings)
        for turn in range(300):  # a server that is late, and takes several steps at once
            processes = workers_of(director)
            step(director, [*processes[:2], *(processes[2:] if turn % 17 == 0 else [])])
            for process in director._server.processes if turn % 5 == 4 else []:
                while process.answer():
                    pass
        answer_all(director._server.processes)
        assert director.learner_steps > 30
        learned.append([process.worker.state().leaves for process in director._server.processes])
    assert num_leased > 80
    for other in learned[1:]:
        jax.tree.map(np.testing.assert_array_equal, learned[0], other)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(learned))


def test_the_replay_ratio_is_kept(simulated):
    director = simulated(num_workers=2, env_steps_per_learner_step=8.0)
    train(director, 150)
    learned_from = director.env_steps - 64
    slack = 2 * 2 * 2 * 8 + 2 * 8
    assert abs(learned_from / 8.0 - 150) <= slack / 8.0 + 3
