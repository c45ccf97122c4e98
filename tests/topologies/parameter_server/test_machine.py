"""The machine of the parameter server: events in, requests out."""

import collections
from typing import Any

import numpy as np
import pytest
from driven_machine import DrivenMachine
from small_servers import config_of

from qfleet.topologies.fleet.actor import ChunkStats
from qfleet.topologies.fleet.messages import CheckValues, Dropped, LearnerFound, Paused, ProcessId, Restored, SavedShare
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.replay_shard import InsertReply, SampleReply, ShardStats
from qfleet.topologies.fleet.sharded_replay import Insert, RestoreReplay, SampleShare, SetPriorities
from qfleet.topologies.parameter_server.machine import ServerMachine
from qfleet.topologies.parameter_server.requests import (
    Act,
    ActAnswer,
    ApplyAverages,
    ApplyGradients,
    AverageGradients,
    ComputeGradient,
    ComputeGradientOf,
    GradientAnswer,
    Publish,
    PublishedAnswer,
    ResetShard,
    RestoreShard,
    TakeSnapshot,
)
from qfleet.topologies.parameter_server.sharded_server import SavedServer
from qfleet.topologies.parameter_server.stats import ServerStats
from qfleet.topologies.parameter_server.worker import GradientStats

CHUNK = ChunkStats([], [], 0.0, 0, 0.25, 0)


class Fleet(DrivenMachine):
    """A machine with processes that only count. A shard of the server knows which gradients it has applied."""

    def __init__(self, roles: tuple[str, ...] = ("worker", "replay shard"), **settings: Any) -> None:
        config = config_of(**{"env_steps": 10**9, **settings})
        self.topology, machine = config.topology, ServerMachine(config, num_params=1_000)
        machine.stats = ServerStats(self.topology.num_workers)
        self.held: collections.Counter[ProcessId] = collections.Counter()
        self.applied: dict[ProcessId, tuple] = dict.fromkeys(machine.server.shards, ())
        """The gradients that each shard has applied: for each, the number of its worker and of its request."""
        self.averaged: dict[ProcessId, tuple] = {}
        self.values: dict[Reference, Any] = {}
        replies = {
            Act: self.act, ComputeGradient: self.compute, ComputeGradientOf: self.compute, Insert: self.insert,
            SampleShare: lambda request: SampleReply(self.stats_of(request), request.results[0]),
            SetPriorities: self.stats_of,
            ApplyGradients: self.apply, AverageGradients: self.average, ApplyAverages: self.apply,
            TakeSnapshot: self.copy, RestoreShard: self.restore, ResetShard: self.reset,
            Publish: lambda request: tuple(request.results),
        }  # fmt: skip
        processes = [*(worker.process for worker in machine.actors.each), *machine.replay.shards]
        super().__init__(machine, replies, [process for process in processes if process.role in roles])

    @property
    def servers(self) -> list[ProcessId]:
        return self.machine.server.shards

    def worker(self, i: int) -> Any:
        return self.machine.actors.each[i]

    def stats_of(self, request: Any) -> ShardStats:
        return ShardStats(float(self.held[request.process]), self.held[request.process], 0.1)

    def insert(self, request: Insert) -> InsertReply:
        self.held[request.process] += 16
        return InsertReply(self.stats_of(request), True)

    def act(self, request: Act) -> ActAnswer:
        if request.results:
            return ActAnswer(CHUNK, None, request.results[0])
        self.held[request.process] += 16
        return ActAnswer(CHUNK, self.stats_of(request), None)

    def compute(self, request: Any) -> GradientAnswer:
        pieces, priorities = np.split(np.array(request.results, object), [len(self.servers)])
        for piece in pieces:
            self.values[piece] = (request.process.number, id(request))
        return GradientAnswer(GradientStats(1.0, 0.5, 1.0, 0.1), tuple(pieces), tuple(priorities))

    def average(self, request: AverageGradients) -> Any:
        self.averaged[request.process] = tuple(self.values[gradient] for gradient in request.gradients)
        return 0.1, request.results[0]

    def apply(self, request: Any) -> PublishedAnswer:
        process = request.process
        clipped = isinstance(request, ApplyAverages)
        new = self.averaged.pop(process) if clipped else tuple(self.values[each] for each in request.gradients)
        self.applied[process] += new
        return PublishedAnswer(0.1, request.results[0], request.results[1] if len(request.results) > 1 else None)

    def copy(self, request: TakeSnapshot) -> Reference:
        self.values[request.results[0]] = self.applied[request.process]
        return request.results[0]

    def restore(self, request: RestoreShard) -> None:
        self.applied[request.process] = self.values[request.leaves]

    def reset(self, request: ResetShard) -> None:
        self.applied[request.process] = ()

    def answer_servers(self) -> None:
        self.answer_all("server shard")

    def train(self, until_learner_steps: int, *, slow: tuple[int, ...] = (), every: int = 100) -> None:
        """Lets all processes answer in turn; the slow workers answer once every so many turns."""
        for turn in range(20_000):
            if self.machine.learner_steps >= until_learner_steps:
                return
            self.turn()
            for process in self.servers + self.machine.replay.shards:
                self.answer(process)
            for i in range(self.topology.num_workers):
                if i not in slow or turn % every == 0:
                    self.answer(ProcessId("worker", i))
        raise AssertionError("it came to a standstill")

    def lose_worker_or_shard(self, process: ProcessId) -> None:
        self.held[process] = 0
        if process in self.applied:
            self.applied[process] = ("lost",)
        self.lose(process)

    def check_servers_agree(self) -> None:
        """Requires that all shards have taken the same steps, as many as are counted."""
        self.answer_servers()
        states = set(self.applied.values())
        assert len(states) == 1
        assert len(states.pop()) == self.machine.learner_steps * self.topology.gradients_per_learner_step


