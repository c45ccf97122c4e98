"""The actor-learner topology: many actors feed a global replay, from which one learner learns (Ape-X), on Ray.

This process directs the others, in a thread of its own. Arrays go between them directly, by Ray's object store:

    actor   --chunk-->       replay shard       rows, with the actor's own TD errors
    shard   --transitions--> learner            its part of a round: a few batches, drawn over all shards as from one
    learner --TD errors-->   replay shard
    learner --parameters-->  actors             those of them that are about to act

A rate limiter keeps the learner from running ahead of what the replay ratio allows, and the actors from running far
ahead of the learner. Whatever is under way at once is bounded: chunks of each actor, rounds of the learner.

A part that dies, raises or falls silent is replaced. An actor comes back with its epsilon; its segment of the replay is
cut where the last one's chunks end. A shard comes back with what the newest checkpoint has of it, the learner with that
checkpoint's parameters.

Source: Horgan et al. 2018, arXiv 1803.00933.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qfleet.config import ActorLearnerConfig, TrainConfig
from qfleet.core.types import Network, Params
from qfleet.envs.host import HostEnv
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.records import Progress, mean
from qfleet.topologies.actor_learner.learner import batches_per_round
from qfleet.topologies.base import check_loss
from qfleet.topologies.fleet.replay_shard import join_shards
from qfleet.topologies.fleet.topology import OnRay

if TYPE_CHECKING:
    from qfleet.topologies.actor_learner.director import FleetDirector, FleetTally


class ActorLearner(OnRay):
    """Actors, a replay and a learner, each in processes of its own, and this one that directs them."""

    _director: "FleetDirector"

    def __init__(self, config: TrainConfig, env: InGraphEnv | HostEnv, network: Network) -> None:
        """Checks the sizes; `start` does the work.

        Raises:
          ConfigError: if Ray isn't there, the sizes don't fit each other, or it has many seeds.
        """
        self._topology = config.topology_as(ActorLearnerConfig)
        super().__init__(config, env, network, self._topology.actor_pool)
        from qfleet.topologies.actor_learner.director import FleetDirector  # here, for most of qfleet does without Ray

        self._epsilons = [self._topology.epsilon(i) for i in range(self._topology.num_actors)]
        self._director = FleetDirector(
            config, batches_per_round(config, env.spec), self._read_learner, self._read_replay
        )

    def advance(self, until_env_steps: int) -> Progress:
        """Waits for half a second of training, or until so many environment steps have been taken.

        Raises:
          RunFailed: if a part has failed too often, or the loss isn't finite.
        """
        tally = self._director.resume(until_env_steps)
        self.env_steps, self.learner_steps = tally.end
        check_loss(tally.loss, self.learner_steps, self._config.agent)
        return self._progress(tally)

    def _progress(self, tally: "FleetTally") -> Progress:
        def per_learner_step(total: float) -> float | None:
            return total / tally.learner_steps if tally.learner_steps else None

        return Progress(
            env_steps=self.env_steps,
            learner_steps=self.learner_steps,
            train_seconds=tally.seconds,
            new_env_steps=tally.env_steps,
            new_learner_steps=tally.learner_steps,
            num_episodes=len(tally.returns),
            episode_return_mean=mean(tally.returns),
            episode_length_mean=mean(tally.lengths),
            q_mean=mean(tally.q_mean) or 0.0,
            loss=per_learner_step(tally.loss),
            td_error_mean=per_learner_step(tally.td_error),
            exploration=mean(self._epsilons) or 0.0,
            staleness=mean(tally.staleness) or 0.0,
            num_env_failures=tally.num_failures,
            fleet=self._fleet_figures(tally),
        )

    def _fleet_figures(self, tally: "FleetTally") -> dict[str, float]:
        topology, director, seconds = self._topology, self._director, tally.seconds
        rates = tally.actor_env_steps / seconds
        num_parts = {"actors": topology.num_actors, "shards": topology.num_replay_shards, "learner": 1}
        return {
            "actor_env_steps_per_second_min": float(rates.min()),
            "actor_env_steps_per_second_median": float(np.median(rates)),
            "actor_env_steps_per_second_max": float(rates.max()),
            "actors_there": director.num_ready_actors,
            "staleness_max": float(max(tally.staleness, default=0)),
            "replay_transitions": director.num_transitions,
            "replay_ratio": (
                tally.learner_steps * self._config.agent.batch_size / tally.env_steps if tally.env_steps else 0.0
            ),
            "restarts": director.num_restarts,
            "broadcast_bytes_per_second": tally.received_bytes / seconds,
            **{f"{name}_waiting": max(0.0, 1 - tally.busy_seconds[name] / (count * seconds))
               for name, count in num_parts.items()},
        }  # fmt: skip

    @property
    def params(self) -> Params:
        """The newest parameters."""
        _, leaves = self._director.params()
        return jax.tree.unflatten(jax.tree.structure(self._shapes.params), [np.array(leaf) for leaf in leaves])

    @property
    def state(self) -> dict[str, Any]:
        """The parts of a checkpoint by name; without the replay if the config leaves it out.

        The cut: rounds that were under way have ended, and what the actors have sent later isn't counted yet.

        Raises:
          StateIsLost: if the learner or a shard was lost, and has no place yet.
        """
        self._director.quiesce()
        self.env_steps = self._director.env_steps
        # By its own count: it may be lost meanwhile, and another one go on from the checkpoint before.
        self.learner_steps, leaves = self._director.learner_state()
        state = {"learner": jax.tree.unflatten(jax.tree.structure(self._shapes), leaves)}
        if self._config.checkpoint_replay:
            state["replay"] = join_shards(self._director.snapshots(), self._pool)
        return state

    @property
    def counters(self) -> dict[str, Any]:
        """What `restore` needs beside `state`."""
        return {
            "env_steps": self.env_steps,
            "learner_steps": self.learner_steps,
            "replay_starts_at": self._director.rate_limiter.replay_starts_at,
            "version": self._director.version,
            "incarnations": list(self._director.incarnations),
            "epsilons": self._epsilons,
        }

    @property
    def layout(self) -> str:
        """What a checkpoint must have been saved by to hold the very arrays of this one."""
        return f"actor-learner, {self._topology.num_actors} x {self._topology.lanes_per_actor} lanes"
