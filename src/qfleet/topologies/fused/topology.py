"""The fused topology: acting and learning in one compiled program, for environments written in JAX.

The host plans each chunk (how many learner steps after each row, how much to explore), in integers that can't wrap;
the program obeys. One program serves chunks of any length up to `MAX_ITERATIONS`, so nothing is compiled twice.
"""

import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qfleet.config import RunFailed, TrainConfig
from qfleet.core.agent import make_agent
from qfleet.core.learner import LearnerState, make_learner
from qfleet.core.replay import SavedReplay, partition_saved
from qfleet.core.replicas import ALONE
from qfleet.core.types import Network, Params, stored_spec
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime import peers
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.devices import num_shards
from qfleet.runtime.records import Progress
from qfleet.topologies.base import OwnLearner, check_loss, read_as
from qfleet.topologies.footprint import Footprint, batch_shapes, make_footprint
from qfleet.topologies.fused.program import NO_BAD_STEP, FusedState, Program, Tally, make_program, partition_state
from qfleet.topologies.mesh import DATA_AXIS, REPLICATED, Placement
from qfleet.topologies.schedule import Plan, learner_steps, make_plan, rows_per_iteration

MAX_ITERATIONS = 256
"""Iterations of one chunk at most."""

CHUNK_SECONDS = 0.25
"""What a chunk should take: short enough to answer Ctrl-C, long enough that its dispatch costs nothing."""


