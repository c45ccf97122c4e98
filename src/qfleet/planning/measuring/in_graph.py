"""The parts of a run whose environment is written in JAX: rows of steps, and learner steps.

Each is a program of its own, made of the same pure functions as the program of the run, and on the same mesh.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from qfleet.config import TrainConfig
from qfleet.core.agent import make_agent, noise_keys
from qfleet.core.learner import make_learner
from qfleet.core.replay import make_replay
from qfleet.core.replicas import ALONE, local_lane_ids
from qfleet.core.types import Network, stored_spec
from qfleet.core.updates import learn_from_replay, learn_from_rollout, no_losses, regression
from qfleet.envs.in_graph import draw_step_keys
from qfleet.envs.spec import InGraphEnv
from qfleet.planning.costs import Cost
from qfleet.planning.measuring.timing import repetitions, time_snapshots, timed
from qfleet.topologies.acting import ActorState, act
from qfleet.topologies.fused.program import FusedState, make_program, partition_state
from qfleet.topologies.mesh import DATA_AXIS, REPLICATED, Placement
from qfleet.topologies.schedule import rows_per_iteration

_EXPLORATION = 0.1


def measure_rows_and_learning(config: TrainConfig, env: InGraphEnv, network: Network) -> dict[str, Cost]:
    """Returns the costs of the parts of a fused run.

    They are `row` (a step of all lanes, with its storing), `learn` (a learner step), and `snapshot` (a copy of the
    parameters on the host).
    """
    parts = _Parts(config, env, network)
    return {"row": parts.row(), "learn": parts.learn(), "snapshot": parts.snapshot()}


class _Parts:
    """The programs of the parts, and the state that they work on."""

    def __init__(self, config: TrainConfig, env: InGraphEnv, network: Network) -> None:
        self._config, self._env = config.agent, env
        self._num_rows = rows_per_iteration(config.agent)
        self._placement = Placement(config.topology.mesh, network)
        self._replicas = replicas = self._placement.replicas
        self._num_lanes = config.topology.num_envs // replicas.size
        self._agent = make_agent(network, config.agent, env.spec.frame_stack)
        self._learner = make_learner(self._agent, config.agent)
        stored = stored_spec(env.spec, self._agent.to_storage_layout)
        num_envs, carry_size = config.topology.num_envs, self._agent.carry_size
        self._replay = (
            make_replay(stored, config.agent, num_envs, replicas, carry_size=carry_size)
            if config.agent.replay != "none"
            else None
        )
        program = make_program(config, env, self._agent, self._learner, replicas)
        alone = make_program(config, env, self._agent, self._learner, ALONE._replace(size=replicas.size))
        shapes = jax.eval_shape(alone.init, np.uint32(0))
        learner = self._placement.partition_learner(shapes.learner)
        self._specs = partition_state(shapes, DATA_AXIS)._replace(learner=learner)
        self._batch_shapes = (
            () if self._replay else jax.eval_shape(lambda state: self._rollout(state, ALONE), shapes)[1]
        )
        self._batch_specs = jax.tree.map(self._spec_of, self._batch_shapes)
        init = self._placement.jit(program.init, (REPLICATED,), self._specs)
        self._state: FusedState = init(np.uint32(config.seed))
        self._batch: Any = ()
        self._rows_jitted = self._placement.jit(
            self._rows, (self._specs, REPLICATED), (self._specs, self._batch_specs), (0,)
        )

    def _spec_of(self, shape: jax.ShapeDtypeStruct) -> PartitionSpec:
        is_of_rows = shape.ndim > 1 and shape.shape[0] == self._num_rows
        return PartitionSpec(None, DATA_AXIS) if is_of_rows else PartitionSpec(DATA_AXIS)

    def row(self) -> Cost:
        """Times rows."""
        number = repetitions(self._run_rows)
        return self._timed(lambda: self._run_rows(number)).times(1 / (number * self._num_rows))

    def _run_rows(self, number: int) -> None:
        self._state, self._batch = self._rows_jitted(self._state, np.int32(number))
        jax.block_until_ready(self._state.actor)

    def learn(self) -> Cost:
        """Times learner steps on what the rows have left."""
        specs = (self._specs, self._batch_specs, REPLICATED)
        run = self._placement.jit(self._steps, specs, self._specs, (0,))
        while self._replay and self._num_stored() < self._least():
            self.row()

        def call(number: int) -> None:
            self._state = run(self._state, self._batch, np.int32(number))
            jax.block_until_ready(self._state.learner)

        number = repetitions(call)
        per_call = 1 if self._replay else self._config.num_epochs * self._config.num_minibatches
        return self._timed(lambda: call(number)).times(1 / (number * per_call))

    def _timed(self, call: Callable[[], object]) -> Cost:
        """Returns the cost of a call. A program that is alone on CPUs waits for nothing but a core."""
        cost = timed(call)
        is_on_cpus_alone = jax.default_backend() == "cpu" and jax.process_count() == 1
        return dataclasses.replace(cost, wait_seconds=0.0) if is_on_cpus_alone else cost

    def snapshot(self) -> Cost:
        """Times copies of the parameters."""
        return time_snapshots(self._state.learner.params)

    def _num_stored(self) -> int:
        stored = self._state.replay
        assert stored, "only a replay stores rows"
        return int(np.min(self._placement.to_host(stored.ring.size)))

    def _least(self) -> int:
        return 2 * (self._config.rows_after_start + 2)

    # --- One replica's share ---

    def _rows(self, state: FusedState, number: Array) -> tuple[FusedState, Any]:
        if self._replay:
            return jax.lax.fori_loop(0, number, lambda _, state: self._stored_rows(state), state), ()
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._batch_shapes)
        return jax.lax.fori_loop(0, number, lambda _, carry: self._rollout(carry[0], self._replicas), (state, blank))

    def _random(self, state: FusedState, replicas: Any) -> tuple[Array, tuple]:
        key, env_key, explore_key = jax.random.split(state.key, 3)
        lanes = local_lane_ids(replicas, self._num_lanes)
        step_keys = draw_step_keys(self._env, env_key, self._num_rows, lanes)
        uniforms = jax.random.uniform(explore_key, (self._num_rows, self._num_lanes))
        return key, (step_keys, uniforms, noise_keys(self._agent, state.key, self._num_rows, lanes))

    def _stored_rows(self, state: FusedState) -> FusedState:
        key, inputs = self._random(state, self._replicas)
        params, replay = state.learner.params, self._replay
        assert replay is not None

        def row(carry: tuple, inputs: tuple) -> tuple[tuple, Array]:
            (actor, stored), (step_keys, uniform, noise) = carry, inputs
            actor, new, stats, _ = act(
                self._env, self._agent, params, actor, step_keys, uniform, jnp.float32(_EXPLORATION), noise
            )
            return (actor, replay.insert(stored, new)), stats.q_max

        (actor, stored), _ = jax.lax.scan(row, (state.actor, state.replay), inputs)
        return state._replace(actor=actor, replay=stored, key=key)

    def _rollout(self, state: FusedState, replicas: Any) -> tuple[FusedState, Any]:
        key, inputs = self._random(state, replicas)
        params, begun = state.learner.params, state.actor

        def row(actor: ActorState, inputs: tuple) -> tuple[ActorState, tuple]:
            step_keys, uniform, noise = inputs
            view = actor.memory.view
            actor, new, stats, _ = act(
                self._env, self._agent, params, actor, step_keys, uniform, jnp.float32(_EXPLORATION), noise
            )
            return actor, (new._replace(obs=view), stats)

        actor, (rows, stats) = jax.lax.scan(row, begun, inputs)
        last_value = jnp.max(self._agent.act_values(params, actor.memory)[0], axis=-1)
        batch = regression(rows, stats.q_max, last_value, self._config, begun.memory.carry)
        return state._replace(actor=actor, key=key), batch

    def _steps(self, state: FusedState, batch: Any, number: Array) -> FusedState:
        key, own = jax.random.split(state.key)
        if self._replay:
            arrays: Any = (state.learner, state.replay, no_losses())
            learner, stored, _ = learn_from_replay(
                self._learner, self._replay, arrays, own, jnp.float32(0.5), number, self._replicas
            )
            return state._replace(learner=learner, replay=stored, key=key)

        def learn(i: Array, learner: Any) -> Any:
            step_key = jax.random.fold_in(own, i)
            return learn_from_rollout(self._learner, learner, batch, step_key, self._config, self._replicas)[0]

        return state._replace(learner=jax.lax.fori_loop(0, number, learn, state.learner), key=key)
