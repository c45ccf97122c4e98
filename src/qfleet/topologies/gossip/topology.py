"""Decentralised by gossip: peers that train on their own, and now and then take the mean with another, on Ray.

Each peer is a whole run, fused or overlapped, in a process of its own: lanes, replay, learner. None waits for another.
This process directs them in a thread of its own, and learns nothing. It asks each for chunks of half a period, up to
two of them ahead, of which each brings a snapshot of the peer's parameters. Whoever has met nobody for a period of
learner steps meets another at random: both move by half of the way that their snapshots were apart, at the beginning
of the next chunk that they are asked for. Parameters go between them directly, by Ray's object store.

A peer that dies, raises or falls silent is replaced: it learns on from what another has learned by now, and its replay
from its share of the newest checkpoint. The others don't notice. What the run has learned is the mean over the peers:
it is evaluated, and a checkpoint holds it, as any other topology's would; the replay is all of theirs.

Source: Lian et al. 2018, arXiv 1710.06952. Deviations: what is averaged is stale by a chunk on both sides, and an
optimiser with moments takes the steps between, each peer with its own.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qfleet.config import GossipConfig, TrainConfig
from qfleet.core.replay import SavedReplay, make_replay
from qfleet.core.types import Network, Params
from qfleet.envs.host import HostEnv
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.records import Progress, mean
from qfleet.topologies.base import OwnLearner, StateIsLost
from qfleet.topologies.fleet.replay_shard import join_shards
from qfleet.topologies.fleet.topology import OnRay
from qfleet.topologies.footprint import Footprint
from qfleet.topologies.gossip.averaging import Leaves, consensus_distance, mean_of
from qfleet.topologies.gossip.peer import peer_config
from qfleet.topologies.mesh import leaves_of
from qfleet.topologies.schedule import rows_per_iteration

if TYPE_CHECKING:
    from qfleet.topologies.gossip.director import GossipDirector, GossipTally


class Gossip(OnRay):
    """Peers, each in a process of its own, and this one that directs them."""

    _director: "GossipDirector"

    def __init__(
        self,
        config: TrainConfig,
        env: InGraphEnv | HostEnv,
        network: Network,
        make_run: Callable[[TrainConfig], OwnLearner],
    ) -> None:
        """Checks the sizes; `start` does the work.

        Args:
          config: of the run.
          env: to learn.
          network: as in all peers.
          make_run: makes what a peer holds; a function of a module, for it goes to other processes by name.

        Raises:
          ConfigError: if Ray isn't there, the sizes don't fit each other, or it has many seeds.
        """
        self._topology = config.topology_as(GossipConfig)
        super().__init__(config, env, network, self._topology.actor_pool)
        from qfleet.topologies.gossip.director import GossipDirector  # here, for most needs no Ray

        self._own = peer_config(config, 0, is_in_graph=isinstance(env, InGraphEnv))
        self._run_of_one = make_run(self._own)  # never started
        self._director = GossipDirector(
            config,
            make_run,
            env_steps_per_chunk(self._own, self._topology.gossip_period_learner_steps),
            lambda checkpoints, checkpoint: leaves_of(self._read_learner(checkpoints, checkpoint)),
            self._read_replay if self._has_replay else None,
            is_in_graph=isinstance(env, InGraphEnv),
        )
        self._params: Leaves = []  # the newest mean that is known

    def footprint(self) -> Footprint:
        """Returns what the peers keep in all, which on one machine is what the host must have."""
        one, num_peers = self._run_of_one.footprint(), self._topology.num_processes
        parts = tuple(
            dataclasses.replace(part, total_bytes=total, bytes_per_device=total, axis=None)
            for part in one.parts
            for total in [part.total_bytes * num_peers]
        )
        return Footprint(axes={"data": 1, "model": 1}, devices=tuple(jax.local_devices()[:1]), parts=parts)

    def start(self) -> float:
        """Starts all peers, alike, and returns the wall time until they are there, in seconds.

        Raises:
          ConfigError: if the cluster isn't there, or has no room for them.
        """
        seconds = super().start()
        learner = jax.jit(self._init)(np.uint32(self._config.seed))
        self._params = leaves_of(learner.params)
        self._director.begin_with(leaves_of(learner), None)
        return seconds

    def advance(self, until_env_steps: int) -> Progress:
        """Waits for half a second of training, or until so many environment steps have been taken.

        Raises:
          RunFailed: if a peer has failed too often.
        """
        tally, before = self._director.resume(until_env_steps), self.learner_steps
        self.env_steps, self.learner_steps = tally.end
        return self._progress(tally, self.learner_steps - before)

    def _progress(self, tally: "GossipTally", new_learner_steps: int) -> Progress:
        chunks = tally.progress
        num_updates = [chunk.new_learner_steps for chunk in chunks]
        num_episodes = [chunk.num_episodes for chunk in chunks]
        return Progress(
            env_steps=self.env_steps,
            learner_steps=self.learner_steps,
            train_seconds=tally.seconds,
            new_env_steps=int(tally.peer_env_steps.sum()),
            new_learner_steps=new_learner_steps,
            num_episodes=sum(num_episodes),
            episode_return_mean=_weighted([chunk.episode_return_mean for chunk in chunks], num_episodes),
            episode_length_mean=_weighted([chunk.episode_length_mean for chunk in chunks], num_episodes),
            q_mean=mean([chunk.q_mean for chunk in chunks]) or 0.0,
            loss=_weighted([chunk.loss for chunk in chunks], num_updates),
            td_error_mean=_weighted([chunk.td_error_mean for chunk in chunks], num_updates),
            exploration=chunks[-1].exploration if chunks else 0.0,
            staleness=mean([chunk.staleness for chunk in chunks]) or 0.0,
            num_env_failures=sum(chunk.num_env_failures for chunk in chunks),
            fleet=self._fleet_figures(tally),
        )

    def _fleet_figures(self, tally: "GossipTally") -> dict[str, float]:
        rates = tally.peer_env_steps / tally.seconds
        snapshots = self._director.snapshots()
        return {
            "consensus_distance": consensus_distance(snapshots) if snapshots else 0.0,
            "peer_env_steps_per_second_min": float(rates.min()),
            "peer_env_steps_per_second_median": float(np.median(rates)),
            "peer_env_steps_per_second_max": float(rates.max()),
            "peers_there": self._director.num_ready_peers,
            "meetings_per_second": tally.num_meetings / tally.seconds,
            "mix_staleness_mean": mean(tally.staleness) or 0.0,
            "mix_staleness_max": float(max(tally.staleness, default=0)),
            "exchanged_bytes_per_second": tally.received_bytes / tally.seconds,
            "restarts": self._director.num_restarts,
        }

    @property
    def params(self) -> Params:
        """The mean of the peers' newest parameters."""
        if snapshots := self._director.snapshots():
            self._params = mean_of(snapshots)
        return jax.tree.unflatten(jax.tree.structure(self._shapes.params), self._params)

    @property
    def state(self) -> dict[str, Any]:
        """The parts of a checkpoint by name; without the replay if the config leaves it out.

        The learner is the mean over the peers, with the counters of the one that has taken the most steps.

        Raises:
          StateIsLost: if no peer is there, or one was lost meanwhile, and has no place yet.
        """
        self._director.quiesce()
        self.env_steps, self.learner_steps = self._director.env_steps, self._director.learner_steps
        learners, replay = self._gathered()
        if not learners:
            raise StateIsLost("all peers are lost")
        furthest = max(range(len(learners)), key=lambda i: learners[i][0])
        leaves = mean_of([leaves for _, leaves in learners], furthest)
        state = {"learner": jax.tree.unflatten(jax.tree.structure(self._shapes), leaves)}
        return state if replay is None else {**state, "replay": replay}

    def _gathered(self) -> tuple[list[tuple[int, Leaves]], SavedReplay | None]:
        """Returns learner steps and learner of each peer that is there, and the replay of all."""
        learners: list[tuple[int, Leaves]] = []

        def replays() -> Iterator[SavedReplay | None]:
            for state in self._director.states():
                if state is not None:
                    learners.append(state[:2])
                yield state and state[2]

        if not self._has_replay:
            for _ in replays():
                pass
            return learners, None
        own = (replay or self._share_of_absent(number) for number, replay in enumerate(replays()))
        return learners, join_shards(own, self._pool)

    def _share_of_absent(self, number: int) -> SavedReplay:
        """Returns what a peer keeps that is being replaced: what it will begin with."""
        if share := self._director.share_of_newest_checkpoint(number):
            return share
        replay = make_replay(self._stored_spec, self._own.agent, self._own.topology.num_envs)
        state = replay.init()
        return jax.tree.map(np.array, SavedReplay(state.ring, replay.leaves(state), state.max_priority))

    @property
    def counters(self) -> dict[str, int]:
        """What `restore` needs beside `state`."""
        return {
            "env_steps": self.env_steps,
            "learner_steps": self.learner_steps,
            "replay_starts_at": self._director.replay_starts_at,
        }

    @property
    def _replay_shape(self) -> tuple[int, int]:
        return self._own.agent.replay_capacity // self._pool.lanes_per_actor, self._pool.num_lanes

    @property
    def _is_prioritised(self) -> bool:
        return self._config.agent.replay == "prioritised"

    @property
    def layout(self) -> str:
        """What a checkpoint must have been saved by to hold the very arrays of this one."""
        return f"gossip, {self._pool.num_actors} x {self._pool.lanes_per_actor} lanes"

    def restore(self, state: dict[str, Any], counters: dict[str, Any]) -> None:
        """Goes on from a checkpoint; where it has no replay, from an empty one, after a new warm-up.

        All peers begin alike, in new episodes.
        """
        super().restore(state, counters)
        self._params = leaves_of(state["learner"].params)


def env_steps_per_chunk(config: TrainConfig, period_learner_steps: int) -> int:
    """Returns how many environment steps a peer takes at once: whole iterations, of about half a period.

    Args:
      config: of the peer's own run.
      period_learner_steps: after which it meets another.
    """
    agent = config.agent
    per_iteration = config.topology.num_envs * rows_per_iteration(agent)
    learner_steps = (
        agent.num_epochs * agent.num_minibatches
        if agent.replay == "none"
        else per_iteration / agent.env_steps_per_learner_step
    )
    return per_iteration * max(1, math.ceil(period_learner_steps / 2 / learner_steps))


def _weighted(values: list[float | None], weights: list[int]) -> float | None:
    """Returns the mean of values by weights, None where there is no weight; a value of no weight may be None."""
    if not (total := sum(weights)):
        return None
    return sum((value or 0.0) * weight for value, weight in zip(values, weights, strict=True)) / total