class Fused(OwnLearner):
    """One or many independent learners in one program; `advance` trains them a chunk further."""

    def __init__(
        self,
        config: TrainConfig,
        env: InGraphEnv,
        network: Network,
        optimiser: optax.GradientTransformation | None = None,
    ) -> None:
        """Checks the sizes; `start` does the work.

        Raises:
          ConfigError: if the sizes in `config` don't fit each other, or its optimiser isn't known.
        """
        agent = make_agent(network, config.agent)
        self._placement = Placement(config.topology.mesh, network)
        self._make_program = functools.partial(
            make_program, config, env, agent, make_learner(agent, config.agent, optimiser)
        )
        self._program = self._make_program(self._placement.replicas)
        self._config = config
        self._env_name = env.spec.name
        self._stored_spec = stored_spec(env.spec, network.to_storage_layout)
        self.env_steps = 0
        """Taken so far, over all lanes of one seed."""
        self.learner_steps = 0
        """Taken so far, by each seed's learner."""
        self._replay_starts_at = 0  # environment steps when the replay was last empty
        self._seconds_per_iteration = CHUNK_SECONDS  # not known yet: the first chunk is one iteration
        self._kept: dict[int, Any] = {}  # learners to keep as they are, by the seed's index

    def start(self) -> float:
        """Compiles the program, starts `num_seeds` learners, and returns the wall time that took, in seconds."""
        started = time.perf_counter()
        program = self._over_seeds() if self._config.num_seeds > 1 else self._on_mesh()
        init, run, evaluate, self._leaves, self._restore = program
        state = jax.eval_shape(init, self._seeds)
        with ThreadPoolExecutor() as pool:  # XLA compiles one program, the largest first, while Python traces the next
            compiled_run = pool.submit(run.lower(state, self._plan(), np.int32(0)).compile)
            lowered = init.lower(self._seeds)
            # It runs once: the time to optimise it would never come back. XLA can leave it out on a CPU only.
            unoptimised = {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
            compiled_init = pool.submit(lowered.compile, compiler_options=unoptimised)
            lowered = evaluate.lower(state.learner.params, self._seeds, np.uint32(0), np.int32(0))
            compiled_evaluate = pool.submit(lowered.compile)
            self._state: FusedState = compiled_init.result()(self._seeds)
            self._run, self._evaluate = compiled_run.result(), compiled_evaluate.result()
        return time.perf_counter() - started

    def _on_mesh(self) -> Any:
        """Returns the program, jitted, of one seed: each device of the mesh has its share of it."""
        self._seeds: Any = np.uint32(self._config.seed)
        placement, (shapes, state) = self._placement, self._layout
        learner = state.learner
        saved = shapes.replay and partition_saved(shapes.replay, DATA_AXIS)
        program, whole = self._program, REPLICATED
        return Program(
            init=placement.jit(program.init, (whole,), state),
            run=placement.jit(program.run, (state, whole, whole), (state, whole), donate_argnums=(0,)),
            evaluate=placement.jit(program.evaluate, (learner.params, whole, whole, whole), whole),
            leaves=placement.jit(program.leaves, (state.replay,), saved and saved.leaves),
            restore=placement.jit(program.restore, (saved,), state.replay),
        )

    @functools.cached_property
    def _layout(self) -> tuple[FusedState, Any]:
        """The shapes of what the first replica has, and how all of it is spread, as `PartitionSpec`s."""
        first = ALONE._replace(size=self._placement.replicas.size)  # its share, outside of the mesh
        shapes = jax.eval_shape(self._make_program(first).init, np.uint32(0))
        learner = self._placement.partition_learner(shapes.learner)
        return shapes, partition_state(shapes, DATA_AXIS)._replace(learner=learner)

    def footprint(self) -> Footprint:
        """Returns what it keeps on which devices, before or after `start`."""
        mesh, (shapes, specs) = self._placement.mesh, self._layout
        batch = batch_shapes(
            self._stored_spec, self._config.agent, self._config.topology.num_envs, mesh.shape[DATA_AXIS]
        )
        axes, devices, batch_specs = mesh.shape, mesh.local_devices, PartitionSpec(DATA_AXIS)
        if self._config.num_seeds > 1:
            devices = self._devices_of_seeds
            axes, share, split = {"seeds": len(devices)}, self._config.num_seeds // len(devices), PartitionSpec("seeds")
            shapes, batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((share, *x.shape), x.dtype), (shapes, batch))
            specs, batch_specs = jax.tree.map(lambda x: split, shapes), split
        return make_footprint(
            axes,
            tuple(devices),
            learner=(shapes.learner, specs.learner),
            lanes=(shapes.actor, specs.actor),
            replay=(shapes.replay, specs.replay),
            batch=(batch, batch_specs),
        )

    @property
    def _devices_of_seeds(self) -> list[jax.Device]:
        return jax.local_devices()[: num_shards(self._config.num_seeds, jax.local_device_count())]

    def _over_seeds(self) -> Any:
        """Returns the program, jitted, of many seeds: spread over the devices, each trains its share in one batch."""
        num_seeds, first = self._config.num_seeds, self._config.seed
        devices = self._devices_of_seeds
        mesh = jax.make_mesh((len(devices),), ("seeds",), axis_types=(AxisType.Auto,), devices=devices)
        split, whole = PartitionSpec("seeds"), PartitionSpec()
        self._seeds = jax.device_put(np.uint32(first + np.arange(num_seeds)), NamedSharding(mesh, split))

        def over_seeds(function: Callable, *in_specs: PartitionSpec, donate_argnums: tuple[int, ...] = ()) -> Any:
            batched = jax.vmap(function, in_axes=tuple(0 if spec == split else None for spec in in_specs))
            mapped = jax.shard_map(batched, mesh=mesh, in_specs=in_specs, out_specs=split, check_vma=False)
            return jax.jit(mapped, donate_argnums=donate_argnums)

        program = self._program
        return Program(
            init=over_seeds(program.init, split),
            run=over_seeds(program.run, split, whole, whole, donate_argnums=(0,)),
            evaluate=over_seeds(program.evaluate, split, split, whole, whole),
            leaves=over_seeds(program.leaves, split),
            restore=over_seeds(program.restore, split),
        )

    @property
    def env_steps_per_iteration(self) -> int:
        """Over all lanes of one seed: runs stop at multiples of it."""
        return self._config.topology.num_envs * rows_per_iteration(self._config.agent)

    def keep(self, index: int) -> None:
        """Keeps the learner of one of many seeds as it is now, while the others train on: it could only get worse."""
        if self._config.num_seeds > 1:
            self._kept[index] = jax.tree.map(lambda x: jnp.copy(x[index]), self.learner)

    @property
    def learner(self) -> LearnerState:
        """The newest, or those kept; with many seeds, with a leading axis `[seeds]`."""
        learner = self._state.learner
        for i, kept in self._kept.items():
            learner = jax.tree.map(lambda x, old, i=i: x.at[i].set(old), learner, kept)
        return learner

    def set_learner(self, learner: LearnerState) -> None:
        """Has it go on with another, whose arrays lie where its own do, and are for nobody else."""
        self._state = self._state._replace(learner=learner)

    @property
    def params(self) -> Params:
        """The newest parameters, or those kept; with many seeds, with a leading axis `[seeds]`."""
        return self.learner.params

    @property
    def state(self) -> dict[str, Any]:
        """The parts of a checkpoint by name; without the replay if the config leaves it out."""
        state = {**self._state._asdict(), "learner": self.learner}
        if self._state.replay:
            replay = self._state.replay
            state["replay"] = SavedReplay(replay.ring, self._leaves(replay), replay.max_priority)
        if not self._config.checkpoint_replay:
            state.pop("replay")
        return state

    def advance(self, until_env_steps: int) -> Progress:
        """Trains one chunk further, up to the first iteration that reaches `until_env_steps`.

        Raises:
          RunFailed: if a reward, an observation or the loss isn't finite.
        """
        num_iterations = math.ceil((until_env_steps - self.env_steps) / self.env_steps_per_iteration)
        wanted = peers.firsts(CHUNK_SECONDS / self._seconds_per_iteration)
        num_iterations = max(1, min(num_iterations, math.ceil(wanted), MAX_ITERATIONS))

        started = time.perf_counter()
        plan = self._plan()
        self._state, tally = self._run(self._state, plan, np.int32(num_iterations))
        tally = jax.device_get(tally)
        seconds = time.perf_counter() - started
        self._seconds_per_iteration = seconds / num_iterations

        env_steps_before = self.env_steps
        new_learner_steps = learner_steps(self._config.agent, plan, num_iterations)
        self.env_steps += num_iterations * self.env_steps_per_iteration
        self.learner_steps += new_learner_steps
        self._check(tally, env_steps_before)
        num_episodes = int(np.sum(tally.num_episodes))
        num_rows = num_iterations * rows_per_iteration(self._config.agent)

        def per_episode(total: np.ndarray) -> float | None:
            return float(np.sum(total)) / num_episodes if num_episodes else None

        def per_learner_step(total: np.ndarray) -> float | None:
            return float(np.mean(total)) / new_learner_steps if new_learner_steps else None

        return Progress(
            env_steps=self.env_steps,
            learner_steps=self.learner_steps,
            train_seconds=seconds,
            new_env_steps=self.env_steps - env_steps_before,
            new_learner_steps=new_learner_steps,
            num_episodes=num_episodes,
            episode_return_mean=per_episode(tally.episode_return),
            episode_length_mean=per_episode(tally.episode_steps),
            q_mean=float(np.mean(tally.q_max)) / num_rows,
            loss=per_learner_step(tally.losses.loss),
            td_error_mean=per_learner_step(tally.losses.td_error),
            exploration=float(plan.exploration[num_iterations - 1, -1]),
        )

    def evaluate(self, num_episodes: int, batch: int = 0) -> np.ndarray:
        """Returns greedy returns of the newest parameters, `[num_seeds, num_episodes]`.

        Args:
          batch: evaluations of the same parameters with different numbers see different episodes.
        """
        batches = range(batch, batch + math.ceil(num_episodes / self._config.eval_episodes))
        moment = np.uint32(self.env_steps % 2**32)
        returns = [np.asarray(self._evaluate(self.params, self._seeds, moment, np.int32(i))) for i in batches]
        return np.concatenate(returns, axis=-1).reshape(self._config.num_seeds, -1)[:, :num_episodes]

    @property
    def layout(self) -> str:
        """What a checkpoint must have been saved by to hold the very arrays of this one."""
        return f"fused, {self._config.topology.num_envs} lanes"

    def read(self, checkpoints: Checkpoints, checkpoint: int | None, metadata: dict[str, Any]) -> dict[str, Any]:
        """Returns the state that a checkpoint holds; of another topology or size it has no lanes and no random key."""
        return read_as(self, checkpoints, checkpoint, metadata, self._config.agent, self._stored_spec.frame_stack)

    def restore(self, state: dict[str, Any], counters: dict[str, int]) -> None:
        """Goes on from a checkpoint; where it has no replay, from an empty one, after a new warm-up."""
        if state.get("replay"):
            state = {**state, "replay": self._restore(state["replay"])}
        self.env_steps, self.learner_steps = counters["env_steps"], counters["learner_steps"]
        if "key" not in state:  # but its own was used before
            state["key"] = jax.random.fold_in(self._state.key, np.uint32(self.env_steps % 2**32))
        self._state = self._state._replace(**state)
        self._replay_starts_at = counters["replay_starts_at"] if "replay" in state else self.env_steps

    def _plan(self) -> Plan:
        return make_plan(
            self._config.agent,
            self._config.topology.num_envs,
            MAX_ITERATIONS,
            self.env_steps,
            self._replay_starts_at,
        )

    def _check(self, tally: Tally, env_steps_before: int) -> None:
        bad_steps = np.atleast_1d(tally.bad_step)
        if np.any(bad_steps != NO_BAD_STEP):
            seed = int(np.argmax(bad_steps != NO_BAD_STEP))
            bad_step = int(bad_steps[seed])
            raise RunFailed(
                f"rewards and observations must be finite, but {self._env_name} returned one that isn't at environment "
                f"step {env_steps_before + bad_step} in lane {bad_step % self._config.topology.num_envs} of seed "
                f"{self._config.seed + seed}"
            )
        check_loss(tally.losses.loss, self.learner_steps, self._config.agent)