def test_with_as_many_gradients_a_step_as_workers_and_no_staleness_all_are_in_step():
    fleet = Fleet(num_server_shards=2, gradients_per_learner_step=4, max_staleness=0)
    fleet.train(40)
    stats = fleet.machine.stats
    assert set(stats.staleness) == {0} and stats.num_gradients["stale"] == 0 and len(stats.losses) == 4 * 40
    fleet.check_servers_agree()
    workers = [worker for worker, _ in fleet.applied[fleet.servers[0]]]
    assert all(sorted(workers[i : i + 4]) == [0, 1, 2, 3] for i in range(0, 160, 4))


def test_learning_goes_on_without_a_slow_worker_whose_gradients_are_refused():
    fleet = Fleet(num_server_shards=2, max_staleness=8)
    fleet.train(900, slow=(3,))
    stats, machine = fleet.machine.stats, fleet.machine
    assert max(stats.staleness) <= 8
    assert stats.num_gradients["stale"] >= 3 and stats.num_gradients["outlier"] == 0
    assert stats.num_gradients["applied"] == machine.learner_steps
    assert len(stats.staleness) == machine.learner_steps + len(machine.server.queue.pending_steps)
    assert stats.actor_env_steps[3] < 0.25 * stats.actor_env_steps[:3].min()
    fleet.check_servers_agree()


def test_a_lost_shard_has_all_go_back_to_one_snapshot_and_refuses_older_gradients():
    fleet = Fleet(num_workers=2, num_server_shards=2, snapshot_period_learner_steps=20)
    fleet.train(110)
    machine = fleet.machine
    version, applied = machine.version, machine.stats.num_gradients["applied"]
    fleet.answer_servers()
    fleet.turn()
    pending = sum(worker.is_learning for worker in machine.actors.each)
    assert pending
    fleet.lose_worker_or_shard(fleet.servers[1])
    assert fleet.warnings[-1].startswith("server shard 1 was lost: the server goes back from learner step")
    back_at = machine.learner_steps
    assert 80 <= back_at < 111 and machine.version > version, "steps go back, versions never"
    fleet.lose_worker_or_shard(fleet.servers[0])  # before it could go back
    assert machine.learner_steps == back_at
    fleet.check_servers_agree()
    fleet.train(160)
    assert machine.stats.num_gradients["stale"] == pending
    assert machine.stats.num_gradients["applied"] >= applied + 160 - back_at
    fleet.check_servers_agree()


def test_steps_that_wait_when_a_shard_is_lost_are_refused_and_learning_goes_on():
    fleet = Fleet(num_workers=2, num_server_shards=2, snapshot_period_learner_steps=20, max_gradient_norm=10.0)
    fleet.train(50)
    server = fleet.machine.server
    for _ in range(40):
        fleet.turn()
        fleet.answer_all("worker")
        if server.queue.pending_steps:
            break
        fleet.answer_servers()
    assert server.is_stepping and server.queue.pending_steps
    waiting, learner_steps = len(server.queue.pending_steps), fleet.machine.learner_steps
    fleet.lose_worker_or_shard(fleet.servers[0])
    assert not server.queue.pending_steps and fleet.machine.stats.num_gradients["stale"] >= waiting
    assert fleet.machine.learner_steps < learner_steps
    fleet.train(100)
    fleet.check_servers_agree()


