"""The gossip topology, seen by a run: the peers' progress as records, their mean as parameters and as checkpoints.

The package's docstring shows the data flow, and names the source.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qfleet.config import GossipConfig, TrainConfig
from qfleet.core.learner import LearnerState
from qfleet.core.normalisation import learned
from qfleet.core.replay import SavedReplay, make_replay
from qfleet.core.types import Network, Params
from qfleet.envs.host import HostEnv
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.records import Progress, make_progress, mean, sum_of, weighted_sum
from qfleet.topologies.base import OwnLearner, StateIsLost
from qfleet.topologies.fleet.replay_shares import join_shards
from qfleet.topologies.fleet.topology import OnRay
from qfleet.topologies.footprint import Footprint, Part
from qfleet.topologies.gossip.averaging import Leaves, consensus_distance, mean_of
from qfleet.topologies.gossip.peer import peer_config
from qfleet.topologies.mesh import leaves_of
from qfleet.topologies.schedule import rows_per_iteration

if TYPE_CHECKING:
    from qfleet.topologies.gossip.director import GossipDirector
    from qfleet.topologies.gossip.machine import GossipStats


class Gossip(OnRay):
    """Equal peers, each a whole run in a process of its own, whose parameters are averaged in pairs."""

    _director: "GossipDirector"

    def __init__(
        self,
        config: TrainConfig,
        env: InGraphEnv | HostEnv,
        network: Network,
        make_run: Callable[[TrainConfig], OwnLearner],
    ) -> None:
        """Checks the sizes, and starts nothing: `start` does.

        Args:
          config: config of the whole run.
          env: environment to learn.
          network: network of every peer.
          make_run: makes the run inside a peer. It must be a module's function, because other processes import it.

        Raises:
          ConfigError: if Ray isn't installed, the sizes don't fit each other, or the config has more than one seed.
        """
        self._topology = config.topology_as(GossipConfig)
        super().__init__(config, env, network, self._topology.actor_pool)
        from qfleet.topologies.gossip.director import GossipDirector  # here, because it needs Ray

        self._own = peer_config(config, 0, is_in_graph=isinstance(env, InGraphEnv))
        self._run_of_one = make_run(self._own)  # never started; it knows the footprint
        self._director = GossipDirector(
            config,
            make_run,
            env_steps_per_chunk(self._own, self._topology.gossip_period_learner_steps),
            self._read_learner,
            self._read_replay,
            is_in_graph=isinstance(env, InGraphEnv),
        )
        self._mean_params: Leaves = []  # newest mean over the peers that is known

    def footprint(self) -> Footprint:
        """Returns the memory of all peers together. On one machine, the host must have that much."""
        one, num_peers = self._run_of_one.footprint(), self._topology.num_processes
        parts = tuple(_multiplied(part, num_peers) for part in one.parts)
        return Footprint(axes={"data": 1, "model": 1}, devices=tuple(jax.local_devices()[:1]), parts=parts)

    def start(self) -> float:
        """Starts all peers with the same parameters, and returns the seconds until they are ready.

        Raises:
          ConfigError: if there is no cluster, or it has no room for the peers.
        """
        seconds = super().start()
        learner = jax.jit(self._init)(np.uint32(self._config.seed))
        self._mean_params = leaves_of(learner.params)
        self._director.begin_with(learner)
        return seconds

    def advance(self, until_env_steps: int) -> Progress:
        """Waits for half a second of training, or until the run has taken `until_env_steps`.

        Raises:
          RunFailed: if a peer has failed too often.
        """
        stats, before = self._director.resume(until_env_steps), self.learner_steps
        self.env_steps, self.learner_steps = stats.end
        return self._progress(stats, self.learner_steps - before)

    def _progress(self, stats: "GossipStats", new_learner_steps: int) -> Progress:
        chunks = stats.progress
        num_updates = [chunk.new_learner_steps for chunk in chunks]
        num_episodes = [chunk.num_episodes for chunk in chunks]
        return make_progress(
            env_steps=self.env_steps,
            learner_steps=self.learner_steps,
            train_seconds=stats.seconds,
            new_env_steps=int(stats.peer_env_steps.sum()),
            new_learner_steps=new_learner_steps,
            episode_return=weighted_sum([chunk.episode_return_mean for chunk in chunks], num_episodes),
            episode_length=weighted_sum([chunk.episode_length_mean for chunk in chunks], num_episodes),
            q_max=sum_of([chunk.q_mean for chunk in chunks]),
            loss=weighted_sum([chunk.loss for chunk in chunks], num_updates),
            td_error=weighted_sum([chunk.td_error_mean for chunk in chunks], num_updates),
            exploration=chunks[-1].exploration if chunks else 0.0,
            staleness=sum_of([chunk.staleness for chunk in chunks]),
            num_env_failures=sum(chunk.num_env_failures for chunk in chunks),
            fleet=self._fleet_figures(stats),
        )

    def _fleet_figures(self, stats: "GossipStats") -> dict[str, float]:
        rates = stats.peer_env_steps / stats.seconds
        num_learned = len(jax.tree.leaves(learned(self._shapes.params)))  # statistics come after them
        snapshots = [leaves[:num_learned] for leaves in self._director.snapshots()]
        return {
            "consensus_distance": consensus_distance(snapshots) if snapshots else 0.0,
            "peer_env_steps_per_second_min": float(rates.min()),
            "peer_env_steps_per_second_median": float(np.median(rates)),
            "peer_env_steps_per_second_max": float(rates.max()),
            "peers_ready": self._director.num_ready_peers,
            "exchanges_per_second": stats.num_exchanges / stats.seconds,
            "averaging_staleness_mean": mean(stats.staleness) or 0.0,
            "averaging_staleness_max": float(max(stats.staleness, default=0)),
            "exchanged_bytes_per_second": stats.received_bytes / stats.seconds,
            "restarts": self._director.num_restarts,
        }

    @property
    def params(self) -> Params:
        """The mean of the peers' newest parameters."""
        if snapshots := self._director.snapshots():
            self._mean_params = mean_of(snapshots)
        return jax.tree.unflatten(jax.tree.structure(self._shapes.params), self._mean_params)

    @property
    def learner(self) -> LearnerState:
        """The mean over the peers, with the counters of the peer that has taken the most learner steps.

        Raises:
          StateIsLost: if no peer is ready, or one was lost meanwhile and there is no room for its replacement.
        """
        self._quiesce()
        return self._mean_of([learner for learner in self._director.learners() if learner is not None])

    def _quiesce(self) -> None:
        self._director.quiesce()
        self.env_steps, self.learner_steps = self._director.env_steps, self._director.learner_steps

    def _mean_of(self, learners: list[tuple[int, Leaves]]) -> LearnerState:
        """Returns the mean of learners, each given by its learner steps and its leaves."""
        if not learners:
            raise StateIsLost("no peer is ready: all of them are being replaced")
        furthest = max(range(len(learners)), key=lambda i: learners[i][0])
        leaves = mean_of([leaves for _, leaves in learners], furthest)
        learner: LearnerState = jax.tree.unflatten(jax.tree.structure(self._shapes), leaves)
        return learner

    @property
    def state(self) -> dict[str, Any]:
        """The parts of a checkpoint by name; without the replay if the config leaves it out.

        Raises:
          StateIsLost: as `learner` does.
        """
        self._quiesce()
        learners, replay = self._gathered()
        state: dict[str, Any] = {"learner": self._mean_of(learners)}
        return state if replay is None else {**state, "replay": replay}

    def _gathered(self) -> tuple[list[tuple[int, Leaves]], SavedReplay | None]:
        """Returns the learner steps and the learner of each peer that is ready, and the replay of all peers."""
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
        """Returns the replay that a peer that is being replaced will begin with."""
        if share := self._director.share_of_newest_checkpoint(number):
            return share
        replay = make_replay(self._stored_spec, self._own.agent, self._own.topology.num_envs)
        state = replay.init()
        return jax.tree.map(np.array, SavedReplay(state.ring, replay.leaves(state), state.max_priority))

    @property
    def _replay_shape(self) -> tuple[int, int]:
        return self._own.agent.replay_capacity // self._pool.lanes_per_actor, self._pool.num_lanes

    @property
    def _is_prioritised(self) -> bool:
        return self._config.agent.replay == "prioritised"

    def restore(self, state: dict[str, Any], counters: dict[str, Any]) -> None:
        """Continues from a checkpoint. Without a replay in it, the peers begin with empty ones and warm up again.

        All peers begin with the same parameters, in new episodes.
        """
        super().restore(state, counters)
        self._mean_params = leaves_of(state["learner"].params)


def env_steps_per_chunk(config: TrainConfig, period_learner_steps: int) -> int:
    """Returns how many environment steps one chunk of a peer has: whole iterations, about half a period long.

    Args:
      config: config of the peer's own run.
      period_learner_steps: learner steps after which a peer exchanges with another one.
    """
    agent = config.agent
    per_iteration = config.topology.num_envs * rows_per_iteration(agent)
    learner_steps = (
        agent.num_epochs * agent.num_minibatches
        if agent.replay == "none"
        else per_iteration / agent.env_steps_per_learner_step
    )
    return per_iteration * max(1, math.ceil(period_learner_steps / 2 / learner_steps))


def _multiplied(part: Part, num_peers: int) -> Part:
    total = part.total_bytes * num_peers
    return dataclasses.replace(part, total_bytes=total, bytes_per_device=total, axis=None)
