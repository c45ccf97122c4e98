"""The actor-learner topology: many actors feed a global replay, from which one learner learns (Ape-X), on Ray.

This process directs the others, in a thread of its own. Arrays go between them directly, by Ray's object store:

    actor   --chunk-->       replay shard       rows, with the actor's own TD errors
    shard   --transitions--> learner            its part of a round: a few batches, drawn over all shards as from one
    learner --TD errors-->   replay shard
    learner --parameters-->  actors             those of them that are about to act

A limiter keeps the learner from running ahead of what the replay ratio allows, and the actors from running far ahead of
the learner. Whatever is under way at once is bounded: chunks of each actor, rounds of the learner.

A part that dies, raises or falls silent is replaced. An actor comes back with its epsilon; its segment of the replay is
cut where the last one's chunks end. A shard comes back with what the newest checkpoint has of it, the learner with that
checkpoint's parameters.

Source: Horgan et al. 2018, arXiv 1803.00933.
"""

import contextlib
import dataclasses
import importlib
import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qfleet.config import ActorLearnerConfig, ConfigError, TrainConfig
from qfleet.core.agent import make_agent
from qfleet.core.learner import LearnerState, make_learner
from qfleet.core.replay import SavedReplay
from qfleet.core.types import Network, Params, stored_spec
from qfleet.envs.host import HostEnv
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.records import Progress, mean
from qfleet.topologies.actor_learner_learner import batches_per_round
from qfleet.topologies.evaluating import Evaluator
from qfleet.topologies.footprint import Footprint, batch_shapes, make_footprint
from qfleet.topologies.placement import EVERYBODYS
from qfleet.topologies.replay_shard import join_shards, make_shard_replay
from qfleet.topologies.topology import StateIsLost, Topology, check_loss, fitting, saved_replay

if TYPE_CHECKING:
    from qfleet.topologies.actor_learner_director import FleetTally


