"""Base classes of the state machines that decide what the processes of a run do.

A machine is told what has happened, and returns what to request. It knows nothing of Ray, threads, clocks and files, so
it decides the same whenever it hears the same. `machine_director` is the shell around it.
"""

import abc
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from qfleet.config import ActorPool, TrainConfig
from qfleet.topologies.fleet.actor import ChunkStats
from qfleet.topologies.fleet.messages import Event, ReplayFound, Request, Restored, Warn
from qfleet.topologies.fleet.pooled_actors import A, PooledActors
from qfleet.topologies.fleet.sharded_replay import ShardedReplay
from qfleet.topologies.fleet.stats import DirectorStats, PoolStats

D = TypeVar("D", bound=DirectorStats)
S = TypeVar("S", bound=PoolStats)


class Machine(abc.ABC, Generic[D]):
    """What a director asks of every machine."""

    config: TrainConfig
    """The run's."""
    stats: D
    """Counts what happens. The director replaces it for each record, and the machine never reads it."""

    @abc.abstractmethod
    def handle(self, event: Event) -> list[Request]:
        """Takes notice of an event, and returns what to request, in this order."""

    @property
    @abc.abstractmethod
    def env_steps(self) -> int:
        """Environment steps taken so far."""

    @property
    @abc.abstractmethod
    def learner_steps(self) -> int:
        """Learner steps taken so far, without those that were lost since."""

    @property
    @abc.abstractmethod
    def is_busy(self) -> bool:
        """Whether anything is under way that would change what a checkpoint holds."""

    @property
    @abc.abstractmethod
    def counters(self) -> dict[str, Any]:
        """The counts of a checkpoint, beside the numbers of steps."""


class FleetMachine(Machine[S], Generic[S, A]):
    """What machines of actors have in common: the actors, and a replay that they share."""

    def __init__(self, config: TrainConfig, pool: ActorPool, num_batches: int, actors: Sequence[A]) -> None:
        """Begins with processes that aren't ready.

        Args:
          config: of the run.
          pool: the actors.
          num_batches: learner steps of one round.
          actors: what it knows about each actor.
        """
        self.config = config
        self.actors = PooledActors(config, pool, num_batches, actors)
        self.replay = ShardedReplay(config.seed, pool, lambda seconds: self.note_busy("shards", seconds))
        self.is_paused = True

    @property
    def env_steps(self) -> int:
        """Environment steps taken so far: those of chunks that the replay has stored."""
        return self.actors.env_steps

    @property
    @abc.abstractmethod
    def version(self) -> int:
        """Version of the newest parameters that actors can fetch; it never decreases."""

    @property
    def num_transitions(self) -> int:
        """Number of transitions that the replay holds."""
        return self.replay.num_transitions

    @property
    def can_learn(self) -> bool:
        """Whether there is anything to learn from."""
        return self.replay.num_transitions > 0

    @property
    def counters(self) -> dict[str, Any]:
        """The counts of a checkpoint, beside the numbers of steps."""
        return {
            "replay_starts_at": self.actors.rate_limiter.replay_starts_at,
            "version": self.version,
            "incarnations": [actor.incarnation for actor in self.actors.each],
        }

    def note_busy(self, group: str, seconds: float) -> None:
        """Counts the seconds that a process has worked."""
        self.stats.busy_seconds[group] += seconds

    def count_chunk(self, actor: int, stats: ChunkStats) -> None:
        """Counts a chunk that the replay has stored."""
        env_steps = self.actors.env_steps_per_chunk
        self.actors.env_steps += env_steps
        self.stats.count_chunk(actor, env_steps, stats)

    def refill_shard(self, found: ReplayFound) -> list[Request]:
        """Has the replacement of a lost shard go on from the newest checkpoint, or empty if there is none."""
        i, requests = found.process.number, list[Request]()
        num_lost = self.replay.lose(i)
        if found.share is not None:
            requests.append(self.replay.refill(i, found.share))
        self.warm_up_if_empty()
        return [*requests, tell_of_loss(found, num_lost)]

    def warm_up_if_empty(self) -> None:
        """Begins a new warm-up if there is nothing to learn from, when transitions are lost or the learner goes back.

        Otherwise the actors would wait for the learner, which waits for them, or the first few transitions would be
        learned from over and over.
        """
        if not self.can_learn:
            self.actors.rate_limiter.begin_anew(self.actors.env_steps, self.learner_steps)

    def go_on_from(self, counts: Restored) -> list[Request]:
        """Takes over the environment steps of a checkpoint, and has the actors begin."""
        self.actors.env_steps = counts.env_steps
        self.actors.rate_limiter.resume(counts.replay_starts_at, counts.env_steps, counts.learner_steps)
        return [*self.actors.begin_all(counts.incarnation)]


def tell_of_loss(found: ReplayFound, num_lost: int) -> Warn:
    """Tells the user how many transitions were lost, and how many are back."""
    num_found, source = 0, "there is no checkpoint that has them"
    if found.share is not None:
        num_found, source = found.share.num_transitions, f"from the checkpoint at environment step {found.env_steps}"
    return Warn(f"{found.process.name} held {num_lost} transitions; {num_found} are back: {source}")
