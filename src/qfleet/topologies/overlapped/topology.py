"""Drives one overlapped run: the host plans, acts and waits for the environments while the learner's program runs."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from qfleet.config import OverlappedConfig, TrainConfig
from qfleet.core.keys import Stream
from qfleet.core.learner import LearnerState
from qfleet.core.types import Network, Params
from qfleet.envs.host import HostEnv, seed_of
from qfleet.runtime import peers
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.evaluation import Episodes, never
from qfleet.runtime.host_acting import HostActing, ReceivedRow
from qfleet.runtime.records import Progress, Sum, make_progress, sum_of
from qfleet.runtime.stopwatch import OTHER, Stopwatch
from qfleet.runtime.workarounds.glibc_malloc import reuse_freed_memory
from qfleet.topologies.base import Layout, OwnLearner, check_loss
from qfleet.topologies.evaluator import HostEvaluator, gather_episodes
from qfleet.topologies.footprint import Footprint
from qfleet.topologies.overlapped.learning import Learning
from qfleet.topologies.overlapped.profile import parts_of, timed_act, timed_lanes
from qfleet.topologies.overlapped.programs import HostRow, RandomInputs
from qfleet.topologies.overlapped.programs_on_mesh import ProgramsOnMesh
from qfleet.topologies.replay_measures import ReplayMeasures
from qfleet.topologies.restoring import read_state
from qfleet.topologies.schedule import Plan, changeable, make_plan, rows_per_iteration
from qfleet.topologies.schedule import learner_steps as planned_learner_steps

CHUNK_SECONDS = 0.5
"""The longest that a chunk of several iterations should take: an interrupted run stops at the end of a chunk."""


class RowsStats:
    """Statistics of one chunk's rows."""

    def __init__(self) -> None:
        self.returns: list[float] = []
        """Returns of the episodes that ended."""
        self.lengths: list[int] = []
        """Their lengths, in environment steps."""
        self.q_max: list[float] = []
        """Greatest value of the observations acted on, mean over lanes, by row."""
        self.staleness: list[int] = []
        """Learner steps between the parameters that acted and the newest, by row."""
        self.num_failures = 0

    def add(self, row: ReceivedRow, q_max: np.ndarray, staleness: int) -> None:
        """Adds one row; `q_max`, `[lanes]`, holds the greatest values of the observations acted on."""
        self.returns += row.returns
        self.lengths += row.lengths
        self.q_max.append(float(np.mean(q_max)))
        self.staleness.append(staleness)
        self.num_failures += row.num_failures


