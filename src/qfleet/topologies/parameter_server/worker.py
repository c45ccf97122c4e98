"""A worker: it acts in environments, and computes gradients for the parameter server."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.config import ParameterServerConfig, TrainConfig
from qfleet.core.keys import Stream, key_of
from qfleet.core.learner import UpdateInfo
from qfleet.core.replay import ReplayState, SavedReplay, normalise_weights
from qfleet.core.sharded_learner import ShardedLearner
from qfleet.core.types import Params, Transition
from qfleet.runtime.workarounds.glibc_malloc import reuse_freed_memory
from qfleet.topologies.fleet.actor import Actor, Chunk, ChunkStats
from qfleet.topologies.fleet.env_and_agent import make_env_and_agent
from qfleet.topologies.fleet.replay_shard import ReplayShard, ShardStats, Writer
from qfleet.topologies.fleet.replay_shares import put_together


class GradientStats(NamedTuple):
    """The losses of a gradient."""

    loss: float
    td_error: float
    """Mean of the absolute values."""
    unweighted_loss: float
    """The loss without importance weights, which says how unusual the batch is. Weights shrink as beta grows."""
    busy_seconds: float
    """Time that the gradient took."""


class ActReply(NamedTuple):
    """A worker's reply when it has acted for one chunk."""

    chunk_stats: ChunkStats
    shard_stats: ShardStats | None
    """Contents of the worker's own replay, which stores the chunk; None if the workers share one."""
    chunk: Chunk | None
    """The chunk, if the workers share a replay."""


class GradientReply(NamedTuple):
    """A worker's reply when it has computed a gradient."""

    result: GradientStats
    pieces: list[np.ndarray]
    """Each server shard's piece, `[piece]`."""
    priorities: list[np.ndarray]
    """For each share of the batch, the priorities of its transitions, `[num_draws]`; empty for a batch of the worker's
    own replay, whose priorities are set already."""


