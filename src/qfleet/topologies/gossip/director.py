"""Who decides which peers meet, and passes them what the others have. See `qfleet.topologies.gossip`."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import ray

from qfleet.config import GossipConfig, TrainConfig
from qfleet.core.replay import NO_STEP, SavedReplay
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.records import Progress
from qfleet.topologies.base import OwnLearner
from qfleet.topologies.fleet.director import Director, Tally
from qfleet.topologies.fleet.replay_shard import share_of
from qfleet.topologies.fleet.supervisor import ON_CPU, ONE_CPU, Remote, RemoteProcess, default_resources
from qfleet.topologies.gossip.averaging import Leaves, shares_of
from qfleet.topologies.gossip.peer import GossipPeer, Place, Report, peer_config
from qfleet.topologies.mesh import leaves_of

logger = logging.getLogger("qfleet")

CHUNKS_AHEAD = 2
"""Chunks of one peer under way: while it is at one, the next is decided. A mix goes with the next that is asked for, so
the snapshot that holds it comes back two chunks after the one that led to it."""

_MEETINGS = 5
"""What a seed's random numbers are for; 0 to 4 are training's."""


class RemotePeer(Remote, GossipPeer):
    """A peer in a process of its own."""


class GossipTally(Tally):
    """What happened among peers since the last record."""

    def __init__(self, num_peers: int) -> None:
        super().__init__()
        self.progress: list[Progress] = []
        self.peer_env_steps = np.zeros(num_peers, np.int64)
        self.num_meetings = self.received_bytes = 0
        self.staleness: list[int] = []


class Origin(NamedTuple):
    """What peers begin with where there is no other to begin from."""

    learner: Leaves
    replay: SavedReplay | None
    """Of all of them, in as many segments."""


class _Snapshot(NamedTuple):
    learner_steps: int
    """When it was taken, by its peer's count."""
    reference: Any
    """To leaves of parameters."""


class _Mix(NamedTuple):
    own: _Snapshot
    other: Any
    """A reference to what the other had."""


@dataclasses.dataclass(eq=False)
class _Peer:
    """What this process knows of a peer."""

    number: int
    process: RemoteProcess
    env_steps: int = 0
    learner_steps: int = 0
    replay_starts_at: int = 0
    stage: Literal["absent", "prepared", "beginning", "training"] = "absent"
    num_flying: int = 0
    """Chunks that it was asked for."""
    asked_last: int = 0
    """When, counted in chunks of all peers."""
    met_at: int = 0
    """Learner steps when it last met another."""
    snapshot: _Snapshot | None = None
    """The newest; none before it has trained."""
    mix: _Mix | None = None
    """That goes with its next chunk."""
    is_mixing: bool = False
    """Its snapshot doesn't hold yet what came of its last meeting."""

    @property
    def may_meet(self) -> bool:
        """Whether its snapshot holds all of its meetings: two mixes by one snapshot would move it twice as far."""
        return self.snapshot is not None and not self.is_mixing


