"""An actor: steps lanes of an environment with a copy of the parameters, and returns what it did in chunks."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.config import ActorPool, TrainConfig
from qfleet.core.agent import Agent, noise_keys
from qfleet.core.initial_priorities import ValuedRows, initial_td_errors, padding_rows
from qfleet.core.keys import NOISE, Stream, key_of, sample_keys
from qfleet.core.memory import MemoryState, memory_shapes
from qfleet.core.replay import Row, outcome_of
from qfleet.core.targets import take_action
from qfleet.core.types import Params, stored_spec
from qfleet.envs.host import HostEnv, LaneOptions
from qfleet.envs.in_graph import draw_step_keys
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.cache import enable_compilation_cache
from qfleet.runtime.host_acting import HostActing, ReceivedRow
from qfleet.topologies.acting import ActorState, act, init_actor, not_finite
from qfleet.topologies.fleet.env_and_agent import EnvAndAgent, actor_pool_of, make_env_and_agent


class Chunk(NamedTuple):
    """What the lanes of one actor produced, in the form that the replay stores. NumPy arrays."""

    rows: Row
    """`[rows, lanes, ...]`, with stored observations."""
    td_error: np.ndarray
    """`[rows, lanes]` float32, TD errors of the transitions that these rows complete, by the actor's own values.

    They are NaN where the actor doesn't know them. They are all NaN if the agent's head has other priorities than TD
    errors, or if the config asks for the greatest priority so far."""


class ChunkStats(NamedTuple):
    """Statistics of one chunk."""

    returns: list[float]
    """Returns of the episodes that ended."""
    lengths: list[int]
    """Lengths of the episodes that ended, in environment steps."""
    q_mean: float
    """Mean, over all rows and lanes of the chunk, of the greatest action value of the observation."""
    num_failures: int
    """Environments that failed and were replaced."""
    busy_seconds: float
    """Time that the chunk took."""
    received_bytes: int
    """Parameters received since the previous chunk."""


class _Steps(NamedTuple):
    """The steps of one chunk, before their TD errors are known. `[rows, lanes]`."""

    rows: Row
    q_taken: Any
    q_max: Any
    returns: list[float]
    lengths: list[int]
    num_failures: int


class _Lanes(Protocol):
    def take(self, params: Params, exploration: np.float32) -> _Steps:
        """Takes the steps of one chunk."""
        ...

    def close(self) -> None:
        """Ends the processes and threads that the lanes have started."""
        ...


class Actor:
    """Acts with the newest parameters that it was given."""

    def __init__(self, config: TrainConfig, number: int, built: EnvAndAgent | None = None) -> None:
        """Makes an actor that has no lanes until `begin` is called.

        Args:
          config: of the run.
          number: of the actor, from 0.
          built: environment and agent, if this process has built them already.
        """
        enable_compilation_cache()
        pool = actor_pool_of(config)
        env, _, agent = built or make_env_and_agent(config)
        self._structure = jax.tree.structure(jax.eval_shape(lambda: agent.init(jax.random.key(0))))
        if isinstance(env, InGraphEnv):
            self._make_lanes: Callable[..., _Lanes] = functools.partial(_InGraphLanes, env, agent, pool)
        else:
            options = config.topology.lane_options
            self._make_lanes = functools.partial(_HostLanes, env, agent, pool, options)
        self._numbers = (config.seed, Stream.ACTING, number)
        self._lanes: _Lanes | None = None
        n_step, discount, rescaled = config.agent.n_step, config.agent.discount, config.agent.value_rescaling

        def errors(before: ValuedRows, new: ValuedRows) -> tuple[ValuedRows, Array]:
            rows = jax.tree.map(lambda *x: jnp.concatenate(x), before, new)
            td_error = initial_td_errors(rows, n_step, discount, is_rescaled=rescaled)
            if not (pool.sends_td_errors and agent.priority_is_td_error):
                td_error = jnp.full_like(td_error, jnp.nan)
            return jax.tree.map(lambda x: x[-n_step:], rows), td_error

        self._errors = jax.jit(errors)
        self._padding_rows = padding_rows(n_step, pool.lanes_per_actor)
        self._params_version = -1
        self._params: Params = None
        self._received_bytes = 0

    def begin(self, incarnation: int) -> None:
        """Starts the first episodes of the lanes.

        Args:
          incarnation: number of actors that held this place before. Their random numbers are not used again.
        """
        self.close()
        self._lanes = self._make_lanes((*self._numbers, incarnation))
        self._before = self._padding_rows

    @property
    def version(self) -> int:
        """Version of its parameters; -1 before it has any."""
        return self._params_version

    def receive(self, version: int, leaves: list[np.ndarray]) -> None:
        """Takes the parameters to act with from now on, in the order of `jax.tree.leaves`."""
        self._params = jax.tree.unflatten(self._structure, [jnp.array(leaf) for leaf in leaves])  # copies
        self._params_version = version
        self._received_bytes += sum(leaf.nbytes for leaf in leaves)

    def collect(self, exploration: float) -> tuple[ChunkStats, Chunk]:
        """Returns the next chunk and its statistics.

        Args:
          exploration: epsilon or temperature, the same for all lanes.

        Raises:
          RunFailed: if too many environments have failed, or an environment written in JAX returned a number that isn't
            finite.
        """
        assert self._lanes is not None
        started = time.perf_counter()
        steps = self._lanes.take(self._params, np.float32(exploration))
        new = ValuedRows(steps.rows.reward, steps.rows.outcome, steps.q_taken, steps.q_max)
        self._before, td_error = self._errors(self._before, new)
        stats = ChunkStats(
            returns=steps.returns,
            lengths=steps.lengths,
            q_mean=float(np.mean(steps.q_max)),
            num_failures=steps.num_failures,
            busy_seconds=time.perf_counter() - started,
            received_bytes=self._received_bytes,
        )
        self._received_bytes = 0
        return stats, Chunk(jax.tree.map(np.asarray, steps.rows), np.asarray(td_error))

    def close(self) -> None:
        """Ends the processes and threads of its environments."""
        if self._lanes is not None:
            self._lanes.close()


class _InGraphLanes:
    """Lanes of an environment written in JAX: each chunk is one call of a program."""

    def __init__(
        self,
        env: InGraphEnv,
        agent: Agent,
        pool: ActorPool,
        numbers: tuple[int, ...],
    ) -> None:
        num_lanes, num_rows = pool.lanes_per_actor, pool.rows_per_chunk
        lane_numbers = jnp.arange(num_lanes, dtype=jnp.uint32)
        self._spec = env.spec

        def init(key: Array) -> tuple[ActorState, Array]:
            lanes_key, key = jax.random.split(key)
            return init_actor(env, agent, lanes_key, lane_numbers), key

        def take(params: Params, state: tuple[ActorState, Array], exploration: Array) -> tuple:
            actor, key = state
            next_key, env_key, explore_key = jax.random.split(key, 3)
            step_keys = draw_step_keys(env, env_key, num_rows, lane_numbers)
            uniforms = jax.random.uniform(explore_key, (num_rows, num_lanes))
            # No second use of `key`: this folds `NOISE` into it, a number that is never among those of a split.
            acting_keys = noise_keys(agent, key, num_rows, lane_numbers)

            def row(actor: ActorState, inputs: tuple) -> tuple:
                row_step_keys, uniform, row_acting_keys = inputs
                actor, new_row, stats, q = act(
                    env, agent, params, actor, row_step_keys, uniform, exploration, row_acting_keys
                )
                return actor, (new_row, stats, take_action(q, new_row.action))

            scanned: tuple[ActorState, tuple] = jax.lax.scan(row, actor, (step_keys, uniforms, acting_keys))
            return (scanned[0], next_key), scanned[1]

        self._take_jitted = jax.jit(take, donate_argnums=1)
        self._state = jax.jit(init)(key_of(*numbers))

    def take(self, params: Params, exploration: np.float32) -> _Steps:
        """Takes the steps of one chunk."""
        self._state, (rows, stats, q_taken) = self._take_jitted(params, self._state, exploration)
        stats = jax.device_get(stats)
        if np.any(stats.is_bad):
            row, lane = np.argwhere(stats.is_bad)[0]
            raise not_finite(self._spec, f"in row {row} of a chunk, in lane {lane}")
        ended = stats.episode_ended
        returns, lengths = stats.episode_return[ended].tolist(), stats.episode_steps[ended].tolist()
        return _Steps(rows, q_taken, stats.q_max, returns, lengths, 0)

    def close(self) -> None:
        """Does nothing, because the lanes are arrays of this process."""


class _HostLanes:
    """Lanes of an environment outside the program: each row is one call of a program that chooses actions."""

    def __init__(
        self,
        env: HostEnv,
        agent: Agent,
        pool: ActorPool,
        options: LaneOptions,
        numbers: tuple[int, ...],
    ) -> None:
        num_lanes, spec = pool.lanes_per_actor, env.spec
        self._shape, self._random = (pool.rows_per_chunk, num_lanes), np.random.default_rng(numbers)
        self._num_rows = 0
        self._lanes = env.make_lanes(num_lanes, options)
        self._acting = HostActing(self._lanes, int(self._random.integers(2**32)))
        stored = stored_spec(spec, agent.to_storage_layout)
        shapes = memory_shapes(agent.memory, stored, num_lanes)
        self._memory = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def choose(
            params: Params,
            memory: MemoryState,
            obs: Array,
            is_first: Array,
            uniform: Array,
            exploration: Array,
            row: Array,
        ) -> tuple:
            frame = agent.to_storage_layout(obs)
            memory = agent.memory.observe(memory, frame, is_first)
            carry, keys = memory.carry, None
            if agent.acts_with_keys:
                keys = sample_keys(key_of(*numbers, NOISE, row), jnp.arange(num_lanes, dtype=jnp.uint32))
            action, q, memory = agent.act(params, memory, exploration, uniform, keys)
            return memory, (frame, carry), action, take_action(q, action), jnp.max(q, axis=-1)

        self._stacked = jax.jit(lambda rows: jax.tree.map(lambda *column: jnp.stack(column), *rows))
        self._choose = jax.jit(choose, donate_argnums=1 if spec.frame_stack > 1 else ())

    def take(self, params: Params, exploration: np.float32) -> _Steps:
        """Takes the steps of one chunk."""
        acting = self._acting
        seen: list[tuple] = []
        received: list[ReceivedRow] = []
        for uniform in self._random.random(self._shape, np.float32):
            row = np.uint32(self._num_rows % 2**32)
            self._num_rows += 1
            self._memory, stored, action, q_taken, q_max = self._choose(
                params, self._memory, acting.obs, acting.is_first, uniform, exploration, row
            )
            seen.append((stored, action, q_taken, q_max))  # stays on the device until the end: each transfer has a cost
            acting.send(np.asarray(action))
            received.append(acting.receive())
        (obs, carry), action, q_taken, q_max = self._stacked(seen)
        steps = ReceivedRow(*(np.stack(column) for column in zip(*received, strict=True)))  # [rows, lanes]
        outcome = outcome_of(steps.terminated, steps.truncated, steps.no_step)
        rows = Row(obs, action, jnp.asarray(steps.reward, np.float32), outcome, carry=carry)
        return _Steps(rows, q_taken, q_max, steps.returns, steps.lengths, steps.num_failures)

    def close(self) -> None:
        """Ends the processes and threads of the lanes."""
        self._lanes.close()
