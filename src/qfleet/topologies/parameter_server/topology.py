"""The parameter-server topology (Gorila), on Ray. See the package for how a gradient travels.

Source: Nair et al. 2015, arXiv 1507.04296.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qfleet.config import ParameterServerConfig, TrainConfig
from qfleet.core.exploration import exploration_at
from qfleet.core.learner import LearnerState
from qfleet.core.sharded_learner import ShardedLearner
from qfleet.core.types import Network, Params
from qfleet.envs.host import HostEnv
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.records import Progress, make_progress, sum_of
from qfleet.topologies.base import check_loss
from qfleet.topologies.fleet.replay_shares import join_shards
from qfleet.topologies.fleet.topology import OnRay

if TYPE_CHECKING:
    from qfleet.topologies.parameter_server.director import ServerDirector
    from qfleet.topologies.parameter_server.stats import ServerStats


class ParameterServer(OnRay):
    """Workers, a server and possibly a replay, in processes of their own. This process directs them."""

    _director: "ServerDirector"
    changeable = ("exploration",)

    def __init__(self, config: TrainConfig, env: InGraphEnv | HostEnv, network: Network) -> None:
        """Checks the sizes; `start` starts the processes.

        Raises:
          ConfigError: if Ray is not installed, the sizes do not fit each other, or the config has several seeds.
        """
        self._topology = config.topology_as(ParameterServerConfig)
        super().__init__(config, env, network, self._topology.actor_pool)
        # Imported here, because a run in another topology needs no Ray.
        from qfleet.topologies.parameter_server.director import ServerDirector

        self._learner = ShardedLearner(self._agent, config.agent, self._topology.num_server_shards)
        self._director = ServerDirector(config, self._learner, self._read_learner, self._read_replay)

    def advance(self, until_env_steps: int) -> Progress:
        """Waits for half a second of training, or until so many environment steps have been taken.

        Raises:
          RunFailed: if a process has failed too often, or the loss is not finite.
        """
        self._director.machine.fixed_exploration = self.fixed.get("exploration")
        stats = self._director.resume(until_env_steps)
        self.env_steps, self.learner_steps = stats.end
        check_loss(sum(stats.losses), self.learner_steps, self._config.agent)
        return make_progress(
            env_steps=self.env_steps,
            learner_steps=self.learner_steps,
            train_seconds=stats.seconds,
            new_env_steps=stats.env_steps,
            new_learner_steps=stats.learner_steps,
            episode_return=sum_of(stats.returns),
            episode_length=sum_of(stats.lengths),
            q_max=sum_of(stats.q_mean),
            loss=sum_of(stats.losses),
            td_error=sum_of(stats.td_errors),
            exploration=self.fixed.get(
                "exploration", float(exploration_at(self._config.agent, np.array(self.env_steps)))
            ),
            staleness=sum_of(stats.staleness),
            num_env_failures=stats.num_failures,
            fleet=self._figures(stats),
        )

    def _figures(self, stats: "ServerStats") -> dict[str, float]:
        topology, director, seconds = self._topology, self._director, stats.seconds
        rates, batch_size = stats.actor_env_steps / seconds, self._config.agent.batch_size
        num_parts = {
            "workers": topology.num_workers, "server": topology.num_server_shards, "shards": topology.num_replay_shards
        }  # fmt: skip
        return {
            "worker_env_steps_per_second_min": float(rates.min()),
            "worker_env_steps_per_second_median": float(np.median(rates)),
            "worker_env_steps_per_second_max": float(rates.max()),
            "workers_ready": director.num_ready_actors,
            "staleness_max": float(max(stats.staleness, default=0)),
            "gradients_per_second": sum(stats.num_gradients.values()) / seconds,
            "gradients_stale": stats.num_gradients["stale"],
            "gradients_outlier": stats.num_gradients["outlier"],
            "replay_transitions": director.num_transitions,
            "replay_ratio": (
                stats.num_gradients["applied"] * batch_size / stats.env_steps if stats.env_steps else 0.0
            ),
            "restarts": director.num_restarts,
            "pulled_bytes_per_second": stats.received_bytes / seconds,
            "pushed_bytes_per_second": stats.pushed_bytes / seconds,
            **{f"{name}_waiting": max(0.0, 1 - stats.busy_seconds[name] / (count * seconds))
               for name, count in num_parts.items() if count},
        }  # fmt: skip

    def replay_measures(self) -> dict[str, float]:
        """Returns the environment steps that the replay holds, over all its shards."""
        return {"replay_size": float(self._director.num_transitions)}

    @property
    def params(self) -> Params:
        """The newest parameters."""
        return jax.device_get(self._learner.assemble_params(self._director.params()))

    @property
    def learner(self) -> LearnerState:
        """The newest learner state, once nothing is in flight any more."""
        self._director.quiesce()
        self.env_steps = self._director.env_steps
        self.learner_steps, leaves = self._director.learner_state()
        # The optimiser of `make_learner` may clip, and that of the shards does not. The structure of their states
        # differs, while the arrays are the same.
        learner: LearnerState = jax.tree.unflatten(
            jax.tree.structure(self._shapes), jax.tree.leaves(self._learner.join(leaves))
        )
        return learner

    @property
    def state(self) -> dict[str, Any]:
        """The items of a checkpoint by name; without the replay if the config leaves it out.

        The items agree with each other, because they are copied when no chunk, gradient or step is in flight.

        Raises:
          StateIsLost: if a shard of the server or of the replay was lost and has not found a place yet.
        """
        state: dict[str, Any] = {"learner": self.learner}
        if self._config.checkpoint_replay:
            state["replay"] = join_shards(self._director.snapshots(), self._pool)
        return state
