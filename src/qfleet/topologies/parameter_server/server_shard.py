"""A shard of the server of `qfleet.topologies.parameter_server`: some of the parameters, and all that moves them."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.config import AgentConfig, ConfigError, ParameterServerConfig, TrainConfig
from qfleet.core import sharded_learner as pieces
from qfleet.core.agent import Agent, make_agent
from qfleet.core.learner import ELEMENTWISE, LearnerState, init_from_seed, make_learner
from qfleet.core.types import Params
from qfleet.envs.registry import make_env
from qfleet.networks import make_network
from qfleet.runtime.cache import enable_compilation_cache
from qfleet.runtime.devices import reuse_freed_memory
from qfleet.topologies.parameter_server.shared_memory import Place, Window

Leaves = list[np.ndarray]
"""Of a `LearnerState`, in the order of `jax.tree.leaves`."""


class HandedOut(NamedTuple):
    """What a shard hands out after some steps."""

    seconds: float
    """That they took."""
    params: np.ndarray
    """`[piece]` float32."""
    target_params: np.ndarray | None
    """The same of the target network, if that is another one than before them."""


class Room(NamedTuple):
    """Where a shard puts what it hands out, in memory that it shares with the workers."""

    params: Place
    target_params: Place | None
    """None if the target network stays the same."""


class TargetClock:
    """Counts when `Learner.apply` moves the target network, for who doesn't see it."""

    def __init__(self, period: int) -> None:
        """Begins with a target network that is new; `period` is in learner steps."""
        self._period = period
        self.age = 0
        """Learner steps of the target network; set it to that of a state from elsewhere."""

    def tick(self, num_steps: int = 1) -> bool:
        """Counts learner steps, and returns whether one of them moves the target network."""
        moves, self.age = divmod(self.age + num_steps, self._period)
        return moves > 0


class Division:
    """How one learner is divided over the shards of a server."""

    def __init__(self, agent: Agent, config: AgentConfig, num_shards: int) -> None:
        """Divides the learner of `agent`.

        Raises:
          ConfigError: if its optimiser must see all of the network at once.
        """
        if num_shards > 1 and config.optimiser not in ELEMENTWISE:
            raise ConfigError(
                f"num_server_shards must be 1 with an optimiser that looks at more than one parameter at once, got "
                f"num_server_shards={num_shards} and optimiser={config.optimiser}; choose one of "
                f"{', '.join(ELEMENTWISE)}"
            )
        self._agent, self.num_shards = agent, num_shards
        # The server clips by the norm over all shards before any of them applies its piece.
        self.learner = make_learner(agent, dataclasses.replace(config, max_gradient_norm=None))
        self.whole: LearnerState = jax.eval_shape(self.init_whole, np.uint32(0))
        """Shapes of the learner."""
        self.num_params = pieces.num_params(self.whole.params)
        self.bounds = pieces.bounds(self.num_params, num_shards)
        """Where each piece of the vector of parameters begins and ends."""

    def init_whole(self, seed: Array) -> LearnerState:
        """Returns the learner that a seed begins with, in any topology."""
        return init_from_seed(self.learner, self._agent, seed)

    def init(self, seed: Array, number: int) -> LearnerState:
        """Returns what one shard has of it; a shard alone keeps the network as it is, and not as a vector."""
        whole = self.init_whole(seed)
        if self.num_shards == 1:
            return whole
        start, end = self.bounds[number]
        return self.learner.init(pieces.to_vector(whole.params)[start:end])

    @functools.cached_property
    def _shapes(self) -> list[LearnerState]:
        return [jax.eval_shape(functools.partial(self.init, number=i), np.uint32(0)) for i in range(self.num_shards)]

    def split(self, whole: LearnerState) -> list[Leaves]:
        """Returns what each shard keeps of a learner of NumPy arrays."""
        if self.num_shards == 1:
            return [[np.asarray(leaf) for leaf in jax.tree.leaves(whole)]]
        return [jax.tree.leaves(pieces.split(whole, like, i, self.num_shards)) for i, like in enumerate(self._shapes)]

    def join(self, leaves: list[Leaves]) -> LearnerState:
        """Returns the learner of which the shards keep these."""
        if self.num_shards == 1:
            return self.structured(leaves[0], 0)
        return pieces.join([self.structured(own, i) for i, own in enumerate(leaves)], self.whole)

    def structured(self, leaves: Leaves, number: int) -> LearnerState:
        """Returns one shard's state from its leaves."""
        state: LearnerState = jax.tree.unflatten(jax.tree.structure(self._shapes[number]), leaves)
        return state

    def params_of(self, vectors: Sequence[np.ndarray]) -> Params:
        """Returns the parameters of which the shards have these pieces, `[piece]` float32 each."""
        return pieces.to_tree(jnp.concatenate(vectors), self.whole.params)