def test_a_gradient_that_is_lost_on_its_way_makes_the_server_go_back():
    fleet = Fleet(num_workers=2, num_server_shards=2, snapshot_period_learner_steps=20, max_gradient_norm=None)
    fleet.train(50)
    while not fleet.machine.server.is_stepping:
        fleet.turn()
        fleet.answer_all("worker")
    first, second = fleet.servers
    for shard in (first, second):
        while not isinstance(fleet.waiting[shard][0], ApplyGradients):
            fleet.answer(shard)
    assert fleet.answer(first), "one shard takes the step"
    step = fleet.waiting[second].popleft()
    fleet.tell(Dropped(step, tuple(step.gradients)))
    assert fleet.warnings[-1].startswith("a gradient was lost on its way to the server: the server goes back")
    fleet.check_servers_agree()
    fleet.train(100)
    fleet.check_servers_agree()


def test_a_state_that_is_lost_on_its_way_to_a_shard_makes_the_server_go_back_again():
    fleet = Fleet(num_workers=2, num_server_shards=2)
    fleet.train(50)
    fleet.lose_worker_or_shard(fleet.servers[0])
    restore = next(each for each in fleet.waiting[fleet.servers[1]] if isinstance(each, RestoreShard))
    fleet.waiting[fleet.servers[1]].remove(restore)
    fleet.tell(Dropped(restore, (restore.leaves,)))
    assert fleet.warnings[-1].startswith("the state of a shard was lost on its way: the server goes back")
    fleet.check_servers_agree()
    fleet.train(100)
    fleet.check_servers_agree()


def test_a_server_without_snapshot_goes_back_to_the_newest_checkpoint_or_to_the_beginning():
    fleet = Fleet(num_workers=1, num_server_shards=1, snapshot_period_learner_steps=10**6)
    fleet.train(5)
    fleet.machine.server._snapshot = None
    fleet.lose_worker_or_shard(fleet.servers[0])
    assert "the beginning: there is neither snapshot nor checkpoint" in fleet.warnings[-1]
    assert fleet.machine.learner_steps == 0
    fleet.train(20)
    fleet.check_servers_agree()
    leaves = Reference[Any]()
    fleet.values[leaves], fleet.learner = ("saved",) * 11, LearnerFound(11, SavedServer(4, [leaves]))
    fleet.machine.server._snapshot = None
    fleet.lose_worker_or_shard(fleet.servers[0])
    assert fleet.warnings[-1].endswith("to 11, the newest checkpoint")
    assert fleet.machine.server.queue.target_age == 4
    fleet.check_servers_agree()


def test_a_snapshot_that_is_lost_is_no_longer_gone_back_to():
    fleet = Fleet(num_workers=1, num_server_shards=1)
    fleet.train(5)
    fleet.machine.server.go_back("a test")
    assert isinstance(fleet.machine.server.go_back("a test")[0], CheckValues)
    (read,) = fleet.machine.server.snapshot_checked(is_lost=True)
    assert read == () and fleet.machine.server.take_snapshot(), "the next one is taken at once"


def test_a_worker_that_is_lost_begins_with_an_empty_replay_and_warms_up_again():
    fleet = Fleet()
    fleet.train(30)
    env_steps, held = fleet.machine.actors.env_steps, fleet.worker(2).stats.num_transitions
    assert held > 0
    fleet.lose_worker_or_shard(ProcessId("worker", 2))
    assert fleet.warnings == [f"worker 2 held {held} transitions; 0 are back: there is no checkpoint that has them"]
    assert fleet.machine.counters["incarnations"] == [0, 0, 1, 0]
    assert fleet.worker(2).stats.num_transitions == 0 and not fleet.machine.is_warm(fleet.worker(2))
    fleet.train(120)
    assert fleet.machine.actors.env_steps > env_steps and fleet.worker(2).stats.num_transitions > 0


def test_actors_do_not_wait_for_a_server_that_has_gone_back_and_has_nothing_to_learn_from():
    fleet = Fleet(num_server_shards=1, snapshot_period_learner_steps=10**6)
    fleet.train(100)
    for i in range(4):
        fleet.lose_worker_or_shard(ProcessId("worker", i))
    fleet.machine.server._snapshot = None
    fleet.lose_worker_or_shard(fleet.servers[0])
    assert fleet.machine.learner_steps == 0
    fleet.train(20)


