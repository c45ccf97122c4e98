"""The machine of actor-learner: events in, requests out."""

from typing import Any

import numpy as np
import pytest
from driven_machine import DrivenMachine
from small_fleets import BATCH, config_of

from qfleet.topologies.actor_learner.learner import UpdateResult
from qfleet.topologies.actor_learner.machine import (
    LEARNER,
    ActorLearnerMachine,
    ActorLearnerStats,
    Collect,
    Learn,
    Publish,
    RestoreLearner,
)
from qfleet.topologies.fleet.actor import ChunkStats
from qfleet.topologies.fleet.messages import Begin, Dropped, LearnerFound, Paused, ProcessId, Restored, SavedShare
from qfleet.topologies.fleet.rate_limiter import ROUNDS_AHEAD
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.replay_shard import InsertReply, SampleReply, ShardStats, Writer
from qfleet.topologies.fleet.sharded_replay import Insert, RestoreReplay, SampleShare, SetPriorities

NUM_BATCHES = 2
ALL = ("actor", "replay shard", "learner")
CHUNK = ChunkStats([1.0], [10], 0.5, 0, 0.25, 100)


class Fleet(DrivenMachine):
    """A machine with processes that do nothing but count."""

    def __init__(self, roles: tuple[str, ...] = ALL, **settings: Any) -> None:
        config = config_of(**{"env_steps": 10**9, **settings})
        machine = ActorLearnerMachine(config, NUM_BATCHES)
        machine.stats = ActorLearnerStats(config.topology.num_actors)
        self.steps, self.held = 0, [0, 0]
        replies = {
            Collect: lambda request: (CHUNK, request.results[0]), Insert: self.insert, Learn: self.learn,
            SampleShare: lambda request: SampleReply(self.stats_of(request), request.results[0]),
            SetPriorities: self.stats_of,
            Publish: lambda request: (self.steps, request.results[0]),
        }  # fmt: skip
        processes = [*(actor.process for actor in machine.actors.each), *machine.replay.shards, LEARNER]
        super().__init__(machine, replies, [process for process in processes if process.role in roles])

    def stats_of(self, request: Any) -> ShardStats:
        num_transitions = self.held[request.process.number]
        return ShardStats(float(num_transitions), num_transitions, 0.1)

    def insert(self, request: Insert) -> InsertReply:
        self.held[request.process.number] += 16
        return InsertReply(self.stats_of(request), True)

    def learn(self, request: Learn) -> tuple[UpdateResult, Any]:
        self.steps += NUM_BATCHES
        return UpdateResult(0.5, 0.25, self.steps, 0.1), list(request.results)

    def run(self, num_turns: int, *roles: str) -> None:
        for _ in range(num_turns):
            self.turn()
            self.answer_all(*roles or ALL)


def test_parameters_come_before_chunks_and_each_actor_has_two_chunks_ahead():
    fleet = Fleet()
    assert [request.incarnation for request in fleet.requested(Begin)] == [0] * 4
    fleet.turn()
    assert fleet.requested(Collect) == [] and len(fleet.requested(Publish)) == 1
    fleet.answer_all("learner")
    fleet.turn()
    chunks = fleet.requested(Collect)
    assert [(chunk.process.number, chunk.writer.num_chunks) for chunk in chunks] == [
        *((i, 0) for i in range(4)), *((i, 1) for i in range(4))
    ]  # fmt: skip
    assert all(chunk.broadcast.params is fleet.requested(Publish)[0].results[0] for chunk in chunks)
    fleet.turn()
    assert len(fleet.requested(Collect, Publish)) == 9, "nothing is asked for twice"


def test_a_chunk_is_counted_once_its_shard_has_stored_it():
    fleet = Fleet()
    fleet.run(1, "learner")
    fleet.turn()
    assert fleet.answer(ProcessId("actor", 3)) and fleet.answer(ProcessId("actor", 3))  # begins, acts
    (insert,) = fleet.requested(Insert)
    assert (insert.process, insert.segment, insert.arrived.writer) == (ProcessId("replay shard", 1), 1, Writer(0, 0))
    assert fleet.machine.actors.env_steps == 0 and fleet.machine.is_busy
    fleet.answer_all("replay shard")
    assert fleet.machine.actors.env_steps == 16 and not fleet.machine.is_busy
    stats = fleet.machine.stats
    assert stats.actor_env_steps.tolist() == [0, 0, 0, 16] and stats.busy_seconds == {
        "actors": 0.25, "shards": 0.1, "learner": 0.0
    }  # fmt: skip