class ServerShard:
    """Applies gradients to its piece of the parameters, and hands it out."""

    def __init__(self, config: TrainConfig, number: int, memory: str | None = None) -> None:
        """Begins with the parameters that the run's seed says.

        Args:
          config: of the run.
          number: of the shard, from 0.
          memory: that it shares with the workers, if it does.
        """
        topology = config.topology_as(ParameterServerConfig)
        enable_compilation_cache()
        reuse_freed_memory()
        env = make_env(config.env, **config.env_options)
        agent = make_agent(make_network(env.spec, config.agent), config.agent)
        self._division = division = Division(agent, config.agent, topology.num_server_shards)
        self._number, self._num_gradients = number, topology.gradients_per_learner_step
        most = config.agent.max_gradient_norm

        def mean(gradients: tuple[Array, ...]) -> Array:
            return jnp.mean(jnp.stack([gradient.astype(jnp.float32) for gradient in gradients]), axis=0)

        def apply(state: LearnerState, gradient: Array, squares: Array) -> LearnerState:
            if most is not None:  # as optax.clip_by_global_norm, of the whole gradient
                norm = jnp.sqrt(squares)
                gradient = jnp.where(norm < most, gradient, gradient / norm * most)
            is_whole = division.num_shards == 1
            return division.learner.apply(state, pieces.to_tree(gradient, state.params) if is_whole else gradient)

        def step(state: LearnerState, gradients: tuple[Array, ...]) -> LearnerState:
            gradient = mean(gradients)
            return apply(state, gradient, jnp.sum(jnp.square(gradient)))

        def add_up(gradients: tuple[Array, ...]) -> tuple[Array, Array]:
            gradient = mean(gradients)
            return gradient, jnp.sum(jnp.square(gradient))

        self._step = jax.jit(step, donate_argnums=0)
        self._add_up = jax.jit(add_up)
        self._apply = jax.jit(apply, donate_argnums=0)
        self._window = Window(memory)
        self._vector = jax.jit(pieces.to_vector)
        self._init = jax.jit(functools.partial(division.init, number=number))
        self._seed = np.uint32(config.seed)
        self._state: LearnerState = self._init(self._seed)
        self._clock = TargetClock(config.agent.target_update_period)

    def reset(self) -> None:
        """Begins anew."""
        self._take(self._init(self._seed))

    def step(self, room: Room | None, *gradients: np.ndarray | Place) -> HandedOut | float:
        """Takes steps where no other shard must know the gradient's norm.

        Args:
          room: where what is handed out goes; None to return it.
          *gradients: `[piece]` each, all of the first step, then all of the next.

        Returns:
          What is handed out, or only the seconds that it took if that has its room.
        """
        started = time.perf_counter()
        for some in self._by_step(gradients):
            self._state = self._step(self._state, some)
        return self._handed_out(started, room, len(gradients) // self._num_gradients)

    def add_up(self, *gradients: np.ndarray | Place) -> tuple[float, list[float]]:
        """Keeps the mean of each step's gradients, as `step` has them, until `apply`.

        Returns:
          The seconds that it took, and each step's sum of squares.
        """
        started = time.perf_counter()
        self._means, squares = zip(*map(self._add_up, self._by_step(gradients)), strict=True)
        sums = [float(each) for each in squares]
        return time.perf_counter() - started, sums

    def apply(self, room: Room | None, *squares: list[float]) -> HandedOut | float:
        """Takes steps with what was added up, clipped by the norm of the whole; `squares` are all shards' sums.

        Returns:
          As `step`.
        """
        started = time.perf_counter()
        for mean, sums in zip(self._means, zip(*squares, strict=True), strict=True):
            self._state = self._apply(self._state, mean, np.float32(sum(sums)))
        return self._handed_out(started, room, len(self._means))

    def _by_step(self, gradients: tuple[np.ndarray | Place, ...]) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields the gradients of each step."""
        vectors = iter(map(self._window.get, gradients))
        while some := tuple(itertools.islice(vectors, self._num_gradients)):
            yield some

    def params(self) -> HandedOut:
        """Hands out the parameters and those of the target network."""
        return HandedOut(0.0, self._copy(self._state.params), self._copy(self._state.target_params))

    def _handed_out(self, started: float, room: Room | None, num_steps: int) -> HandedOut | float:
        params, target = self._state.params, self._state.target_params if self._clock.tick(num_steps) else None
        if room is None:
            copies = self._copy(params), None if target is None else self._copy(target)
            return HandedOut(time.perf_counter() - started, *copies)
        self._window.put(self._as_vector(params), room.params)
        if room.target_params is not None:
            self._window.put(self._as_vector(target), room.target_params)
        return time.perf_counter() - started

    def _copy(self, params: Params) -> np.ndarray:
        return self._as_vector(params).copy()  # for the next step is taken in place

    def _as_vector(self, params: Params) -> np.ndarray:
        return np.asarray(params if self._division.num_shards > 1 else self._vector(params))

    def state(self) -> tuple[float, Leaves]:
        """Returns the seconds that it took, and all that it must keep."""
        started = time.perf_counter()
        leaves = [np.array(leaf) for leaf in jax.device_get(jax.tree.leaves(self._state))]
        return time.perf_counter() - started, leaves

    def restore(self, leaves: Leaves) -> None:
        """Goes on from what `state` returned."""
        self._take(jax.tree.map(jnp.array, self._division.structured(leaves, self._number)))

    def _take(self, state: LearnerState) -> None:
        self._state, self._clock.age = state, int(state.target_age)