class Overlapped(OwnLearner):
    """One learner, and environments that step while it learns."""

    def __init__(
        self,
        config: TrainConfig,
        env: HostEnv,
        network: Network,
        optimiser: optax.GradientTransformation | None = None,
    ) -> None:
        """Checks the sizes; `start` does the work.

        Raises:
          ConfigError: if the sizes in `config` don't fit each other, or its optimiser isn't known.
        """
        self._config, self._env, self._topology = config, env, config.topology_as(OverlappedConfig)
        self._on_mesh = ProgramsOnMesh(config, config.topology.mesh, env.spec, network, optimiser)
        self._num_lanes = self._on_mesh.num_lanes  # of this process
        num_eval_lanes = min(self._num_lanes, config.eval_episodes)
        self._evaluator = HostEvaluator(
            env,
            self._on_mesh.agent,
            num_eval_lanes,
            config.topology.lane_options,
            config.eval_exploration,
            config.agent.discount,
        )
        self._stopwatch = Stopwatch(parts_of(config.agent))
        self._to_host, self._to_devices = self._on_mesh.copy_to_host, self._on_mesh.copy_to_devices
        self.env_steps = self.learner_steps = self._replay_starts_at = 0
        self._seconds_per_iteration = CHUNK_SECONDS  # a guess that makes the first chunk one iteration
        self.changeable = changeable(config.agent)
        self._lanes: Any = None
        self._replay_measures = ReplayMeasures()

    def start(self) -> float:
        """Starts the environments, compiles the programs, and returns the wall time that took, in seconds."""
        started = time.perf_counter()
        if jax.default_backend() == "cpu":
            reuse_freed_memory()
        programs, stopwatch = self._on_mesh.jitted(), self._stopwatch if self._topology.profile else None
        learner, replay, self._key = programs.init(np.uint32(self._config.seed))
        self._learning = Learning(self._on_mesh, programs, learner, replay)
        self._lanes = self._env.make_lanes(self._num_lanes, self._topology.lane_options)
        if stopwatch:
            self._time_lanes_and_copies(stopwatch)
        self._begin_episodes()
        number = np.zeros(self._num_lanes, np.float32)
        is_first, uniform = self._on_mesh.lanes_to_devices((self._acting.is_first, number))
        noise_key = self._key if self._on_mesh.agent.acts_with_keys else ()
        self._draw, self._act, self._learning.learn = self._on_mesh.compile(
            programs,
            self._key,
            (self.params, self._memory, self._acting.obs, is_first, np.float32(0), uniform, noise_key),
            self._on_mesh.learn_arguments(learner, replay, self._key, self._acting.obs, self._memory),
            stopwatch,
        )
        if stopwatch:
            self._act = timed_act(self._act, stopwatch, (self._acting.is_first, np.float32(0), number, noise_key))
            self._draw = stopwatch.timed(OTHER, self._draw)
        return time.perf_counter() - started

    def _time_lanes_and_copies(self, stopwatch: Stopwatch) -> None:
        self._lanes = timed_lanes(self._lanes, stopwatch)
        self._to_host = stopwatch.timed("transfer", self._to_host)
        self._to_devices = stopwatch.timed("transfer", self._to_devices)
        self._learning.losses_to_host = stopwatch.timed("transfer", self._learning.losses_to_host)

    def footprint(self) -> Footprint:
        """Returns what it keeps on which devices, before or after `start`. The environments run elsewhere."""
        return self._on_mesh.footprint()

    def _begin_episodes(self) -> None:
        assert self._lanes is not None
        seed = seed_of(self._config.seed, Stream.TRAINING, self.env_steps, jax.process_index())
        self._acting = HostActing(self._lanes, seed, self._to_devices)
        self._memory = self._on_mesh.blank_memory()

    @property
    def env_steps_per_iteration(self) -> int:
        """Environment steps of one iteration, over all lanes: `advance` stops at multiples of it."""
        return self._topology.num_envs * rows_per_iteration(self._config.agent)

    @property
    def learner(self) -> LearnerState:
        """The newest learner state. It doesn't include the learner steps that are due after the newest row."""
        return self._learning.learner

    def set_learner(self, learner: LearnerState) -> None:
        """Goes on from another learner state, whose arrays must lie where its own do and be used by nobody else."""
        self._learning.learner = learner

    @property
    def params(self) -> Params:
        """The newest parameters."""
        return self._learning.learner.params

    @property
    def state(self) -> dict[str, Any]:
        """The parts of a checkpoint by name; without the replay if the config leaves it out."""
        self._learning.learn_pending()
        state = {"learner": self._learning.learner, "key": self._key, "observation": self._acting.obs}
        if self._on_mesh.has_replay and self._config.checkpoint_replay:
            state["replay"] = self._learning.saved_replay()
        return state

    def advance(self, until_env_steps: int) -> Progress:
        """Trains one chunk further, up to the first iteration that reaches `until_env_steps`.

        Raises:
          RunFailed: if the loss isn't finite, or too many environments have failed.
        """
        started = time.perf_counter()
        self._stopwatch.start()
        env_steps, learner_steps = self.env_steps, self.learner_steps
        stats = RowsStats()
        num_iterations = math.ceil((until_env_steps - self.env_steps) / self.env_steps_per_iteration)
        wanted = peers.firsts(CHUNK_SECONDS / self._seconds_per_iteration)
        num_iterations = max(1, min(num_iterations, math.ceil(wanted)))
        take_rows = self._rows_with_replay if self._on_mesh.has_replay else self._rollout
        for _ in range(num_iterations):
            plan = make_plan(
                self._config.agent, self._topology.num_envs, 1, self.env_steps, self._replay_starts_at, self.fixed
            )
            self._key, inputs = self._draw(self._key)
            take_rows(plan, inputs, stats)
            self.env_steps += self.env_steps_per_iteration
            self.learner_steps += planned_learner_steps(self._config.agent, plan, 1)
        loss, td_error = self._learning.sum_losses()
        check_loss(loss.total, self.learner_steps, self._config.agent)
        seconds = time.perf_counter() - started
        self._seconds_per_iteration = seconds / num_iterations
        return make_progress(
            env_steps=self.env_steps,
            learner_steps=self.learner_steps,
            train_seconds=seconds,
            new_env_steps=self.env_steps - env_steps,
            new_learner_steps=self.learner_steps - learner_steps,
            episode_return=sum_of(stats.returns),
            episode_length=sum_of(stats.lengths),
            q_max=Sum(float(np.sum(stats.q_max)), len(stats.q_max)),
            loss=loss,
            td_error=td_error,
            exploration=float(plan.exploration[-1, -1]),
            staleness=sum_of(stats.staleness),
            num_env_failures=stats.num_failures,
            part_seconds=self._stopwatch.split(seconds) if self._topology.profile else None,
        )

    def _rows_with_replay(self, plan: Plan, inputs: RandomInputs, stats: RowsStats) -> None:
        """Takes the rows of one iteration; the learner learns from each while the environments take the next."""
        uniforms, learn_keys = self._own_uniforms(inputs), list(inputs.learn_keys)
        noise_keys = list(inputs.noise_keys) or [()] * len(uniforms)
        for i in range(len(uniforms)):
            row, _ = self._act_and_learn(plan.exploration[0, i], uniforms[i], noise_keys[i], stats)
            num_updates, exponent = int(plan.num_updates[0, i]), plan.importance_exponent[0, i]
            self._learning.add_row(row, learn_keys[i], exponent, num_updates)
            if self._topology.lock_step or self._topology.profile:
                self._learning.learn_pending()

    def _rollout(self, plan: Plan, inputs: RandomInputs, stats: RowsStats) -> None:
        """Takes a rollout, then learns from it.

        Nothing overlaps, because the next action needs the parameters that the learner computes here.
        """
        uniforms = self._own_uniforms(inputs)
        noise_keys = list(inputs.noise_keys) or [()] * len(uniforms)
        rows, memories, q_max, carries = [], [], [], []
        for i in range(len(uniforms)):
            row, row_q_max = self._act_and_learn(plan.exploration[0, i], uniforms[i], noise_keys[i], stats)
            carries.append(row.carry)
            rows.append(row._replace(obs=(), carry=()))
            memories.append(self._memory)
            q_max.append(row_q_max)
        stacked = self._on_mesh.rollout_to_devices(rows)
        is_first = self._on_mesh.lanes_to_devices(self._acting.is_first)
        rollout = (stacked, tuple(memories), tuple(q_max), carries[0], self._acting.obs, is_first)
        self._learning.learn_from_rollout(
            rollout, inputs.learn_keys, planned_learner_steps(self._config.agent, plan, 1)
        )

    def _own_uniforms(self, inputs: RandomInputs) -> np.ndarray:
        """Returns the random numbers of this process's lanes, `[rows, lanes]`."""
        first = jax.process_index() * self._num_lanes
        return self._to_host(inputs.uniforms)[:, first : first + self._num_lanes]

    def _act_and_learn(
        self, exploration: Any, uniform: Any, noise_key: jax.Array | tuple[()], stats: RowsStats
    ) -> tuple[HostRow, jax.Array]:
        """Takes one step of all lanes; while the environments step, the learner learns from the pending row, if any.

        Returns:
          The row, and the greatest value of each lane's observation, `[lanes]`.
        """
        acting, obs, staleness = self._acting, self._acting.obs, self._learning.staleness
        is_first, uniform = self._on_mesh.lanes_to_devices((acting.is_first, uniform))
        self._memory, action, q_max, carry = self._act(
            self.params, self._memory, obs, is_first, exploration, uniform, noise_key
        )
        # This waits until the learner steps under way are done, because their parameters choose the action.
        action = self._to_host(action)
        acting.send(action)
        self._learning.learn_pending()
        received = acting.receive()
        stats.add(received, self._to_host(q_max), staleness)
        row = HostRow(
            obs, action, received.reward, received.terminated, received.truncated, received.no_step, carry=carry
        )
        return row, q_max

    def prepare_evaluation(self) -> None:
        """Makes the lanes of evaluations."""
        self._evaluator.start()

    def evaluate(
        self,
        num_episodes: int,
        batch: int = 0,
        *,
        max_episode_steps: int | None = None,
        should_stop: Callable[[], bool] = never,
    ) -> Episodes | None:
        """Returns episodes of the newest parameters, `[1, num_episodes]`; None if it was stopped.

        Args: as for `Topology.evaluate`. Each process plays its share of the episodes in lanes of its own.
        """
        seed = seed_of(self._config.seed, Stream.EVALUATION, self.env_steps, batch, jax.process_index())
        num_own = -(-num_episodes // jax.process_count())
        params = self._on_mesh.own_copy(self.params)
        own = self._evaluator.play(params, num_own, seed, max_episode_steps=max_episode_steps, should_stop=should_stop)
        played = gather_episodes(own, num_own)
        return jax.tree.map(lambda part: part[None, :num_episodes], played)

    def replay_measures(self) -> dict[str, float]:
        """Returns measures of the replay, and of the episodes stored since the last call, by name."""
        return self._replay_measures.read(self._learning.replay) if self._on_mesh.has_replay else {}

    @property
    def layout(self) -> Layout:
        """The layout of the checkpoints that it saves."""
        return Layout(topology="overlapped", num_segments=1, lanes_per_segment=self._topology.num_envs)

    def read(self, checkpoints: Checkpoints, checkpoint: int | None, metadata: dict[str, Any]) -> dict[str, Any]:
        """Returns the state that a checkpoint holds; in another layout it has no random key and no observations."""
        frame_stack = self._on_mesh.stored_spec.frame_stack
        return read_state(self, checkpoints, checkpoint, metadata, self._config.agent, frame_stack)

    def restore(self, state: dict[str, Any], counters: dict[str, int]) -> None:
        """Goes on from a checkpoint; if it has no replay, from an empty one, after a new warm-up.

        Environments can't be saved, so every lane starts a new episode. What the replay holds of the old episodes ends
        with the observations that they had come to.
        """
        self._learning.restore_learner(state["learner"])
        self.env_steps, self.learner_steps = counters["env_steps"], counters["learner_steps"]
        # A checkpoint of another layout has no key. The key of the beginning has been used, so derive another from it.
        self._key = state.get("key", jax.random.fold_in(self._key, np.uint32(self.env_steps % 2**32)))
        self._replay_starts_at = counters["replay_starts_at"] if "replay" in state else self.env_steps
        if self._on_mesh.has_replay and "replay" in state:
            # A checkpoint without observations has another layout: reading it has already closed its episodes.
            self._learning.restore_replay(state["replay"], state.get("observation"), self._key)
        self._begin_episodes()

    def close(self) -> None:
        """Ends the environments; may be called twice, and before `start`."""
        if self._lanes is not None:
            self._lanes.close()
        self._evaluator.close()