def test_a_round_is_drawn_over_all_shards_and_its_errors_return_to_those_that_drew():
    fleet = Fleet()
    fleet.run(4, "actor", "replay shard", "learner")
    rounds = fleet.requested(Learn)
    assert rounds
    for learn in rounds:
        samples = learn.drawn.samples
        assert learn.drawn.transitions == [sample.results[0] for sample in samples]
        assert sorted(np.concatenate(learn.drawn.places)) == list(range(NUM_BATCHES * BATCH))
        assert [int(sample.share.num_draws) for sample in samples] == list(map(len, learn.drawn.places))
        returned = [each for each in fleet.requested(SetPriorities) if each.number == learn.drawn.number]
        assert [each.process for each in returned] == [sample.process for sample in samples]
        assert [each.priority for each in returned] == list(learn.results)


def test_the_learner_is_ahead_of_neither_the_replay_ratio_nor_three_rounds():
    fleet = Fleet(env_steps_per_learner_step=1.0)
    for _ in range(20):
        fleet.answer(LEARNER)
        fleet.run(1, "actor", "replay shard")
        under_way = sum(isinstance(request, Learn) for request in fleet.waiting[LEARNER])
        assert under_way <= ROUNDS_AHEAD
        learned = fleet.machine.learner_steps + NUM_BATCHES * under_way
        assert learned <= fleet.machine.actors.rate_limiter.due(fleet.machine.actors.env_steps)
    assert under_way == ROUNDS_AHEAD
    assert fleet.machine.actors.env_steps < 64 + fleet.machine.learner_steps + 2 * 2 * 64 + 3 * NUM_BATCHES, "they wait"


def test_chunks_that_arrive_in_a_pause_are_stored_and_counted_after_it():
    fleet = Fleet()
    fleet.run(1, "learner")
    fleet.turn()
    fleet.tell(Paused())
    fleet.answer_all(*ALL)
    assert fleet.requested(Insert) == [] and not fleet.machine.is_busy and fleet.machine.actors.env_steps == 0
    fleet.turn()
    assert len(fleet.requested(Insert)) == 8
    fleet.answer_all("replay shard")
    assert fleet.machine.actors.env_steps == 8 * 16


def test_a_learner_that_is_lost_goes_on_from_the_newest_checkpoint_and_versions_never_decrease():
    fleet = Fleet(broadcast_period_learner_steps=10)
    fleet.run(100)
    before, version, leaves = fleet.machine.learner_steps, fleet.machine.version, Reference[Any]()
    assert before > 50 and version > 3
    fleet.learner, fleet.steps = LearnerFound(30, leaves), 30
    fleet.turn()
    fleet.lose(LEARNER)
    (restore,) = fleet.requested(RestoreLearner)
    assert (restore.learner_steps, restore.leaves, fleet.machine.learner_steps) == (30, leaves, 30)
    assert fleet.waiting[LEARNER][0] is restore, "before anything else"
    assert fleet.warnings == [
        f"the learner had taken {before} steps, and goes on from the newest checkpoint, at learner step 30"
    ]
    fleet.run(20)
    assert fleet.machine.version > version and fleet.machine.learner_steps > 40
    fleet.learner = LearnerFound(0, None)
    fleet.lose(LEARNER)
    assert fleet.machine.learner_steps == 0 and "there is no checkpoint yet" in fleet.warnings[-1]


