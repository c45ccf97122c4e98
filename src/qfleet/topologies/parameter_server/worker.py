"""A worker of `qfleet.topologies.parameter_server`: acts, and computes gradients for the server."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.config import ParameterServerConfig, TrainConfig
from qfleet.core import sharded_learner as pieces
from qfleet.core.agent import make_agent
from qfleet.core.keys import key_of
from qfleet.core.learner import LearnerState, UpdateInfo
from qfleet.core.replay import ReplayState, SavedReplay
from qfleet.core.types import Params, Transition
from qfleet.envs.registry import make_env
from qfleet.networks import make_network
from qfleet.runtime.devices import reuse_freed_memory
from qfleet.topologies.fleet.actor import Actor, Chunk, Report
from qfleet.topologies.fleet.replay_shard import ReplayShard, ShardStats, Writer, put_together
from qfleet.topologies.parameter_server.server_shard import Division
from qfleet.topologies.parameter_server.shared_memory import Place, Window

_DRAWING = 6
"""What a seed's random numbers are for; 0 to 5 are others'."""


GradientRoom = list[Place] | None
"""Where each piece of a gradient goes, in memory that is shared with the server; None to return them."""


class Lesson(NamedTuple):
    """What a worker tells of a gradient."""

    loss: float
    td_error: float
    """Mean of the absolute values."""
    busy_seconds: float
    """That it took."""


class Worker(Actor):
    """Acts, keeps what it saw or passes it on, and computes gradients with the parameters that it was given."""

    def __init__(self, config: TrainConfig, number: int, memory: str | None = None) -> None:
        """Makes a worker that is still to `begin`.

        Args:
          config: of the run.
          number: of the worker, from 0.
          memory: that it shares with the server, if it does.
        """
        super().__init__(config, number)
        reuse_freed_memory()
        self._window = Window(memory)
        topology = config.topology_as(ParameterServerConfig)
        self._store = None if topology.num_replay_shards else ReplayShard(config, number)
        env = make_env(config.env, **config.env_options)
        agent = make_agent(make_network(env.spec, config.agent), config.agent)
        division = Division(agent, config.agent, topology.num_server_shards)
        dtype = jnp.dtype(topology.gradient_dtype)

        def pieces_of(params: Params, target: Params, batch: Transition) -> tuple[list[Array], UpdateInfo]:
            state = LearnerState(params, target, (), jnp.int32(0))
            gradient, info = division.learner.gradients(state, batch)
            vector = pieces.to_vector(gradient).astype(dtype)
            return [vector[start:end] for start, end in division.bounds], info

        def learn(store: ReplayState, params: Params, target: Params, key: Array, exponent: Array) -> tuple:
            assert self._store is not None
            sample = self._store.replay.sample(store, key, exponent)
            gradient, info = pieces_of(params, target, sample.transition)
            store = self._store.replay.set_priorities(store, sample, info.td_error)
            return store, gradient, _means(info)

        def learn_from(params: Params, target: Params, batch: Transition) -> tuple:
            gradient, info = pieces_of(params, target, batch)
            return gradient, _means(info), info.td_error

        self._learn = jax.jit(learn, donate_argnums=0)
        self._learn_from = jax.jit(learn_from)
        self._params_of = jax.jit(division.params_of)
        self._key_of = jax.jit(key_of)
        self._num_shards, self._seed, self._number = division.num_shards, config.seed, number
        self._target: Params = None

    def begin(self, incarnation: int) -> None:
        """Starts the lanes' first episodes.

        Args:
          incarnation: how many had its place before; their random numbers are not used again.
        """
        super().begin(incarnation)
        self._writer, self._num_gradients = Writer(incarnation, 0), 0

    def pull(self, version: int, handed: tuple[np.ndarray | Place, ...]) -> None:
        """Takes parameters to act and learn with from now on.

        Args:
          version: of them.
          handed: all shards' pieces, `[piece]` float32 each, then those of the target network if that is another.
        """
        if not handed:
            return
        vectors = tuple(map(self._window.get, handed))
        self._params = self._params_of(vectors[: self._num_shards])
        if len(vectors) > self._num_shards:
            self._target = self._params_of(vectors[self._num_shards :])
        jax.block_until_ready((self._params, self._target))  # after which others may write where the vectors are
        self._version = version
        self._received_bytes += sum(vector.nbytes for vector in vectors)

    def act(self, exploration: float) -> tuple[Report, ShardStats | None, Chunk | None]:
        """Takes the steps of one chunk.

        Returns:
          What it tells; what its replay holds then, or the chunk, where the replay is shared.
        """
        report, chunk = self.collect(exploration)
        if self._store is None:
            return report, None, chunk
        stock, _ = self._store.insert(0, self._writer, chunk)
        self._writer = self._writer._replace(num_chunks=self._writer.num_chunks + 1)
        return report, stock, None

    def gradient(self, importance_exponent: float, room: GradientRoom = None) -> tuple[Any, ...]:
        """Returns a lesson and each shard's piece of a gradient, `[piece]`, on a batch of its own replay.

        Args:
          importance_exponent: of the draw.
          room: where the pieces go instead.
        """
        assert self._store is not None
        started = time.perf_counter()
        numbers = (self._seed, _DRAWING, self._number, self._writer.incarnation, self._num_gradients % 2**32)
        self._num_gradients += 1
        key = self._key_of(*map(np.uint32, numbers))
        self._store.state, gradient, means = self._learn(
            self._store.state, self._params, self._target, key, np.float32(importance_exponent)
        )
        pieces = self._handed_out(gradient, room)
        return self._lesson(started, means), *pieces

    def gradient_of(self, places: list[np.ndarray], parts: tuple[Transition, ...], room: GradientRoom = None) -> tuple:
        """Returns a lesson, each shard's piece of a gradient, and each part's TD errors, of a batch that others drew.

        Args:
          places: for each part, where its transitions go in the batch, `[num_draws]`.
          parts: transitions, `[num_draws, ...]`, NumPy arrays.
          room: where the pieces go instead.
        """
        started = time.perf_counter()
        gradient, means, td_error = self._learn_from(self._params, self._target, put_together(places, parts))
        td_error, pieces = np.asarray(td_error), self._handed_out(gradient, room)
        return self._lesson(started, means), *pieces, *(td_error[place] for place in places)

    def _handed_out(self, gradient: Sequence[Any], room: GradientRoom) -> list[np.ndarray]:
        """Puts the pieces where there is room for them, or returns them."""
        pieces = [np.asarray(piece) for piece in gradient]
        if room is None:
            return pieces
        for piece, place in zip(pieces, room, strict=True):
            self._window.put(piece, place)
        return []

    def _lesson(self, started: float, means: Array) -> Lesson:
        loss, td_error = np.asarray(means)
        return Lesson(float(loss), float(td_error), time.perf_counter() - started)

    def snapshot(self) -> SavedReplay:
        """Returns what its replay holds."""
        assert self._store is not None
        return self._store.snapshot()

    def restore(self, saved: SavedReplay) -> ShardStats:
        """Has its replay go on from a snapshot, and returns what it holds then."""
        assert self._store is not None
        return self._store.restore(saved)


def _means(info: UpdateInfo) -> Array:
    """Returns loss and mean absolute TD error, `[2]`: each transfer has its price."""
    return jnp.stack([info.loss, jnp.mean(jnp.abs(info.td_error))])
