"""The actor-learner topology, as a run sees it. See `qfleet.topologies.actor_learner` for how data flows in it."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qfleet.config import ActorLearnerConfig, TrainConfig
from qfleet.core.learner import LearnerState
from qfleet.core.types import Network, Params
from qfleet.envs.host import HostEnv
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.records import Progress, Sum, make_progress, mean, sum_of
from qfleet.topologies.actor_learner.learner import batches_per_round
from qfleet.topologies.base import check_loss
from qfleet.topologies.fleet.replay_shares import join_shards
from qfleet.topologies.fleet.topology import OnRay

if TYPE_CHECKING:
    from qfleet.topologies.actor_learner.director import ActorLearnerDirector
    from qfleet.topologies.actor_learner.machine import ActorLearnerStats


class ActorLearner(OnRay):
    """Actors, the shards of a replay and a learner, each in a process of its own; this process coordinates them."""

    _director: "ActorLearnerDirector"

    def __init__(self, config: TrainConfig, env: InGraphEnv | HostEnv, network: Network) -> None:
        """Checks the sizes; `start` starts the processes.

        Raises:
          ConfigError: if Ray isn't installed, the sizes don't fit each other, or the run has several seeds.
        """
        self._topology = config.topology_as(ActorLearnerConfig)
        super().__init__(config, env, network, self._topology.actor_pool)
        from qfleet.topologies.actor_learner.director import ActorLearnerDirector  # here, because most runs need no Ray

        self._epsilons = [self._topology.epsilon(i) for i in range(self._topology.num_actors)]
        self._director = ActorLearnerDirector(
            config, batches_per_round(config, env.spec), self._read_learner, self._read_replay
        )

    def advance(self, until_env_steps: int) -> Progress:
        """Waits for half a second of training, or until so many environment steps have been taken.

        Raises:
          RunFailed: if a process has failed too often, or the loss isn't finite.
        """
        stats = self._director.resume(until_env_steps)
        self.env_steps, self.learner_steps = stats.end
        check_loss(stats.loss, self.learner_steps, self._config.agent)
        return self._progress(stats)

    def _progress(self, stats: "ActorLearnerStats") -> Progress:
        return make_progress(
            env_steps=self.env_steps,
            learner_steps=self.learner_steps,
            train_seconds=stats.seconds,
            new_env_steps=stats.env_steps,
            new_learner_steps=stats.learner_steps,
            episode_return=sum_of(stats.returns),
            episode_length=sum_of(stats.lengths),
            q_max=sum_of(stats.q_mean),
            loss=Sum(stats.loss, stats.learner_steps),
            td_error=Sum(stats.td_error, stats.learner_steps),
            exploration=mean(self._epsilons) or 0.0,
            staleness=sum_of(stats.staleness),
            num_env_failures=stats.num_failures,
            fleet=self._fleet_figures(stats),
        )

    def _fleet_figures(self, stats: "ActorLearnerStats") -> dict[str, float]:
        topology, director, seconds = self._topology, self._director, stats.seconds
        rates = stats.actor_env_steps / seconds
        num_processes = {"actors": topology.num_actors, "shards": topology.num_replay_shards, "learner": 1}
        return {
            "actor_env_steps_per_second_min": float(rates.min()),
            "actor_env_steps_per_second_median": float(np.median(rates)),
            "actor_env_steps_per_second_max": float(rates.max()),
            "actors_ready": director.num_ready_actors,
            "staleness_max": float(max(stats.staleness, default=0)),
            "replay_transitions": director.num_transitions,
            "replay_ratio": (
                stats.learner_steps * self._config.agent.batch_size / stats.env_steps if stats.env_steps else 0.0
            ),
            "restarts": director.num_restarts,
            "broadcast_bytes_per_second": stats.received_bytes / seconds,
            **{f"{name}_waiting": max(0.0, 1 - stats.busy_seconds[name] / (count * seconds))
               for name, count in num_processes.items()},
        }  # fmt: skip

    def replay_measures(self) -> dict[str, float]:
        """Returns the environment steps that the replay holds, over all its shards."""
        return {"replay_size": float(self._director.num_transitions)}

    @property
    def params(self) -> Params:
        """The newest parameters."""
        _, leaves = self._director.params()
        return jax.tree.unflatten(jax.tree.structure(self._shapes.params), [np.array(leaf) for leaf in leaves])

    @property
    def learner(self) -> LearnerState:
        """The newest learner state, once nothing is under way any more."""
        self._director.quiesce()
        self.env_steps = self._director.env_steps
        # The learner's own count, because it may be lost meanwhile, and its replacement goes on from a checkpoint.
        self.learner_steps, leaves = self._director.learner_state()
        learner: LearnerState = jax.tree.unflatten(jax.tree.structure(self._shapes), leaves)
        return learner

    @property
    def state(self) -> dict[str, Any]:
        """The parts of a checkpoint by name; without the replay if the config leaves it out.

        They belong to one moment: rounds that were under way have ended, and chunks that have arrived meanwhile are
        neither stored nor counted yet.

        Raises:
          StateIsLost: if the learner or a shard is lost, and its replacement has found no node yet.
        """
        state: dict[str, Any] = {"learner": self.learner}
        if self._config.checkpoint_replay:
            state["replay"] = join_shards(self._director.snapshots(), self._pool)
        return state