def test_a_shard_that_is_lost_with_all_transitions_makes_the_warm_up_begin_anew():
    fleet = Fleet()
    fleet.run(10)
    machine = fleet.machine
    for i in (0, 1):
        held, fleet.held[i] = fleet.held[i], 0
        fleet.lose(ProcessId("replay shard", i))
        assert fleet.warnings[-1].startswith(f"replay shard {i} held {held} transitions; 0 are back: there is no")
        assert machine.actors.rate_limiter.replay_starts_at == (0 if i == 0 else machine.actors.env_steps)
    due = machine.actors.rate_limiter.due(machine.actors.env_steps)
    assert due == machine.learner_steps, "nothing is owed"
    fleet.run(10)
    assert machine.learner_steps > due


def test_actors_do_not_wait_for_a_learner_that_has_gone_back_and_has_nothing_to_learn_from():
    fleet = Fleet()
    fleet.run(100)
    for i in (0, 1):
        fleet.held[i] = 0
        fleet.lose(ProcessId("replay shard", i))
    fleet.steps = 0
    fleet.lose(LEARNER)
    env_steps = fleet.machine.actors.env_steps
    fleet.run(20)
    assert fleet.machine.actors.env_steps > env_steps + 64 and fleet.machine.learner_steps > 0


def test_the_replacement_of_an_actor_begins_and_a_chunk_on_its_way_to_a_shard_is_not_lost_with_either():
    fleet = Fleet()
    fleet.run(1, "learner")
    fleet.turn()
    fleet.answer_all("actor")
    fleet.lose(ProcessId("actor", 1))
    assert fleet.machine.counters["incarnations"] == [0, 1, 0, 0]
    fleet.lose(ProcessId("replay shard", 1))
    fleet.answer_all("replay shard")
    assert fleet.machine.actors.env_steps == 8 * 16
    fleet.turn()
    writers = [each.writer for each in fleet.requested(Collect)[8:] if each.process.number == 1]
    assert writers == [Writer(1, 0), Writer(1, 1)]


def test_parameters_that_are_lost_with_their_node_are_published_again():
    fleet = Fleet()
    fleet.run(1, "learner")
    fleet.turn()
    params = fleet.requested(Publish)[0].results[0]
    fleet.lose(ProcessId("actor", 0), (params,))
    fleet.turn()
    assert len(fleet.requested(Publish)) == 2 and len(fleet.requested(Collect)) == 8, "nobody is asked to fetch them"
    fleet.answer_all("learner")
    fleet.turn()
    assert [each.broadcast.version for each in fleet.requested(Collect)[8:]] == [2, 2]
    late = Dropped(fleet.requested(Collect)[2], (params,))
    fleet.tell(late)
    fleet.turn()
    assert len(fleet.requested(Publish)) == 2, "older parameters have been replaced already"


def test_a_run_goes_on_from_the_counts_of_a_checkpoint():
    fleet = Fleet()
    leaves, shares = Reference[Any](), [SavedShare(Reference[Any](), 5), SavedShare(Reference[Any](), 6)]
    fleet.tell(Restored(464, 90, 0, 3, 17, leaves, shares))
    machine = fleet.machine
    assert (machine.actors.env_steps, machine.learner_steps, machine.version) == (464, 90, 17)
    assert machine.counters == {"replay_starts_at": 0, "version": 17, "incarnations": [3] * 4}
    assert machine.actors.rate_limiter.due(464) == 90
    assert [each.saved for each in fleet.requested(RestoreReplay)] == [share.replay for share in shares]
    assert machine.num_transitions == 11 and machine.replay.draw(10, 0.0) is None, "they are not there yet"
    fleet.run(1, "learner")
    assert machine.version == 18


@pytest.mark.parametrize("seed", range(3))
def test_the_same_events_lead_to_the_same_requests(seed):
    def played() -> list[Any]:
        fleet, random = Fleet(), np.random.default_rng(seed)
        for _ in range(300):
            fleet.turn()
            process = list(fleet.waiting)[random.integers(len(fleet.waiting))]
            fleet.answer(process)
            if random.random() < 0.01:
                fleet.lose(process)
        draws = [(each.seed, int(each.share.num_draws)) for each in fleet.requested(SampleShare)]
        return [*((type(each), getattr(each, "process", None)) for each in fleet.log), draws, fleet.machine.counters]

    assert played() == played()
