"""Models of the workers and of the server's shards, and the rig of the parameter server.

The state of the server is what it has been through: for each learner step, the gradients that were applied. A gradient
knows the state that it was computed with, so a shard can tell whether it descends from that state.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fleet_simulator import Host
from invariants import require
from simulated_replay import ActingModel, ReplayRig, Segment, ShardModel, lanes_of, saved_replay

from qfleet.config import TrainConfig
from qfleet.core.sharded_learner import TargetUpdateTracker
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote import RemoteReplayShard
from qfleet.topologies.fleet.replay_shard import ShardStats, Writer
from qfleet.topologies.fleet.replay_shares import join_shards
from qfleet.topologies.parameter_server.director import ServerDirector
from qfleet.topologies.parameter_server.remote import RemoteServerShard, RemoteWorker
from qfleet.topologies.parameter_server.requests import ActAnswer, GradientAnswer, PublishedAnswer, Pull
from qfleet.topologies.parameter_server.worker import GradientStats

GRADIENTS = ("compute_gradient", "compute_gradient_of")
STEPS = ("apply_gradients", "apply_averages")


class ServerState(NamedTuple):
    """Parameters, by what they have been through."""

    history: tuple[int, ...] = (0,)
    """A digest of the parameters after each learner step."""
    target: int = 0
    """Digest of the target network's parameters."""
    target_age: int = 0

    @property
    def learner_steps(self) -> int:
        return len(self.history) - 1

    @property
    def digest(self) -> int:
        return self.history[-1]


MIXED = ServerState(history=(-1,))
"""Parameters whose pieces don't belong together. No state of the server descends from them."""


class Gradient(NamedTuple):
    """A gradient, by where it comes from."""

    worker: tuple[int, int]
    number: int
    learner_steps: int
    """Learner steps that its parameters had taken."""
    digest: int
    """Digest of its parameters."""


class SimulatedLearner:
    """What the director knows of the learner that is divided over the shards."""

    num_params = 1_000

    def __init__(self, num_shards: int) -> None:
        self._num_shards = num_shards

    def split(self, state: ServerState) -> list[ServerState]:
        return [state] * self._num_shards


class WorkerModel(ActingModel):
    def __init__(self, ledger: Any, host: Host, config: TrainConfig, number: int) -> None:
        super().__init__(ledger, host, config, number)
        pool = config.topology.actor_pool
        self._num_server_shards = config.topology.num_server_shards
        self.segment = None if config.topology.num_replay_shards else Segment(number)
        self._steps = pool.rows_per_chunk * pool.lanes_per_actor
        self._state, self._target, self._num_gradients = ServerState(), -1, 0

    @property
    def stats(self) -> ShardStats:
        assert self.segment is not None
        num_transitions = self._steps * len(self.segment.chunks)
        return ShardStats(float(num_transitions), num_transitions, 0.1)

    def _pull(self, pull: Pull) -> None:
        if pull.version == self.version:
            return
        require("a worker has the parameters that it is thought to have", bool(pull.params), pull, self.version)
        self.take_version(pull.version)
        pieces = {piece.value for piece in pull.params}
        if len(pieces) > 1:  # one has been restored and the other not: whatever comes of them must never be applied
            self._state = MIXED
            return
        (self._state,) = pieces
        self.ledger.note_params(pull.version, self._state.digest)
        if pull.target_params:
            self._target = pull.target_params[0].value
        require("a worker has the server's target network", self._target == self._state.target, pull.version)

    def act(self, pull: Pull, exploration: float) -> ActAnswer:
        self._pull(pull)
        stats, chunk = self.make_chunk()
        if self.segment is None:
            self.ledger.references[chunk] = Reference(chunk)
            return ActAnswer(stats, None, self.ledger.references[chunk])
        self.segment.insert(Writer(chunk.incarnation, chunk.number), chunk)
        self.ledger.stored.add(chunk)
        return ActAnswer(stats, self.stats, None)

    def compute_gradient(self, pull: Pull, importance_exponent: float) -> GradientAnswer:
        require("a worker learns from what it has", bool(self.segment.chunks))
        return self._gradient(pull, [])

    def compute_gradient_of(self, pull: Pull, places: Any, shares: Sequence[Reference]) -> GradientAnswer:
        values = [share.value for share in shares]
        require("a batch is of one draw", len({share.number for share in values}) == 1, values)
        require("a batch is whole", sum(map(len, places)) == self.config.agent.batch_size)
        return self._gradient(pull, values)

    def _gradient(self, pull: Pull, shares: list[Any]) -> GradientAnswer:
        self._pull(pull)
        gradient = Gradient(
            (self.number, self.incarnation), self._num_gradients, self._state.learner_steps, self._state.digest
        )
        self._num_gradients += 1
        pieces = tuple(Reference(gradient) for _ in range(self._num_server_shards))
        return GradientAnswer(GradientStats(1.0, 1.0, 1.0, 0.5), pieces, tuple(map(Reference, shares)))

    def snapshot(self) -> Reference:
        return Reference(saved_replay([[chunk.encoded() for chunk in self.segment.chunks]]))

    def restore(self, saved: Reference) -> ShardStats:
        self.segment.restore(lanes_of(saved.value)[0])
        return self.stats


