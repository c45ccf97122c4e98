"""Drives one fused run: the host plans a chunk, calls the compiled program once, and reads the chunk's sums."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qfleet.config import AgentConfig, TrainConfig
from qfleet.core.learner import LearnerState
from qfleet.core.replay import SavedReplay
from qfleet.core.types import Network, Params
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime import peers
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.compiling import compilers
from qfleet.runtime.evaluation import Episodes, Pieces, join_episodes, never
from qfleet.runtime.records import Progress
from qfleet.topologies.acting import restored_actor, saved_actor
from qfleet.topologies.base import Layout, OwnLearner
from qfleet.topologies.footprint import Footprint
from qfleet.topologies.fused.chunk import Chunk, progress_of
from qfleet.topologies.fused.program import FusedState
from qfleet.topologies.fused.program_on_devices import ProgramOnDevices
from qfleet.topologies.replay_measures import ReplayMeasures
from qfleet.topologies.restoring import read_state
from qfleet.topologies.schedule import Plan, changeable, learner_steps, make_plan, rows_per_iteration

MAX_ITERATIONS = 256
"""The largest number of iterations in one chunk."""

CHUNK_SECONDS = 0.25
"""Target time of a chunk: short enough to answer Ctrl-C, long enough that dispatching it costs nothing."""


class Fused(OwnLearner):
    """One or many independent learners in one program."""

    _chunk_seconds = CHUNK_SECONDS

    def __init__(
        self,
        config: TrainConfig,
        env: InGraphEnv,
        network: Network,
        optimiser: optax.GradientTransformation | None = None,
        on_devices: ProgramOnDevices | None = None,
    ) -> None:
        """Checks the sizes; `start` does the work. With `on_devices`, that program is run.

        Raises:
          ConfigError: if the sizes in `config` don't fit each other, or its optimiser isn't known.
        """
        self._on_devices = on_devices or ProgramOnDevices(config, env, network, optimiser)
        self._config = config
        self._env = env
        self._pieces, self._replay_measures = Pieces(), ReplayMeasures()
        self.env_steps = self.learner_steps = self._replay_starts_at = 0
        self._seconds_per_iteration = self._chunk_seconds  # a guess that makes the first chunk one iteration
        self.changeable = changeable(config.agent)
        self._kept_learners: dict[int, Any] = {}  # learners that stay as they are, by their seed's index

    def start(self) -> float:
        """Compiles the program, starts `num_seeds` learners, and returns the wall time that took, in seconds."""
        started = time.perf_counter()
        program, self._seeds = self._on_devices.jitted(), self._on_devices.seeds
        self._replay_leaves, self._restore_replay = program.replay_leaves, program.restore_replay
        state = jax.eval_shape(program.init, self._seeds)
        with compilers() as pool:  # XLA compiles one program, the largest first, while Python traces the next
            compiled_run = pool.submit(program.run.lower(state, self._to_program(self._plan()), np.int32(0)).compile)
            lowered = program.init.lower(self._seeds)
            # This program runs once, and the one that begins episodes takes next to no time. Optimising them would cost
            # more time than it saves. XLA can skip that on a CPU only.
            unoptimised = {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
            compiled_init = pool.submit(lowered.compile, compiler_options=unoptimised)
            arguments, zero = (self._seeds, np.uint32(0), np.int32(0)), np.int32(0)
            episodes = jax.eval_shape(program.begin_episodes, *arguments)
            lowered = program.play_episodes.lower(state.learner.params, *arguments, episodes, zero, zero)
            compiled_play = pool.submit(lowered.compile)
            lowered = program.begin_episodes.lower(*arguments)
            compiled_begin = pool.submit(lowered.compile, compiler_options=unoptimised)
            self._fused_state: FusedState = compiled_init.result()(self._seeds)
            self._run = compiled_run.result()
            self._begin_episodes, self._play_episodes = compiled_begin.result(), compiled_play.result()
        return time.perf_counter() - started

    def footprint(self) -> Footprint:
        """Returns what it keeps on which devices, before or after `start`."""
        return self._on_devices.footprint()

    @property
    def env_steps_per_iteration(self) -> int:
        """Environment steps of one iteration, over all lanes of one seed: `advance` stops at multiples of it."""
        return self._config.topology.num_envs * rows_per_iteration(self._config.agent)

    def keep(self, index: int) -> None:
        """Keeps the learner of one of many seeds as it is now, while the others train on.

        More training could make a learner worse that has reached its goal.
        """
        if self._config.num_seeds > 1:
            self._kept_learners[index] = jax.tree.map(lambda x: jnp.copy(x[index]), self.learner)

    @property
    def learner(self) -> LearnerState:
        """The newest learner state, or the kept one; with many seeds, with a leading axis `[seeds]`."""
        learner = self._fused_state.learner
        for i, kept in self._kept_learners.items():
            learner = jax.tree.map(lambda x, old, i=i: x.at[i].set(old), learner, kept)
        return learner

    def set_learner(self, learner: LearnerState) -> None:
        """Goes on from another learner state, whose arrays must lie where its own do and be used by nobody else."""
        self._fused_state = self._fused_state._replace(learner=learner)

    @property
    def params(self) -> Params:
        """The newest parameters, or the kept ones; with many seeds, with a leading axis `[seeds]`."""
        return self.learner.params

    @property
    def state(self) -> dict[str, Any]:
        """The parts of a checkpoint by name; without the replay if the config leaves it out."""
        actor = saved_actor(self._fused_state.actor)
        state = {**self._fused_state._asdict(), "learner": self.learner, "actor": actor}
        if self._fused_state.replay:
            replay = self._fused_state.replay
            state["replay"] = SavedReplay(replay.ring, self._replay_leaves(replay), replay.max_priority)
        if not self._config.checkpoint_replay:
            state.pop("replay")
        return state

    def advance(self, until_env_steps: int) -> Progress:
        """Trains one chunk further, up to the first iteration that reaches `until_env_steps`.

        Raises:
          RunFailed: if a reward, an observation or the loss isn't finite.
        """
        return progress_of(self._run_chunk(until_env_steps), self._config, self._env.spec)

    def _run_chunk(self, until_env_steps: int) -> Chunk:
        num_iterations = math.ceil((until_env_steps - self.env_steps) / self.env_steps_per_iteration)
        wanted = peers.firsts(self._chunk_seconds / self._seconds_per_iteration)
        num_iterations = max(1, min(num_iterations, math.ceil(wanted), MAX_ITERATIONS))

        started = time.perf_counter()
        plan = self._plan()
        self._fused_state, stats = self._run(self._fused_state, self._to_program(plan), np.int32(num_iterations))
        stats = jax.device_get(stats)
        seconds = time.perf_counter() - started
        self._seconds_per_iteration = seconds / num_iterations

        new_env_steps = num_iterations * self.env_steps_per_iteration
        new_learner_steps = learner_steps(self._config.agent, plan, num_iterations)
        self.env_steps += new_env_steps
        self.learner_steps += new_learner_steps
        return Chunk(
            stats=stats,
            exploration=plan.exploration[..., num_iterations - 1, -1],
            num_iterations=num_iterations,
            env_steps=self.env_steps,
            learner_steps=self.learner_steps,
            new_env_steps=new_env_steps,
            new_learner_steps=new_learner_steps,
            seconds=seconds,
        )

    def evaluate(
        self,
        num_episodes: int,
        batch: int = 0,
        *,
        max_episode_steps: int | None = None,
        should_stop: Callable[[], bool] = never,
    ) -> Episodes | None:
        """Returns episodes of the newest parameters, `[num_seeds, num_episodes]`; None if it was stopped.

        Args: as for `Topology.evaluate`.
        """
        episodes = []
        for i in range(batch, batch + math.ceil(num_episodes / self._config.eval_episodes)):
            played = self._evaluate_batch(i, max_episode_steps, should_stop)
            if played is None:
                return None
            episodes.append(jax.tree.map(lambda part: part.reshape(self._config.num_seeds, -1), played))
        return join_episodes(episodes, num_episodes)

    def _evaluate_batch(
        self, batch: int, max_episode_steps: int | None, should_stop: Callable[[], bool]
    ) -> Episodes | None:
        numbers = (self._seeds, np.uint32(self.env_steps % 2**32), np.int32(batch))
        params = self.params
        return self._pieces.play(
            lambda: self._begin_episodes(*numbers),
            lambda *further: self._play_episodes(params, *numbers, *further),
            self._env.spec,
            max_episode_steps,
            should_stop,
        )

    def replay_measures(self) -> dict[str, float]:
        """Returns measures of the replay, and of the episodes stored since the last call, by name."""
        return self._replay_measures.read(self._fused_state.replay) if self._fused_state.replay else {}

    @property
    def layout(self) -> Layout:
        """The layout of the checkpoints that it saves."""
        return Layout(topology="fused", num_segments=1, lanes_per_segment=self._config.topology.num_envs)

    def read(self, checkpoints: Checkpoints, checkpoint: int | None, metadata: dict[str, Any]) -> dict[str, Any]:
        """Returns the state that a checkpoint holds; in another layout it has no lanes and no random key."""
        return read_state(self, checkpoints, checkpoint, metadata, self._config.agent, self._env.spec.frame_stack)

    def restore(self, state: dict[str, Any], counters: dict[str, int]) -> None:
        """Goes on from a checkpoint; if it has no replay, from an empty one, after a new warm-up."""
        if state.get("replay"):
            state = {**state, "replay": self._restore_replay(state["replay"])}
        self.env_steps, self.learner_steps = counters["env_steps"], counters["learner_steps"]
        if "key" not in state:  # the key of the beginning has been used, so derive another from it
            state["key"] = jax.random.fold_in(self._fused_state.key, np.uint32(self.env_steps % 2**32))
        if "actor" in state:
            state = {**state, "actor": restored_actor(state["actor"])}
        self._fused_state = self._fused_state._replace(**state)
        self._replay_starts_at = counters["replay_starts_at"] if "replay" in state else self.env_steps

    def _plan(self) -> Plan:
        return self._plan_of(self._config.agent)

    def _plan_of(self, agent: AgentConfig) -> Plan:
        return make_plan(
            agent,
            self._config.topology.num_envs,
            MAX_ITERATIONS,
            self.env_steps,
            self._replay_starts_at,
            self.fixed,
        )

    def _to_program(self, plan: Plan) -> Any:
        """Returns what the program takes as its plan."""
        return plan