def test_what_a_worker_pulls_is_all_that_it_is_not_known_to_have():
    fleet = Fleet(num_workers=1, num_server_shards=1, env_steps_per_learner_step=10**6)
    worker = ProcessId("worker", 0)
    fleet.turn()
    fleet.answer(worker)  # it begins
    fleet.answer_servers()
    acts = fleet.requested(Act)
    assert len(acts) == 2 and all(act.pull.params and act.pull.target_params for act in acts), "the first may be lost"
    fleet.answer(worker)
    fleet.turn()
    assert fleet.requested(Act)[2].pull == (0, (), ())
    lost = fleet.waiting[worker].popleft()
    fleet.tell(Dropped(lost, lost.pull.params))
    fleet.turn()
    assert len(fleet.requested(Publish)) == 2, "they were lost with their node"
    assert fleet.requested(Act)[3].pull.params == (fleet.requested(Publish)[1].results[0],)


def test_the_replay_ratio_is_kept():
    fleet = Fleet(num_workers=2, env_steps_per_learner_step=8.0)
    fleet.train(150)
    learned_from = fleet.machine.actors.env_steps - 64
    slack = 2 * 2 * 2 * 8 + 2 * 8
    assert abs(learned_from / 8.0 - 150) <= slack / 8.0 + 3


def test_a_pause_lets_what_is_under_way_end_and_asks_for_nothing_more():
    fleet = Fleet(num_server_shards=2, num_replay_shards=2)
    fleet.train(30)
    fleet.turn()
    fleet.tell(Paused())
    assert fleet.machine.is_busy
    fleet.answer_all("worker", "replay shard", "server shard")
    assert not fleet.machine.is_busy
    assert fleet.machine.actors.env_steps == sum(fleet.held.values())
    fleet.check_servers_agree()


def test_workers_that_share_a_replay_return_errors_to_the_shards_that_drew():
    fleet = Fleet(num_server_shards=2, num_replay_shards=2)
    fleet.train(50)
    fleet.answer_all("worker")
    gradients = [each for each in fleet.requested(ComputeGradientOf) if each not in fleet.waiting[each.process]]
    assert len(gradients) >= 50
    for gradient in gradients:
        returned = [each for each in fleet.requested(SetPriorities) if each.number == gradient.drawn.number]
        assert [each.process for each in returned] == [sample.process for sample in gradient.drawn.samples]
        assert [each.priority for each in returned] == list(gradient.results[2:])


@pytest.mark.parametrize("num_replay_shards", [0, 2])
def test_a_run_goes_on_from_the_counts_of_a_checkpoint(num_replay_shards):
    fleet = Fleet(num_workers=2, num_replay_shards=num_replay_shards)
    leaves, shares = [Reference[Any]()], [SavedShare(Reference[Any](), 5), SavedShare(Reference[Any](), 6)]
    fleet.tell(Restored(464, 90, 0, 3, 17, SavedServer(5, leaves), shares))
    machine = fleet.machine
    assert (machine.actors.env_steps, machine.learner_steps, machine.version) == (464, 90, 18)
    assert machine.counters == {"replay_starts_at": 0, "version": 18, "incarnations": [3, 3]}
    assert [each.leaves for each in fleet.requested(RestoreShard)] == leaves
    restored = [(each.process.role, each.saved) for each in fleet.requested(RestoreReplay)]
    assert restored == [("replay shard" if num_replay_shards else "worker", share.replay) for share in shares]


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_lost_the_shards_agree_and_the_same_events_lead_to_the_same_requests(seed):
    def played() -> list[Any]:
        clips = {"max_gradient_norm": 10.0} if seed % 2 else {}
        fleet, random = Fleet(num_server_shards=2, num_replay_shards=seed // 2, **clips), np.random.default_rng(seed)
        version = 0
        for _ in range(1_500):
            fleet.turn()
            process = list(fleet.waiting)[random.integers(len(fleet.waiting))]
            fleet.answer(process)
            if random.random() < 0.01:
                fleet.lose_worker_or_shard(process)
            assert fleet.machine.version >= version
            version = fleet.machine.version
        fleet.check_servers_agree()
        learner_steps = fleet.machine.learner_steps
        fleet.train(learner_steps + 20)
        fleet.check_servers_agree()
        return [*((type(each), getattr(each, "process", None)) for each in fleet.log), fleet.machine.counters]

    assert played() == played()