class ServerShardModel:
    def __init__(self, ledger: Any, host: Host, config: TrainConfig, number: int) -> None:
        self.config, self.host, self.number = config, host, number
        self.state, self._averaged = ServerState(), None
        self._targets = TargetUpdateTracker(config.agent.target_update_period)

    def apply_gradients(self, gradients: Sequence[Reference]) -> PublishedAnswer:
        each = self.config.topology.gradients_per_learner_step
        values, updates_target = [gradient.value for gradient in gradients], False
        for i in range(0, len(values), each):
            updates_target |= self._take_step(tuple(values[i : i + each]))
        return PublishedAnswer(0.1, Reference(self.state), Reference(self.state.target) if updates_target else None)

    def _take_step(self, gradients: tuple[Gradient, ...]) -> bool:
        history, most = self.state.history, self.config.topology.max_staleness
        for each in gradients:
            is_ancestor = each.learner_steps < len(history) and history[each.learner_steps] == each.digest
            require("no gradient from before a rollback is applied", is_ancestor, each, self.state.learner_steps)
            staleness = self.state.learner_steps - each.learner_steps
            require("staleness stays within its bound", staleness <= most, staleness, most)
        digest, is_update = hash((history[-1], gradients)), self._targets.advance()
        target = digest if is_update else self.state.target
        self.state = ServerState((*history, digest), target, self._targets.age)
        return is_update

    def average_gradients(self, gradients: Sequence[Reference]) -> tuple[float, Reference]:
        self._averaged = list(gradients)
        return 0.1, Reference(("squares", tuple(gradient.value for gradient in gradients)))

    def apply_averages(self, squared_norms: Sequence[Reference]) -> PublishedAnswer:
        require("all norms are of the same gradients", len({norm.value for norm in squared_norms}) == 1)
        require("norms of all shards", len(squared_norms) == self.config.topology.num_server_shards)
        return self.apply_gradients(self._averaged)

    def publish(self) -> tuple[Reference, Reference]:
        return Reference(self.state), Reference(self.state.target)

    def params(self) -> Reference:
        return Reference(self.state)

    def take_snapshot(self) -> Reference:
        return Reference(self.state)

    def restore(self, leaves: Reference) -> None:
        self.state = leaves.value
        self._targets.age = self.state.target_age

    def reset(self) -> None:
        self.state, self._targets.age = ServerState(), 0


MODELS = {RemoteWorker: WorkerModel, RemoteServerShard: ServerShardModel, RemoteReplayShard: ShardModel}


class ServerRig(ReplayRig):
    """A director of the parameter server."""

    director: ServerDirector

    def make_director(self) -> ServerDirector:
        self.begin_counting()
        for kind, model in MODELS.items():
            self.world.models[kind] = lambda *arguments, model=model: model(self.ledger, *arguments)
        learner: Any = SimulatedLearner(self.config.topology.num_server_shards)
        return ServerDirector(
            self.config, learner, lambda state, _: state["learner"], lambda state, _: state.get("replay")
        )

    @property
    def has_shared_replay(self) -> bool:
        return self.director.machine.shares_replay

    def turn(self) -> None:
        before = sum(actor.num_chunks_under_way for actor in self.director.machine.actors.each)
        super().turn()
        self.check_actors_wait(before, 3)

    def check(self) -> None:
        director, under_way = self.director, self.under_way
        if director.machine.shares_replay:
            self.check_replay()
            self.check_chunks("act", director.machine.replay._num_inserting)
        else:
            self.check_chunks("act", 0)
            self.check_rows(self.kept(), under_way["act"])
        for worker in director.machine.actors.each:
            num_gradients = sum(under_way[director._processes[worker.process], method] for method in GRADIENTS)
            require("nothing in flight exceeds its bound", num_gradients <= 1, num_gradients)
            require("what is thought to be under way is under way", num_gradients == worker.is_learning, worker)
        num_steps = sum(under_way[method] for method in STEPS)
        require("what is thought to be under way is under way", bool(num_steps) == director.machine.server.is_stepping)
        require("nothing in flight exceeds its bound", num_steps <= len(director._servers), num_steps)
        self.check_ratio(len(director.machine.server.queue.pending_steps))
        self.check_version(director.version)

    def kept(self) -> set:
        if self.has_shared_replay:
            return super().kept()
        models = [process.handle.model for process in self.director._replays]
        return {chunk for model in models if model is not None for chunk in model.segment.chunks}

    def check_at_rest(self) -> None:
        if not any(process.calls for process in self.director._servers):  # otherwise it is still going back
            states = {process.handle.model.state for process in self.director._servers}
            require("all shards of the server are in the same state", len(states) == 1, states)
            steps = states.pop().learner_steps
            require("the server's steps are those counted", steps == self.director.learner_steps, steps)
        self.check_no_row_is_forgotten(self.kept())

    def progress(self) -> tuple[int, ...]:
        return self.director.env_steps, self.director.learner_steps, self.director.version

    def saved(self) -> tuple[int, dict[str, Any]]:
        learner_steps, leaves = self.director.learner_state()
        require("all shards of the server are in the same state", len(set(leaves)) == 1, leaves)
        require("a checkpoint counts the steps that it holds", learner_steps == leaves[0].learner_steps, learner_steps)
        parts = list(self.director.snapshots())
        return learner_steps, {"learner": leaves[0], "replay": join_shards(parts, self.config.topology.actor_pool)}