class Worker(Actor):
    """Acts, stores what it saw or passes it on, and computes gradients with the parameters that it pulled last."""

    def __init__(self, config: TrainConfig, number: int) -> None:
        """Makes a worker; call `begin` before anything else.

        Args:
          config: config of the run.
          number: number of the worker, from 0.
        """
        topology, built = config.topology_as(ParameterServerConfig), make_env_and_agent(config)
        super().__init__(config, number, built)
        reuse_freed_memory()
        self._own_replay = None if topology.num_replay_shards else ReplayShard(config, number, built.stored_spec)
        self._agent_config = config.agent
        self._learner = ShardedLearner(built.agent, config.agent, topology.num_server_shards)
        self._gradient_dtype = jnp.dtype(topology.gradient_dtype)
        # The replay is donated: its priorities are set in place.
        self._gradient_of_own_replay = jax.jit(self._sample_and_differentiate, donate_argnums=0)
        self._gradient_of_batch = jax.jit(self._differentiate)
        self._assemble_params = jax.jit(self._learner.assemble_params)
        self._seed, self._number = config.seed, number
        self._writer, self._num_gradients = Writer(0, 0), 0
        self._target_params: Params = None

    def begin(self, incarnation: int) -> None:
        """Starts the first episodes of the lanes.

        Args:
          incarnation: number of workers that had this place before; their random numbers are not used again.
        """
        super().begin(incarnation)
        self._writer, self._num_gradients = Writer(incarnation, 0), 0

    def pull(self, version: int, params: Sequence[np.ndarray], target_params: Sequence[np.ndarray] = ()) -> None:
        """Takes the parameters with which to act and learn from now on.

        Args:
          version: version of the parameters.
          params: the pieces of all shards, `[piece]` float32 each; empty if the worker has this version already.
          target_params: the same of the target network; empty if the worker has that already.
        """
        if not params:
            return
        self._params = self._assemble_params(list(params))
        if target_params:
            self._target_params = self._assemble_params(list(target_params))
        # The pieces may lie in memory that is used again once this worker has replied. The copies must therefore be
        # complete before this method returns.
        jax.block_until_ready((self._params, self._target_params))
        self._params_version = version
        self._received_bytes += sum(piece.nbytes for piece in (*params, *target_params))

    def act(self, exploration: float) -> ActReply:
        """Takes the steps of one chunk, and stores it if the worker has a replay of its own."""
        chunk_stats, chunk = self.collect(exploration)
        if self._own_replay is None:
            return ActReply(chunk_stats, None, chunk)
        shard_stats, _ = self._own_replay.insert(0, self._writer, chunk)
        self._writer = self._writer._replace(num_chunks=self._writer.num_chunks + 1)
        return ActReply(chunk_stats, shard_stats, None)

    # --- Gradients ---

    def compute_gradient(self, importance_exponent: float) -> GradientReply:
        """Computes the gradient of a batch from the worker's own replay, and sets the priorities of that batch.

        Args:
          importance_exponent: exponent of the importance weights.
        """
        assert self._own_replay is not None
        started = time.perf_counter()
        self._own_replay.state, pieces, losses = self._gradient_of_own_replay(
            self._own_replay.state,
            self._params,
            self._target_params,
            self._next_gradient_path(),
            np.float32(importance_exponent),
        )
        arrays = [np.asarray(piece) for piece in pieces]
        return GradientReply(_gradient_stats(started, losses), arrays, [])

    def compute_gradient_of(self, places: Sequence[np.ndarray], shares: Sequence[Transition]) -> GradientReply:
        """Computes the gradient of a batch that the shards of a shared replay have drawn.

        Args:
          places: for each share of the batch, the places of its transitions in the batch, `[num_draws]`.
          shares: the transitions of each share, `[num_draws, ...]`, NumPy arrays.
        """
        started = time.perf_counter()
        batch = put_together(list(places), tuple(shares))
        pieces, losses, priority = self._gradient_of_batch(
            self._params, self._target_params, batch, self._next_gradient_path()
        )
        priority, arrays = np.asarray(priority), [np.asarray(piece) for piece in pieces]
        return GradientReply(_gradient_stats(started, losses), arrays, [priority[place] for place in places])

    def _next_gradient_path(self) -> np.ndarray:
        """Returns the numbers from which the keys of the next gradient follow, `[4]` uint32; no two are the same."""
        path = (self._seed, self._number, self._writer.incarnation, self._num_gradients % 2**32)
        self._num_gradients += 1
        return np.array(path, np.uint32)

    def _sample_and_differentiate(
        self,
        state: ReplayState,
        params: Params,
        target_params: Params,
        path: Array,
        importance_exponent: Array,
    ) -> tuple[ReplayState, list[Array], Array]:
        """Returns the replay with new priorities, the pieces of a gradient, and its losses, `[3]`. To be compiled."""
        assert self._own_replay is not None
        sample = self._own_replay.replay.sample(
            state, _key_of_gradient(Stream.WORKER_BATCHES, path), importance_exponent
        )
        pieces, info = self._learner.gradients(
            params, target_params, sample.transition, _key_of_gradient(Stream.LEARNING, path), self._gradient_dtype
        )
        state = self._own_replay.replay.set_priorities(state, sample, info.priority)
        return state, pieces, self._losses(info)

    def _differentiate(
        self, params: Params, target_params: Params, batch: Transition, path: Array
    ) -> tuple[list[Array], Array, Array]:
        """Returns the pieces of a gradient, its losses, `[3]`, and its priorities, `[batch]`. To be compiled."""
        batch = normalise_weights(batch, self._agent_config)
        key = _key_of_gradient(Stream.LEARNING, path)
        pieces, info = self._learner.gradients(params, target_params, batch, key, self._gradient_dtype)
        return pieces, self._losses(info), info.priority

    def _losses(self, info: UpdateInfo) -> Array:
        """Returns the losses of `GradientStats` as one array, `[3]`: every transfer from the device costs time."""
        return jnp.stack([info.loss, jnp.mean(jnp.abs(info.td_error)), jnp.mean(info.sample_loss)])

    # --- The worker's own replay ---

    def snapshot(self) -> SavedReplay:
        """Returns the contents of the worker's own replay."""
        assert self._own_replay is not None
        return self._own_replay.snapshot()

    def restore(self, saved: SavedReplay) -> ShardStats:
        """Continues with the replay of a snapshot, and returns what it contains."""
        assert self._own_replay is not None
        return self._own_replay.restore(saved)


def _key_of_gradient(stream: Stream, path: Array) -> Array:
    """Returns a key of the gradient with this path. To be compiled into another program."""
    seed, *numbers = path
    return key_of(seed, stream, *numbers)


def _gradient_stats(started: float, losses: Array) -> GradientStats:
    loss, td_error, unweighted_loss = np.asarray(losses)
    return GradientStats(float(loss), float(td_error), float(unweighted_loss), time.perf_counter() - started)
