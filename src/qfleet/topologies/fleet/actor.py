"""An actor that works on its own: lanes, a copy of the parameters, and the last n steps."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.config import ActorPool, RayTopologyConfig, RunFailed, TrainConfig
from qfleet.core.agent import Agent, make_agent
from qfleet.core.frame_stack import push_frame
from qfleet.core.initial_priorities import ValuedRows, initial_td_errors, padding_rows
from qfleet.core.keys import key_of
from qfleet.core.replay import Row, outcome_of
from qfleet.core.targets import take_action
from qfleet.core.types import Params, stored_spec
from qfleet.envs.host import HostEnv, LaneOptions
from qfleet.envs.in_graph import draw
from qfleet.envs.registry import make_env
from qfleet.envs.spec import InGraphEnv
from qfleet.networks import make_network
from qfleet.runtime.cache import enable_compilation_cache
from qfleet.topologies.acting import ActorState, Episodes, act, init_actor

_ACTING = 2
"""What a seed's random numbers are for; 0 and 1 are a learner's and evaluation's."""


class Chunk(NamedTuple):
    """What one actor's lanes produced, as it goes to the replay. NumPy arrays."""

    rows: Row
    """`[rows, lanes, ...]`, with stored observations."""
    td_error: np.ndarray
    """`[rows, lanes]` float32, of the transitions that these rows complete, by the actor's own values; NaN where it
    doesn't know them."""


class Report(NamedTuple):
    """What an actor tells of a chunk."""

    returns: list[float]
    """Of the episodes that ended."""
    lengths: list[int]
    q_mean: float
    """Greatest value of the observations acted on, mean."""
    num_failures: int
    """Environments that were replaced."""
    busy_seconds: float
    """That it took."""
    received_bytes: int
    """Of parameters, since the one before."""


class _Steps(NamedTuple):
    """A chunk before it is put together. `[rows, lanes]`."""

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
        """Ends what they started."""
        ...


class Actor:
    """Acts with the newest parameters that it was given."""

    def __init__(self, config: TrainConfig, number: int) -> None:
        """Makes an actor that is still to `begin`.

        Args:
          config: of the run.
          number: of the actor, from 0.
        """
        enable_compilation_cache()
        pool = config.topology_as(RayTopologyConfig).actor_pool
        env = make_env(config.env, **config.env_options)
        network = make_network(env.spec, config.agent)
        agent = make_agent(network, config.agent)
        self._structure = jax.tree.structure(jax.eval_shape(lambda: agent.init(jax.random.key(0))))
        if isinstance(env, InGraphEnv):
            self._make_lanes: Callable[..., _Lanes] = functools.partial(_InGraphLanes, env, agent, pool)
        else:
            options = config.topology.lane_options
            self._make_lanes = functools.partial(_HostLanes, env, agent, pool, options)
        self._numbers = (config.seed, _ACTING, number)
        self._lanes: _Lanes | None = None
        n_step, discount = config.agent.n_step, config.agent.discount

        def errors(before: ValuedRows, new: ValuedRows) -> tuple[ValuedRows, Array]:
            rows = jax.tree.map(lambda *x: jnp.concatenate(x), before, new)
            return jax.tree.map(lambda x: x[-n_step:], rows), initial_td_errors(rows, n_step, discount)

        self._errors = jax.jit(errors)
        self._padding_rows = padding_rows(n_step, pool.lanes_per_actor)
        self._version = -1
        self._params: Params = None
        self._received_bytes = 0

    def begin(self, incarnation: int) -> None:
        """Starts the lanes' first episodes.

        Args:
          incarnation: how many had its place before; their random numbers are not used again.
        """
        self.close()
        self._lanes = self._make_lanes((*self._numbers, incarnation))
        self._before = self._padding_rows

    @property
    def version(self) -> int:
        """Of its parameters; -1 before there are any."""
        return self._version

    def receive(self, version: int, leaves: list[np.ndarray]) -> None:
        """Takes the parameters to act with from now on, in the order of `jax.tree.leaves`."""
        self._params = jax.tree.unflatten(self._structure, [jnp.asarray(leaf) for leaf in leaves])
        self._version = version
        self._received_bytes += sum(leaf.nbytes for leaf in leaves)

    def collect(self, exploration: float) -> tuple[Report, Chunk]:
        """Returns the next chunk.

        Args:
          exploration: epsilon or temperature, of all lanes.

        Raises:
          RunFailed: if too many environments have failed, or one written in JAX returned a number that isn't finite.
        """
        assert self._lanes is not None
        started = time.perf_counter()
        steps = self._lanes.take(self._params, np.float32(exploration))
        new = ValuedRows(steps.rows.reward, steps.rows.outcome, steps.q_taken, steps.q_max)
        self._before, td_error = self._errors(self._before, new)
        report = Report(
            returns=steps.returns,
            lengths=steps.lengths,
            q_mean=float(np.mean(steps.q_max)),
            num_failures=steps.num_failures,
            busy_seconds=time.perf_counter() - started,
            received_bytes=self._received_bytes,
        )
        self._received_bytes = 0
        return report, Chunk(jax.tree.map(np.asarray, steps.rows), np.asarray(td_error))

    def close(self) -> None:
        """Ends the processes and threads of its environments."""
        if self._lanes is not None:
            self._lanes.close()