class GossipDirector(Director[GossipTally]):
    """Directs peers: asks each for one chunk after the other, and has pairs of them meet."""

    _needs_in_words = "all peers"
    _resource_flags = "--num-processes or --devices-per-process"

    def __init__(
        self,
        config: TrainConfig,
        make_run: Callable[[TrainConfig], OwnLearner],
        env_steps_per_chunk: int,
        read_learner: Callable[[Checkpoints, int], Leaves],
        read_replay: Callable[[Checkpoints, int], SavedReplay] | None,
        *,
        is_in_graph: bool,
    ) -> None:
        """Starts nothing yet.

        Args:
          config: of the run.
          make_run: makes what a peer holds; a function of a module, for it goes to other processes by name.
          env_steps_per_chunk: that a peer takes at once.
          read_learner: reads the learner of a checkpoint.
          read_replay: reads its replay, as this run would have saved it; None if checkpoints have none.
          is_in_graph: whether the environment is written in JAX.
        """
        self._config, self._topology, self._make_run = config, config.topology_as(GossipConfig), make_run
        topology = self._topology
        super().__init__(topology.ray_address, topology.silence_seconds, topology.max_restarts)
        self._env_steps_per_chunk, self._is_in_graph = env_steps_per_chunk, is_in_graph
        self._read_learner, self._read_replay = read_learner, read_replay
        self._random = np.random.default_rng((config.seed, _MEETINGS))
        self._peers: list[_Peer] = []
        self._num_requests = 0  # for chunks, to all peers
        self._origin: Origin | None = None

    def begin_with(self, learner: Leaves, replay: SavedReplay | None) -> None:
        """Has all peers begin alike, but with their shares of the replay."""
        self._origin = Origin(learner, replay)

    def restore(self, state: dict[str, Any], counters: dict[str, Any]) -> None:
        """Has all peers go on from a checkpoint, each from its share, before the first `resume`."""
        self.env_steps, self.learner_steps = counters["env_steps"], counters["learner_steps"]
        for peer, env_steps in zip(self._peers, shares_of(self.env_steps, len(self._peers)), strict=True):
            peer.env_steps, peer.learner_steps = env_steps, self.learner_steps
        self.begin_with(leaves_of(state["learner"]), state.get("replay"))

    @property
    def replay_starts_at(self) -> int:
        """Environment steps when the replay was last empty, summed over the peers."""
        return sum(peer.replay_starts_at for peer in self._peers)

    @property
    def num_ready_peers(self) -> int:
        """Peers that train."""
        return sum(peer.stage == "training" for peer in self._peers)

    def snapshots(self) -> list[Leaves]:
        """Returns the newest parameters of each peer that has trained, as far as they can be had."""
        with self._lock:
            references = [peer.snapshot.reference for peer in self._peers if peer.snapshot is not None]
        found = []
        for reference in references:
            try:
                found.append(ray.get(reference))
            except ray.exceptions.RayError as error:  # its node has just left, which its next chunk will tell
                logger.debug("a snapshot is lost: %s", error)
        return found

    def states(self) -> Iterator[tuple[int, Leaves, SavedReplay | None] | None]:
        """Yields what each peer keeps, None for those that are replaced and have nothing; one at a time is held here.

        Raises:
          StateIsLost: if one was lost meanwhile, and has no place.
        """
        for peer in self._peers:
            yield None if peer.stage == "absent" else self._answer_of(peer.process, "state", gives_up=True)

    def share_of_newest_checkpoint(self, number: int) -> SavedReplay | None:
        """Returns a peer's share of the replay that the newest checkpoint holds; None if there is none."""
        newest = self._read_replay and self._of_newest_checkpoint(self._read_replay)
        return share_of(newest[0], self._topology.actor_pool, number) if newest else None

    def _new_tally(self) -> GossipTally:
        return GossipTally(self._topology.num_processes)

    def _resources(self) -> list[Mapping[str, float]]:
        return [ONE_CPU] * self._topology.num_processes

    def _missing(self) -> RemoteProcess | None:
        return next((peer.process for peer in self._peers if peer.stage == "absent"), None)

    def _vital(self) -> list[RemoteProcess]:
        return []  # a checkpoint holds what those have that are there

    def _is_busy(self) -> bool:
        return any(peer.num_flying for peer in self._peers)

    def _issue(self) -> None:
        self._bring_in_newcomers()
        self._arrange_meetings()
        self._ask_for_chunks()

    def _start_processes(self) -> None:
        topology = self._topology
        num_devices = topology.devices_per_process
        resources = default_resources(topology.num_processes * num_devices)
        environment: Mapping[str, str] = {}
        if "GPU" in resources:
            resources = {**resources, "GPU": num_devices}
        else:
            environment = ON_CPU if topology.num_processes > 1 else {"JAX_PLATFORMS": "cpu"}
        for i in range(topology.num_processes):
            own = peer_config(self._config, i, is_in_graph=self._is_in_graph)
            part = self._make_process(
                f"peer {i}", RemotePeer, (own, self._make_run), resources, environment, functools.partial(self._lost, i)
            )
            self._peers.append(_Peer(i, self._supervisor.add(part)))
            self._prepare(self._peers[i])

    # Peers that come and go.

    def _lost(self, number: int) -> None:
        """Forgets what a peer was about to do.

        What it was to take from another isn't applied; where the other had been told, it still takes half of the way to
        what this one had learned, which is as good as anything that it had learned itself. The sum over the peers
        changes anyway, for one of them begins anew.
        """
        peer = self._peers[number]
        peer.stage, peer.snapshot, peer.mix, peer.is_mixing = "absent", None, None, False
        self._prepare(peer)

    def _prepare(self, peer: _Peer) -> None:
        def is_prepared(_: None) -> None:
            peer.stage = "prepared"

        self._supervisor.submit(peer.process, "prepare", on_reply=is_prepared)

    def _bring_in_newcomers(self) -> None:
        """Has those begin that are prepared, with what one of the others has learned, if there is one."""
        newcomers = [peer for peer in self._peers if peer.stage == "prepared"]
        if not newcomers:
            return
        teachers = [peer for peer in self._peers if peer.snapshot is not None]
        for peer in newcomers:
            self._bring_in(peer, teachers[self._random.integers(len(teachers))] if teachers else None)
        assert self._origin is not None
        self._origin = self._origin._replace(replay=None)  # which was for the first ones; others find a checkpoint

    def _bring_in(self, peer: _Peer, teacher: _Peer | None) -> None:
        learner, whence = self._learner_for(peer, teacher)
        replay = self._replay_for(peer)
        num_held = 0 if replay is None else num_steps(replay)
        num_lost = max(0, min(peer.env_steps - peer.replay_starts_at, self._replay_capacity) - num_held)
        # Its warm-up goes on from what it has: learning from an empty replay would be from nothing.
        peer.replay_starts_at = max(0, peer.env_steps - num_held)
        place = Place(peer.env_steps, peer.learner_steps, peer.replay_starts_at)
        peer.stage, peer.met_at = "beginning", peer.learner_steps

        kept = f"; its replay has lost {num_lost} transitions; {num_held} are back" if self._replay_capacity else ""

        def has_begun(_: None) -> None:
            peer.stage = "training"
            if peer.process.failed_at:
                name, env_steps = peer.process.name, peer.env_steps
                logger.warning("%s goes on from its environment step %d, %s%s", name, env_steps, whence, kept)

        def dropped() -> None:  # whom it was to learn from is lost
            peer.stage = "prepared" if peer.stage == "beginning" else peer.stage

        self._supervisor.submit(
            peer.process, "begin", place, learner, replay, on_reply=has_begun, on_dropped=dropped,
            needs=(learner,) if teacher is not None else (),
        )  # fmt: skip

    def _learner_for(self, peer: _Peer, teacher: _Peer | None) -> tuple[Any, str]:
        """Returns leaves of a `LearnerState` to begin with, or a reference to them, and whence they are, in words."""
        if teacher is not None:
            return self._supervisor.submit(teacher.process, "learner", num_returns=2)[
                1
            ], f"as {teacher.process.name} is now"
        if peer.process.failed_at and (newest := self._of_newest_checkpoint(self._read_learner)):
            return newest[0], "with the newest checkpoint, for no other is there"
        assert self._origin is not None
        return self._origin.learner, "as it began, for no other is there"

    def _replay_for(self, peer: _Peer) -> SavedReplay | None:
        """Returns its share of the newest replay that is kept; None if none is."""
        assert self._origin is not None
        if self._origin.replay is not None:
            return share_of(self._origin.replay, self._topology.actor_pool, peer.number)
        return self.share_of_newest_checkpoint(peer.number) if peer.process.failed_at else None

    @property
    def _replay_capacity(self) -> int:
        """Of one peer, in environment steps."""
        agent = self._config.agent
        return 0 if agent.replay == "none" else agent.replay_capacity // self._topology.num_processes

    # Meetings.

    def _arrange_meetings(self) -> None:
        """Has each that is due meet another at random, of those that have mixed what they met before."""
        free = [peer for peer in self._peers if peer.may_meet]
        period = self._topology.gossip_period_learner_steps
        due = [peer for peer in free if peer.learner_steps - peer.met_at >= period]
        for i in self._random.permutation(len(due)):
            peer = due[i]
            others = [other for other in free if other is not peer]
            if peer not in free or not others:  # it has been met, or goes on alone and is due again
                continue
            other = others[self._random.integers(len(others))]
            free.remove(peer)
            free.remove(other)
            self._meet(peer, other)

    def _meet(self, *pair: _Peer) -> None:
        first, second = (peer.snapshot for peer in pair)
        assert first is not None and second is not None
        pair[0].mix, pair[1].mix = _Mix(first, second.reference), _Mix(second, first.reference)
        for peer in pair:
            peer.is_mixing, peer.met_at = True, peer.learner_steps
        self._tally.num_meetings += 1

    # Chunks.

    def _ask_for_chunks(self) -> None:
        num_flying = sum(peer.num_flying for peer in self._peers)
        for _ in range(CHUNKS_AHEAD):
            for peer in sorted(self._peers, key=lambda peer: peer.asked_last):
                if self.env_steps + num_flying * self._env_steps_per_chunk >= self._config.env_steps:
                    return
                if peer.stage == "training" and peer.num_flying < CHUNKS_AHEAD:
                    self._ask_for_chunk(peer)
                    num_flying += 1

    def _ask_for_chunk(self, peer: _Peer) -> None:
        mix, peer.mix = peer.mix, None
        peer.num_flying += 1
        self._num_requests += 1
        peer.asked_last = self._num_requests

        def arrived(report: Report, reference: Any) -> None:
            peer.num_flying -= 1
            peer.is_mixing &= mix is None
            peer.snapshot = _Snapshot(report.learner_steps, reference)
            self._count(peer, report)

        def lost() -> None:
            peer.num_flying -= 1
            peer.is_mixing &= mix is None

        # If one of the two snapshots is lost, for the node that kept it has left, Ray doesn't even begin the chunk.
        met = () if mix is None else (mix.own.reference, mix.other)
        arguments = () if mix is None else (mix.own.learner_steps, *met)
        self._supervisor.submit(
            peer.process, "advance", self._env_steps_per_chunk, *arguments, on_reply=arrived, num_returns=2,
            on_dropped=lost, needs=met,
        )  # fmt: skip

    def _count(self, peer: _Peer, report: Report) -> None:
        tally, env_steps = self._tally, sum(progress.new_env_steps for progress in report.progress)
        peer.env_steps += env_steps
        peer.learner_steps = report.learner_steps
        self.env_steps += env_steps
        self.learner_steps = sum(peer.learner_steps for peer in self._peers) // len(self._peers)
        tally.progress += report.progress
        tally.peer_env_steps[peer.number] += env_steps
        tally.received_bytes += report.received_bytes
        tally.staleness += [] if report.staleness is None else [report.staleness]


def num_steps(replay: SavedReplay) -> int:
    """Returns how many environment steps a replay of one segment holds."""
    held = np.asarray(replay.ring.rows.outcome)[: int(replay.ring.size[0])]  # it fills from the first row on
    return int(np.sum(held != NO_STEP))
