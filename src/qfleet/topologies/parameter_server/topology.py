"""The parameter-server topology: workers send gradients to a server, which applies them as they come (Gorila), on Ray.

This process directs the others, in a thread of its own. Arrays go between them directly, gradients and parameters by
memory that they share where all are on one machine, and else by Ray's object store:

    server  --parameters--> worker    the newest, with whatever it is asked for: chunks, one ahead, and one gradient
    worker  --gradient-->   server    each shard's piece of it
    worker  --chunk-->      replay    only where the workers share one; each has its own otherwise

The server is divided: its shards have equal parts of the vector of parameters, with the optimiser's state for them, and
take the same steps in the same order, which is that in which gradients arrive here. A gradient whose parameters are too
many steps old is dropped, as is one whose loss is far from the usual. A rate limiter keeps the replay ratio.

A worker that dies, raises or falls silent is replaced, and has again what the newest checkpoint has of its replay. When
a shard of the server is lost, all go back to their newest snapshot, and gradients of before are refused.

Source: Nair et al. 2015, arXiv 1507.04296.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qfleet.config import ParameterServerConfig, TrainConfig
from qfleet.core.exploration import exploration_at
from qfleet.core.types import Network, Params
from qfleet.envs.host import HostEnv
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.records import Progress, mean
from qfleet.topologies.base import check_loss
from qfleet.topologies.fleet.replay_shard import join_shards
from qfleet.topologies.fleet.topology import OnRay
from qfleet.topologies.parameter_server.server_shard import Division

if TYPE_CHECKING:
    from qfleet.topologies.parameter_server.director import ServerDirector, ServerTally


class ParameterServer(OnRay):
    """Workers, a server and maybe a replay, in processes of their own, and this one that directs them."""

    _director: "ServerDirector"

    def __init__(self, config: TrainConfig, env: InGraphEnv | HostEnv, network: Network) -> None:
        """Checks the sizes; `start` does the work.

        Raises:
          ConfigError: if Ray isn't there, the sizes don't fit each other, or it has many seeds.
        """
        self._topology = config.topology_as(ParameterServerConfig)
        super().__init__(config, env, network, self._topology.actor_pool)
        from qfleet.topologies.parameter_server.director import ServerDirector  # here, as not all need Ray

        self._division = Division(self._agent, config.agent, self._topology.num_server_shards)
        self._director = ServerDirector(config, self._division, self._read_learner, self._read_replay)

    def advance(self, until_env_steps: int) -> Progress:
        """Waits for half a second of training, or until so many environment steps have been taken.

        Raises:
          RunFailed: if a part has failed too often, or the loss isn't finite.
        """
        tally = self._director.resume(until_env_steps)
        self.env_steps, self.learner_steps = tally.end
        check_loss(sum(tally.losses), self.learner_steps, self._config.agent)
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
            loss=mean(tally.losses),
            td_error_mean=mean(tally.td_errors),
            exploration=float(exploration_at(self._config.agent, np.array(self.env_steps))),
            staleness=mean(tally.staleness) or 0.0,
            num_env_failures=tally.num_failures,
            fleet=self._figures(tally),
        )

    def _figures(self, tally: "ServerTally") -> dict[str, float]:
        topology, director, seconds = self._topology, self._director, tally.seconds
        rates, batch_size = tally.actor_env_steps / seconds, self._config.agent.batch_size
        num_parts = {
            "workers": topology.num_workers, "server": topology.num_server_shards, "shards": topology.num_replay_shards
        }  # fmt: skip
        return {
            "worker_env_steps_per_second_min": float(rates.min()),
            "worker_env_steps_per_second_median": float(np.median(rates)),
            "worker_env_steps_per_second_max": float(rates.max()),
            "workers_there": director.num_ready_actors,
            "staleness_max": float(max(tally.staleness, default=0)),
            "gradients_per_second": sum(tally.num_gradients.values()) / seconds,
            "gradients_stale": tally.num_gradients["stale"],
            "gradients_outlier": tally.num_gradients["outlier"],
            "replay_transitions": director.num_transitions,
            "replay_ratio": (
                tally.num_gradients["applied"] * batch_size / tally.env_steps if tally.env_steps else 0.0
            ),
            "restarts": director.num_restarts,
            "pulled_bytes_per_second": tally.received_bytes / seconds,
            "pushed_bytes_per_second": tally.pushed_bytes / seconds,
            **{f"{name}_waiting": max(0.0, 1 - tally.busy_seconds[name] / (count * seconds))
               for name, count in num_parts.items() if count},
        }  # fmt: skip

    @property
    def params(self) -> Params:
        """The newest parameters."""
        return jax.device_get(self._division.params_of(self._director.params()))

    @property
    def state(self) -> dict[str, Any]:
        """The parts of a checkpoint by name; without the replay if the config leaves it out.

        The cut: nothing is under way.

        Raises:
          StateIsLost: if a shard of the server or of the replay was lost, and has no place yet.
        """
        self._director.quiesce()
        self.env_steps = self._director.env_steps
        leaves = self._director.learner_state()
        self.learner_steps = self._director.learner_steps
        # As `make_learner` has it, which knows of a norm to clip by; the arrays are the same.
        learner = jax.tree.unflatten(jax.tree.structure(self._shapes), jax.tree.leaves(self._division.join(leaves)))
        state = {"learner": learner}
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
        }

    @property
    def layout(self) -> str:
        """What a checkpoint must have been saved by to hold the very arrays of this one."""
        return f"parameter-server, {self._topology.num_workers} x {self._topology.lanes_per_worker} lanes"
