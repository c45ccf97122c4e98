"""How vectors travel between workers and the server: the director's side.

Within one machine they travel through a `SharedRegion`, and elsewhere through Ray's object store. The director leases
the buffers, and passes on handles of vectors. It never touches their numbers.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from qfleet.config import ParameterServerConfig
from qfleet.core.sharded_learner import ShardedLearner
from qfleet.topologies.fleet.rate_limiter import CHUNKS_AHEAD
from qfleet.topologies.parameter_server.shared_memory import Buffer, Lease, ParameterBuffers, SharedRegion, can_share


class VectorHandle(NamedTuple):
    """A vector in pieces, one for each shard of the server: parameters or a gradient.

    The vector may not exist yet. Parameters are passed on as soon as the server has been *sent* the steps that will
    make them: their references stand for what these steps will return, and Ray starts no call before all of its
    references are there. A worker can thus be asked to use parameters that are still being computed, and neither the
    worker nor the server waits for this process in between.

    Whoever holds a handle keeps the vector: Ray frees an object once no reference to it is left, and a buffer is
    leased again once its `Lease` is gone.
    """

    pieces: tuple[Any, ...]
    """For each shard, a reference to its piece, or the `Buffer` that holds it."""
    lease: Lease | None
    """Lease of the buffers; None if the pieces are references."""
    ready_after: tuple[Any, ...]
    """References. Once all of them are there, the vector is."""


def references_of(handles: Sequence[VectorHandle]) -> tuple[Any, ...]:
    """Returns each reference that these vectors depend on, once."""
    return tuple(dict.fromkeys(reference for handle in handles for reference in handle.ready_after))


class Transport:
    """Leases buffers in shared memory, and returns None where there are none: then Ray carries the vector.

    For the director's thread.
    """

    def __init__(self, config: ParameterServerConfig, learner: ShardedLearner) -> None:
        """Has no memory until `open_region` is called."""
        self._config, self._learner = config, learner
        self._region: SharedRegion | None = None

    def open_region(self, stack: contextlib.ExitStack) -> str | None:
        """Reserves memory that processes on this machine can map, until the stack ends; returns its path, or None."""
        config = self._config
        if not can_share():
            return None
        # Each worker can hold different parameters for every chunk that it was asked for and for its gradient, and can
        # have two gradients on their way. In addition there are the newest parameters, the target network, and the
        # gradients of the step that is being taken.
        num_vectors = (CHUNKS_AHEAD + 3) * config.num_workers + config.gradients_per_learner_step + 4
        self._region = SharedRegion(num_vectors, [end - start for start, end in self._learner.piece_bounds])
        stack.callback(self._region.close)
        return self._region.path

    def lease(self) -> Lease | None:
        """Leases the buffers of one vector."""
        return self._region.lease() if self._region else None

    def gradient_buffers(self, lease: Lease | None) -> list[Buffer] | None:
        """Returns where a worker writes each piece of a gradient."""
        return self._region.buffers(lease, self._config.gradient_dtype) if self._region and lease else None

    def parameter_buffers(self, leases: Sequence[Lease | None]) -> list[ParameterBuffers | None]:
        """Returns where each shard of the server writes its pieces; None for all if any of the leases is missing.

        Args:
          leases: one for the parameters, and another if the target network changes too.
        """
        if self._region is None or None in leases:
            return [None] * self._config.num_server_shards
        params, *others = [self._region.buffers(lease, "float32") for lease in leases if lease]
        target_params = others[0] if others else [None] * len(params)
        return [ParameterBuffers(*each) for each in zip(params, target_params, strict=True)]


def published_vectors(
    replies: Sequence[Sequence[Any]], buffers: Sequence[ParameterBuffers | None], leases: Sequence[Lease | None]
) -> tuple[VectorHandle, VectorHandle | None]:
    """Returns handles of the parameters that the server will have published, and of the target network if it changes.

    Args:
      replies: for each shard, references to what it will return: the time that it took and, unless it writes to
        buffers, its pieces of the parameters and of the target network.
      buffers: buffers of each shard.
      leases: leases of these buffers: one for the parameters, and another if the target network changes too.
    """
    seconds, *returned = (tuple(column) for column in zip(*replies, strict=True))
    if returned:
        params, target_params = (VectorHandle(references, None, references) for references in returned)
        return params, target_params if len(leases) > 1 else None
    # The vectors lie in buffers. They are there once every shard has returned the time that it took.
    written = [each for each in buffers if each is not None]
    params = VectorHandle(tuple(each.params for each in written), leases[0], seconds)
    if len(leases) == 1:
        return params, None
    return params, VectorHandle(tuple(each.target_params for each in written), leases[1], seconds)