class _InGraphLanes:
    """Lanes of an environment written in JAX: a chunk is one program."""

    def __init__(
        self,
        env: InGraphEnv,
        agent: Agent,
        pool: ActorPool,
        numbers: tuple[int, ...],
    ) -> None:
        num_lanes, num_rows = pool.lanes_per_actor, pool.rows_per_chunk
        lane_numbers = jnp.arange(num_lanes, dtype=jnp.uint32)
        self._name = env.spec.name

        def init(key: Array) -> tuple[ActorState, Array]:
            lanes_key, key = jax.random.split(key)
            return init_actor(env, agent, lanes_key, lane_numbers), key

        def take(params: Params, state: tuple[ActorState, Array], exploration: Array) -> tuple:
            actor, key = state
            key, env_key, explore_key = jax.random.split(key, 3)
            draws = draw(env, env_key, num_rows, lane_numbers)
            uniforms = jax.random.uniform(explore_key, (num_rows, num_lanes))

            def row(actor: ActorState, inputs: tuple) -> tuple:
                draws, uniform = inputs
                actor, new_row, report, q = act(env, agent, params, actor, draws, uniform, exploration)
                return actor, (new_row, report, take_action(q, new_row.action))

            scanned: tuple[ActorState, tuple] = jax.lax.scan(row, actor, (draws, uniforms))
            return (scanned[0], key), scanned[1]

        self._take = jax.jit(take, donate_argnums=1)
        self._state = jax.jit(init)(key_of(*numbers))

    def take(self, params: Params, exploration: np.float32) -> _Steps:
        """Takes the steps of one chunk."""
        self._state, (rows, reports, q_taken) = self._take(params, self._state, exploration)
        reports = jax.device_get(reports)
        if np.any(reports.is_bad):
            row, lane = np.argwhere(reports.is_bad)[0]
            raise RunFailed(
                f"rewards and observations must be finite, but {self._name} returned one that isn't in row {row} of a "
                f"chunk, in lane {lane}"
            )
        ended = reports.episode_ended
        returns, lengths = reports.episode_return[ended].tolist(), reports.episode_steps[ended].tolist()
        return _Steps(rows, q_taken, reports.q_max, returns, lengths, 0)

    def close(self) -> None:
        """Ends nothing: it is all in one program."""


class _HostLanes:
    """Lanes of an environment outside the program, which only acts."""

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
        self._lanes = env.make_lanes(num_lanes, options)
        self._obs = self._lanes.reset(int(self._random.integers(2**32)))
        stored = stored_spec(spec, agent.to_storage_layout)
        self._view = jnp.zeros((num_lanes, *stored.agent_observation_shape), stored.observation_dtype)
        self._is_first, self._is_final = np.ones(num_lanes, bool), np.zeros(num_lanes, bool)
        self._episodes = Episodes(num_lanes)

        def choose(
            params: Params, view: Array, obs: Array, is_first: Array, uniform: Array, exploration: Array
        ) -> tuple:
            frame = agent.to_storage_layout(obs)
            view = push_frame(view, frame, is_first, spec.frame_stack)
            q = agent.q_values(params, view)
            action = agent.explore(q, exploration, uniform)
            return view, frame, action, take_action(q, action), jnp.max(q, axis=-1)

        self._stacked = jax.jit(lambda rows: tuple(jnp.stack(column) for column in zip(*rows, strict=True)))
        self._choose = jax.jit(choose, donate_argnums=1 if spec.frame_stack > 1 else ())

    def take(self, params: Params, exploration: np.float32) -> _Steps:
        """Takes the steps of one chunk."""
        seen: list[tuple] = []
        columns: list[tuple] = []
        returns: list[float] = []
        lengths: list[int] = []
        num_failures = 0
        for uniform in self._random.random(self._shape, np.float32):
            self._view, frame, action, q_taken, q_max = self._choose(
                params, self._view, self._obs, self._is_first, uniform, exploration
            )
            seen.append((frame, action, q_taken, q_max))  # fetched at the end: each transfer has its price
            self._lanes.send(np.asarray(action))
            step = self._lanes.recv()
            no_step = self._is_final | step.failed
            columns.append((step.reward, step.terminated, step.truncated, no_step))
            self._obs = step.observation
            self._is_first, self._is_final = no_step, (step.terminated | step.truncated) & ~no_step
            ended = self._episodes.add(step.reward, no_step, self._is_final)
            returns += ended[0]
            lengths += ended[1]
            num_failures += int(np.sum(step.failed))
        reward, *ends = (np.stack(column) for column in zip(*columns, strict=True))
        obs, action, q_taken, q_max = self._stacked(seen)
        rows = Row(obs, action, jnp.asarray(reward, np.float32), outcome_of(*ends))
        return _Steps(rows, q_taken, q_max, returns, lengths, num_failures)

    def close(self) -> None:
        """Ends their processes and threads."""
        self._lanes.close()
