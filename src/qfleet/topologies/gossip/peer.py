"""One of the peers that gossip: a whole run of its own, which now and then takes part of another's parameters."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qfleet.config import FusedConfig, GossipConfig, MeshConfig, OverlappedConfig, TrainConfig
from qfleet.core.learner import LearnerState
from qfleet.core.replay import SavedReplay
from qfleet.core.replay.ring import cut
from qfleet.core.types import Params
from qfleet.envs.host import seed_of
from qfleet.runtime.cache import enable_compilation_cache
from qfleet.runtime.records import Progress
from qfleet.topologies.base import OwnLearner
from qfleet.topologies.gossip.averaging import Leaves, mixed
from qfleet.topologies.mesh import leaves_of

_PEER = 4
"""What a seed's random numbers are for; 0 to 3 are a run's in one process, actors', and those of a replay in shards."""


class Report(NamedTuple):
    """What a peer tells of a chunk."""

    progress: list[Progress]
    learner_steps: int
    """After it, in total."""
    staleness: int | None
    """Learner steps between its snapshot and the mix, if there was one."""
    received_bytes: int
    """Of another's parameters."""


class Place(NamedTuple):
    """Where a peer begins, in its own counts."""

    env_steps: int
    learner_steps: int
    replay_starts_at: int
    """Environment steps when its replay was last empty."""


def peer_config(config: TrainConfig, number: int, *, is_in_graph: bool) -> TrainConfig:
    """Returns the config of one peer's own run.

    What counts environment steps of all lanes is divided over the peers: lanes, replay, warm-up, and the schedules of
    exploration and of the importance exponent. A batch is each peer's own, and so is the rate of learner steps to
    environment steps: each step is learned from as often as in one process. Its random numbers are those of the run's
    seed and its number, and of its environment steps where it begins, which tell one that is replaced from the one
    before.

    Args:
      config: of the run.
      number: of the peer, from 0.
      is_in_graph: whether the environment is written in JAX.
    """
    topology, agent = config.topology_as(GossipConfig), config.agent
    num_peers = topology.num_processes
    num_envs, mesh = topology.num_envs // num_peers, MeshConfig(data=topology.devices_per_process)
    own: FusedConfig | OverlappedConfig = FusedConfig(num_envs=num_envs, mesh=mesh)
    if not is_in_graph:
        options = dataclasses.asdict(topology.lane_options)
        own = OverlappedConfig(num_envs=num_envs, mesh=mesh, lock_step=topology.lock_step, **options)
    divided = ("warmup_env_steps", "exploration_env_steps", "importance_exponent_env_steps")
    return dataclasses.replace(
        config,
        topology=own,
        agent=dataclasses.replace(
            agent,
            replay_capacity=max(1, agent.replay_capacity // num_peers),
            **{name: math.ceil(getattr(agent, name) / num_peers) for name in divided},
        ),
        seed=seed_of(config.seed, _PEER, number),
    )


class GossipPeer:
    """A run of its own, in chunks, between which it can be given parameters."""

    def __init__(self, config: TrainConfig, make_run: Callable[[TrainConfig], OwnLearner]) -> None:
        """Does nothing yet: it is still to `prepare`, and to `begin`.

        Args:
          config: its own, as of `peer_config`.
          make_run: makes what it holds.
        """
        self._config, self._make_run = config, make_run
        self._has_begun = False

    def prepare(self) -> None:
        """Compiles and starts all that it needs."""
        enable_compilation_cache()
        self._run = self._make_run(self._config)
        self._run.start()

    def begin(self, place: Place, learner: Leaves, replay: SavedReplay | None) -> None:
        """Begins, or goes on where another has stopped.

        Args:
          place: where.
          learner: leaves of a `LearnerState`.
          replay: its share, in one segment; None for an empty one, and a new warm-up.
        """
        state: dict[str, Any] = {"learner": self._placed(learner, self._run.learner)}
        if replay is not None:  # its lanes begin new episodes
            state["replay"] = replay._replace(ring=jax.tree.map(np.asarray, cut(replay.ring)))
        self._run.restore(state, place._asdict())
        self._has_begun = True

    def advance(
        self, num_env_steps: int, learner_steps_then: int = 0, own: Leaves | None = None, other: Leaves | None = None
    ) -> tuple[Report, Leaves]:
        """Takes so many environment steps, and returns a report and a snapshot of the parameters.

        Args:
          num_env_steps: about: chunks end where iterations do.
          learner_steps_then: when `own` was its snapshot.
          own: leaves of the parameters with which it met another, if it has.
          other: those that the other had.
        """
        run, staleness, received_bytes = self._run, None, 0
        if own is not None and other is not None:
            learner: LearnerState = run.learner
            params = mixed(leaves_of(learner.params), own, other)
            run.set_learner(learner._replace(params=self._placed(params, learner.params)))
            staleness, received_bytes = run.learner_steps - learner_steps_then, sum(leaf.nbytes for leaf in other)
        goal, progress = run.env_steps + num_env_steps, []
        while run.env_steps < goal:
            progress.append(run.advance(goal))
        return Report(progress, run.learner_steps, staleness, received_bytes), leaves_of(run.params)

    def learner(self) -> tuple[int, Leaves]:
        """Returns the learner steps taken so far, and the leaves of its `LearnerState`, for another to begin with."""
        return self._run.learner_steps, leaves_of(self._run.learner)

    def state(self) -> tuple[int, Leaves, SavedReplay | None] | None:
        """Returns what `learner` does, and its replay, unless checkpoints leave it out; None before it has begun."""
        if not self._has_begun:
            return None
        state = self._run.state
        replay = jax.tree.map(np.array, state["replay"]) if state.get("replay") else None
        return self._run.learner_steps, leaves_of(state["learner"]), replay

    @staticmethod
    def _placed(leaves: Leaves, like: Params) -> Params:
        tree = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return jax.tree.map(lambda x, old: jax.device_put(jnp.array(x), old.sharding), tree, like)