class ActorLearner(Topology):
    """Actors, a replay and a learner, each in processes of its own, and this one that directs them."""

    def __init__(self, config: TrainConfig, env: InGraphEnv | HostEnv, network: Network) -> None:
        """Checks the sizes; `start` does the work.

        Raises:
          ConfigError: if Ray isn't there, the sizes don't fit each other, or it has many seeds.
        """
        assert isinstance(config.topology, ActorLearnerConfig)
        if config.num_seeds > 1:
            raise ConfigError(
                f"num_seeds must be 1 with topology actor-learner, got num_seeds={config.num_seeds}; start one run for "
                f"each seed"
            )
        importlib.import_module("qfleet.topologies.ray_cluster")  # which says so if Ray isn't there
        from qfleet.topologies.actor_learner_director import FleetDirector  # here, for most of qfleet does without Ray

        self._config, self._topology, self._env = config, config.topology, env
        self._agent = make_agent(network, config.agent)
        self._stored_spec = stored_spec(env.spec, network.store)
        learner = make_learner(self._agent, config.agent)
        self._shapes: LearnerState = jax.eval_shape(lambda: learner.init(self._agent.init(jax.random.key(0))))
        self._epsilons = [config.topology.epsilon(i) for i in range(config.topology.num_actors)]
        make_shard_replay(config, 0, self._stored_spec)  # which checks the sizes, the same for all shards
        self._director = FleetDirector(
            config, batches_per_round(config, env.spec), self._read_learner, self._read_replay
        )
        self.env_steps = 0
        """When it was last looked at; the fleet goes on meanwhile."""
        self.learner_steps = 0
        """The same."""
        self._evaluator = Evaluator(config, env, self._agent)

    def footprint(self) -> Footprint:
        """Returns what the fleet keeps in all, which on one machine is what the host must have."""
        num_lanes, config = self._topology.num_envs, self._config.agent
        one_shard = dataclasses.replace(self._topology, num_replay_shards=1)
        whole = make_shard_replay(dataclasses.replace(self._config, topology=one_shard), 0, self._stored_spec)
        replay = jax.eval_shape(whole.init)
        return make_footprint(
            {"data": 1, "model": 1},
            tuple(jax.local_devices()[:1]),
            learner=(self._shapes, jax.tree.map(lambda x: EVERYBODYS, self._shapes)),
            lanes=((), EVERYBODYS),
            replay=(replay, jax.tree.map(lambda x: EVERYBODYS, replay)),
            batch=(batch_shapes(self._stored_spec, config, num_lanes, 1), EVERYBODYS),
        )

    def start(self) -> float:
        """Starts all parts, and returns the wall time until the learner, the replay and an actor are there.

        Raises:
          ConfigError: if the cluster isn't there, or has no room for them.
        """
        started = time.perf_counter()
        self._director.checkpoints_path = self.checkpoints_path
        try:
            self._director.start()
        except BaseException:  # Ctrl-C too: a Ray that nobody ends stays as long as this process
            self.close()
            raise
        return time.perf_counter() - started

    def advance(self, until_env_steps: int) -> Progress:
        """Waits for half a second of training, or until so many environment steps have been taken.

        Raises:
          RunFailed: if a part has failed too often, or the loss isn't finite.
        """
        tally = self._director.go_on(until_env_steps)
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
            "actors_there": director.num_actors_there,
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

    def evaluate(self, num_episodes: int, batch: int = 0) -> np.ndarray:
        """Returns greedy returns of the newest parameters, `[1, num_episodes]`; meanwhile the fleet goes on.

        But from the second batch on the learner rests: what confirms a return is what a checkpoint will hold.

        Args:
          num_episodes: played by this process.
          batch: evaluations of the same parameters with different numbers see different episodes.
        """
        if batch:
            with contextlib.suppress(StateIsLost):
                self._director.rest()
        return self._evaluator.returns(self.params, self.env_steps, num_episodes, batch)

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
        self._director.rest()
        self.env_steps = self._director.env_steps
        # By its own count: it may be lost meanwhile, and another one go on from the checkpoint before.
        self.learner_steps, leaves = self._director.learner_state()
        state = {"learner": jax.tree.unflatten(jax.tree.structure(self._shapes), leaves)}
        if self._config.checkpoint_replay:
            state["replay"] = join_shards(self._director.snapshots(), self._topology.crew)
        return state

    @property
    def counters(self) -> dict[str, Any]:
        """What `restore` needs beside `state`."""
        return {
            "env_steps": self.env_steps,
            "learner_steps": self.learner_steps,
            "replay_starts_at": self._director.limiter.replay_starts_at,
            "version": self._director.version,
            "incarnations": list(self._director.incarnations),
            "epsilons": self._epsilons,
        }

    def read(self, checkpoints: Checkpoints, checkpoint: int | None, metadata: dict[str, Any]) -> dict[str, Any]:
        """Returns the state that a checkpoint holds, of a fleet of any size or of another topology."""
        state: dict[str, Any] = {"learner": self._read_learner(checkpoints, checkpoint)}
        if self._config.checkpoint_replay:
            state["replay"] = self._read_replay(checkpoints, checkpoint)
        return state

    def _read_learner(self, checkpoints: Checkpoints, checkpoint: int | None = None) -> LearnerState:
        like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._shapes)
        state: LearnerState = checkpoints.restore_item("learner", like, checkpoint)
        return state

    def _read_replay(self, checkpoints: Checkpoints, checkpoint: int | None = None) -> SavedReplay:
        """Returns the replay of a checkpoint as this fleet would have saved it."""
        saved = saved_replay(checkpoints.restore_item("replay", env_steps=checkpoint))
        num_actors, num_lanes, agent = self._topology.num_actors, self._topology.num_envs, self._config.agent
        shape = (agent.replay_capacity // num_lanes, num_lanes)
        is_ours = saved.ring.rows.outcome.shape == shape and len(saved.ring.cursor) == num_actors
        if is_ours and not isinstance(saved.leaves, tuple):
            return saved
        return fitting(saved, (*shape, num_actors), agent, self._env.spec.frame_stack, is_prioritised=True)

    @property
    def layout(self) -> str:
        """What a checkpoint must have been saved by to hold the very arrays of this one."""
        return f"actor-learner, {self._topology.num_actors} x {self._topology.lanes_per_actor} lanes"

    @property
    def facts(self) -> dict[str, Any]:
        """What the run's summary should hold beside what all topologies have."""
        return {"num_restarts": self._director.num_restarts}

    def restore(self, state: dict[str, Any], counters: dict[str, Any]) -> None:
        """Goes on from a checkpoint; where it has no replay, from an empty one, after a new warm-up.

        Environments are not saved: every actor is a new one, in new episodes.
        """
        self._director.restore(state, counters)
        self.env_steps, self.learner_steps = counters["env_steps"], counters["learner_steps"]

    def close(self) -> None:
        """Ends all parts, and the connection to Ray; may be called twice, and before `start`."""
        self._director.close()
        self._evaluator.close()
