"""One peer of gossip: a whole run of its own, whose parameters are averaged with another peer's now and then.

Knows nothing of Ray, of other processes, or of who decides when it averages with whom.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qfleet.config import FusedConfig, GossipConfig, MeshConfig, OverlappedConfig, TrainConfig
from qfleet.core.keys import Stream
from qfleet.core.learner import LearnerState
from qfleet.core.replay import SavedReplay
from qfleet.core.replay.ring import cut
from qfleet.core.types import Params
from qfleet.envs.host import seed_of
from qfleet.runtime.cache import enable_compilation_cache
from qfleet.runtime.records import Progress
from qfleet.topologies.base import OwnLearner
from qfleet.topologies.gossip.averaging import Leaves, average_step
from qfleet.topologies.mesh import leaves_of


class PeerChunkStats(NamedTuple):
    """What a peer reports about one chunk."""

    progress: list[Progress]
    """Progress of each part of the chunk."""
    learner_steps: int
    """Learner steps that the peer has taken in total, after the chunk."""
    staleness: int | None
    """Learner steps between the peer's snapshot and the averaging step; None if the chunk had no such step."""
    received_bytes: int
    """Size of the other peer's parameters, 0 without an averaging step."""


class StartingPoint(NamedTuple):
    """Where a peer begins, by its own counts."""

    env_steps: int
    learner_steps: int
    replay_starts_at: int
    """Environment steps when its replay was last empty."""


def peer_config(config: TrainConfig, number: int, *, is_in_graph: bool) -> TrainConfig:
    """Returns the config of one peer's own run.

    Settings that count environment steps over all lanes are divided by the number of peers: lanes, replay, warm-up, and
    the schedules of exploration and of the importance exponent. The batch size and the rate of learner steps to
    environment steps are each peer's own, so that each environment step is learned from as often as in one process.
    The learning rate's schedule is divided as well, because the peers share the learner steps of a run. Without replay
    it is not: then each peer takes as many learner steps as one process would, on smaller minibatches.
    `target_update_period` is not divided: each peer has a target network of its own.

    The peer's random numbers depend on the run's seed and on the peer's number. They also depend on the environment
    step that a process begins at, so a replacement does not repeat the numbers of the process before it.

    Args:
      config: config of the whole run.
      number: number of the peer, from 0.
      is_in_graph: whether the environment is written in JAX.
    """
    config = config.with_schedule_lengths()  # of the whole run, before they are divided
    topology, agent = config.topology_as(GossipConfig), config.agent
    num_peers = topology.num_processes
    num_envs, mesh = topology.num_envs // num_peers, MeshConfig(data=topology.devices_per_process)
    own: FusedConfig | OverlappedConfig = FusedConfig(num_envs=num_envs, mesh=mesh)
    if not is_in_graph:
        options = dataclasses.asdict(topology.lane_options)
        own = OverlappedConfig(num_envs=num_envs, mesh=mesh, lock_step=topology.lock_step, **options)
    divided = ["exploration_env_steps", "importance_exponent_env_steps"]
    if agent.replay != "none":
        divided.append("learning_rate_learner_steps")
    return dataclasses.replace(
        config,
        topology=own,
        agent=dataclasses.replace(
            agent,
            replay_capacity=max(1, agent.replay_capacity // num_peers),
            warmup_env_steps=agent.warmup_env_steps // num_peers,  # below the share of exploration, which is rounded up
            **{name: math.ceil(getattr(agent, name) / num_peers) for name in divided},
        ),
        seed=seed_of(config.seed, Stream.PEER, number),
    )


class GossipPeer:
    """A run that trains in chunks. Between chunks its parameters can be averaged with another peer's."""

    def __init__(self, config: TrainConfig, make_run: Callable[[TrainConfig], OwnLearner]) -> None:
        """Does nothing yet: call `prepare`, then `begin`.

        Args:
          config: config of this peer's own run, from `peer_config`.
          make_run: makes the run.
        """
        self._config, self._make_run = config, make_run
        self._has_begun = False

    def prepare(self) -> None:
        """Compiles and starts the run."""
        enable_compilation_cache()
        self._run = self._make_run(self._config)
        self._run.start()

    def begin(self, start: StartingPoint, learner: Leaves, replay: SavedReplay | None) -> None:
        """Begins training, or continues from where another process stopped.

        Args:
          start: counts to continue from.
          learner: leaves of a `LearnerState`.
          replay: this peer's share of a replay, in one segment; None for an empty replay and a new warm-up.
        """
        state: dict[str, Any] = {"learner": self._on_devices(learner, self._run.learner)}
        if replay is not None:  # `cut`, because all lanes begin new episodes
            state["replay"] = replay._replace(ring=jax.tree.map(np.asarray, cut(replay.ring)))
        self._run.restore(state, start._asdict())
        self._has_begun = True

    def take_chunk(
        self, num_env_steps: int, learner_steps_then: int = 0, own: Leaves | None = None, other: Leaves | None = None
    ) -> tuple[PeerChunkStats, Leaves]:
        """Takes one chunk of environment steps, after an averaging step if there is an exchange.

        Args:
          num_env_steps: environment steps to take, at least; the chunk ends where an iteration does.
          learner_steps_then: this peer's learner steps when `own` was its snapshot.
          own: leaves of the snapshot that this peer brought into the exchange; None without an exchange.
          other: leaves of the snapshot that the other peer brought.

        Returns:
          Statistics of the chunk, and a snapshot: the leaves of the parameters at its end.
        """
        run, staleness, received_bytes = self._run, None, 0
        if own is not None and other is not None:
            staleness, received_bytes = run.learner_steps - learner_steps_then, sum(leaf.nbytes for leaf in other)
            self._average(own, other)
        goal, progress = run.env_steps + num_env_steps, []
        while run.env_steps < goal:
            progress.append(run.advance(goal))
        return PeerChunkStats(progress, run.learner_steps, staleness, received_bytes), leaves_of(run.params)

    def _average(self, own: Leaves, other: Leaves) -> None:
        learner: LearnerState = self._run.learner
        params = average_step(leaves_of(learner.params), own, other)
        self._run.set_learner(learner._replace(params=self._on_devices(params, learner.params)))

    def copy_learner(self) -> tuple[int, Leaves]:
        """Returns the learner steps so far and the leaves of the `LearnerState`."""
        return self._run.learner_steps, leaves_of(self._run.learner)

    def state(self) -> tuple[int, Leaves, SavedReplay | None] | None:
        """Returns learner steps, leaves of the `LearnerState`, and the replay; None before `begin`.

        The replay is None if checkpoints leave it out.
        """
        if not self._has_begun:
            return None
        state = self._run.state
        replay = jax.tree.map(np.array, state["replay"]) if state.get("replay") else None
        return self._run.learner_steps, leaves_of(state["learner"]), replay

    @staticmethod
    def _on_devices(leaves: Leaves, like: Params) -> Params:
        """Returns leaves as a tree like another one, on the same devices."""
        tree = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return jax.tree.map(lambda x, old: jax.device_put(jnp.array(x), old.sharding), tree, like)
