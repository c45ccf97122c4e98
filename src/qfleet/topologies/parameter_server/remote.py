"""The processes of the parameter server on Ray, and the calls that the director makes to them.

Each call is a function here, and it stands next to the class whose method it calls in the other process: `submit_act`
calls `RemoteWorker.act_on`, for example. The arguments of a call are one record with named fields, whose arrays are
references or buffers. `pack` takes the references out of a record before Ray sends it, and `unpack` puts the values in.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import ray

from qfleet.core.sharded_learner import StateLeaves
from qfleet.topologies.fleet.actor import Chunk, ChunkStats
from qfleet.topologies.fleet.replay_shard import ReplayShard, ShardStats
from qfleet.topologies.fleet.supervisor import InRemoteProcess, RemoteProcess, Supervisor
from qfleet.topologies.parameter_server.server_shard import PublishedParameters, ServerShard
from qfleet.topologies.parameter_server.shared_memory import Buffer, ParameterBuffers
from qfleet.topologies.parameter_server.transport import VectorHandle, references_of
from qfleet.topologies.parameter_server.worker import GradientStats, Worker

R = TypeVar("R")

# --- References in a record ---


@dataclasses.dataclass(frozen=True)
class _Placeholder:
    """Stands in a record where a reference was."""

    number: int
    """Number of the argument that holds the referenced value."""


def pack(record: Any, ready_after: Sequence[Any] = ()) -> tuple[Any, ...]:
    """Returns the arguments that carry a record to another process: the record itself, then its references.

    Ray fetches what a reference refers to only if the reference is itself an argument of the call. References inside
    the record are therefore moved to the end, and placeholders take their places.

    Args:
      record: to send.
      ready_after: more references, whose values nobody reads. Ray starts the call only when they are there as well,
        which tells that the buffers in the record have been written.
    """
    leaves, structure = jax.tree.flatten(record)
    references = tuple(dict.fromkeys((*filter(is_reference, leaves), *ready_after)))
    numbers = {reference: number for number, reference in enumerate(references)}
    packed = [_Placeholder(numbers[leaf]) if is_reference(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, packed), *references


def unpack(record: R, values: Sequence[Any]) -> R:
    """Returns the record that was packed, with the values that its references refer to."""
    unpacked: R = jax.tree.map(lambda leaf: values[leaf.number] if isinstance(leaf, _Placeholder) else leaf, record)
    return unpacked


def is_reference(value: Any) -> bool:
    """Returns whether Ray would replace this argument by what it refers to."""
    return isinstance(value, ray.ObjectRef)


def fetch(references: Sequence[Any]) -> list[Any]:
    """Returns what these references refer to."""
    return [ray.get(reference) for reference in references]


def _submit(
    supervisor: Supervisor,
    process: RemoteProcess,
    method: str,
    record: Any,
    ready_after: Sequence[Any] = (),
    *,
    num_returns: int = 1,
    on_reply: Callable[..., None],
    on_dropped: Callable[[], None] = lambda: None,
) -> list[Any]:
    packed, *references = pack(record, ready_after)
    # If one of the references fails, the process is not to blame: the call is dropped, and the process stays.
    return supervisor.submit(
        process, method, packed, *references, num_returns=num_returns, needs=tuple(references), on_reply=on_reply,
        on_dropped=on_dropped,
    )  # fmt: skip


# --- Workers ---


class Pull(NamedTuple):
    """The parameters that a worker pulls before it does what a call asks for."""

    version: int
    params: tuple[Any, ...] = ()
    """Each shard's piece; empty if the worker has this version already."""
    target_params: tuple[Any, ...] = ()
    """The same of the target network; empty if the worker has that already."""


class ActRequest(NamedTuple):
    """Asks for a chunk."""

    pull: Pull
    exploration: float


class GradientRequest(NamedTuple):
    """Asks for the gradient of a batch."""

    pull: Pull
    importance_exponent: float
    """For a batch of the worker's own replay."""
    buffers: list[Buffer] | None
    """Where to write each piece of the gradient; None to return the pieces."""
    places: tuple[np.ndarray, ...] = ()
    """For each share of a batch of the shared replay, the places of its transitions, `[num_draws]`."""
    shares: tuple[Any, ...] = ()
    """The transitions of each share; empty for a batch of the worker's own replay."""


class GradientReferences(NamedTuple):
    """References to the arrays of a `GradientReply`."""

    pieces: tuple[Any, ...]
    priorities: tuple[Any, ...]


class RemoteWorker(InRemoteProcess, Worker):
    """A worker in a process of its own.

    The parameters come with the request that needs them. Ray can thus fetch them while the worker still does what it
    was asked for before.
    """

    def act_on(self, packed: ActRequest, *values: Any) -> tuple[tuple[ChunkStats, ShardStats | None], Chunk | None]:
        """Pulls, acts, and returns the chunk as a value of its own: only the replay needs it."""
        request = unpack(packed, values)
        self.pull(request.pull.version, request.pull.params, request.pull.target_params)
        reply = self.act(request.exploration)
        return (reply.chunk_stats, reply.shard_stats), reply.chunk

    def compute_gradient_on(self, packed: GradientRequest, *values: Any) -> Any:
        """Pulls, computes a gradient, and returns its losses, its pieces and its TD errors as values of their own."""
        request = unpack(packed, values)
        self.pull(request.pull.version, request.pull.params, request.pull.target_params)
        if request.shares:
            reply = self.compute_gradient_of(request.places, request.shares, request.buffers)
        else:
            reply = self.compute_gradient(request.importance_exponent, request.buffers)
        values = (reply.result, *reply.pieces, *reply.priorities)
        return values if len(values) > 1 else reply.result  # Ray doesn't take a tuple of one value


def submit_act(
    supervisor: Supervisor,
    process: RemoteProcess,
    request: ActRequest,
    handles: Sequence[VectorHandle],
    *,
    on_reply: Callable[[tuple[ChunkStats, ShardStats | None], Any], None],
    on_dropped: Callable[[], None],
) -> None:
    """Asks a worker for a chunk; `on_reply` gets its statistics and a reference to the chunk.

    Args:
      supervisor: of the process.
      process: of the worker.
      request: for the chunk.
      handles: handles of the parameters in the request.
      on_reply: called with the reply.
      on_dropped: called instead if there will be no reply.
    """
    _submit(
        supervisor, process, "act_on", request, references_of(handles), num_returns=2, on_reply=on_reply,
        on_dropped=on_dropped,
    )  # fmt: skip


def submit_gradient(
    supervisor: Supervisor,
    process: RemoteProcess,
    request: GradientRequest,
    handles: Sequence[VectorHandle],
    num_shards: int,
    *,
    on_reply: Callable[[GradientStats, GradientReferences], None],
    on_dropped: Callable[[], None],
) -> None:
    """Asks a worker for a gradient; `on_reply` gets its losses and references to its arrays.

    Args: as `submit_act`; `num_shards` is how many shards the server has.
    """
    num_pieces = 0 if request.buffers else num_shards

    def replied(result: GradientStats, *references: Any) -> None:
        on_reply(result, GradientReferences(references[:num_pieces], references[num_pieces:]))

    _submit(
        supervisor, process, "compute_gradient_on", request, references_of(handles),
        num_returns=1 + num_pieces + len(request.shares), on_reply=replied, on_dropped=on_dropped,
    )  # fmt: skip


# --- Shards of the server ---


class StepRequest(NamedTuple):
    """Asks a shard of the server for learner steps."""

    gradients: tuple[Any, ...]
    """The shard's pieces of all gradients of all steps, in order."""
    buffers: ParameterBuffers | None
    """Where to write the new parameters; None to return them."""


class ClippedStepRequest(NamedTuple):
    """Asks a shard of the server for learner steps whose gradients it has averaged already."""

    squared_norms: tuple[Any, ...]
    """For each shard, the squared norms of its pieces."""
    buffers: ParameterBuffers | None


class RemoteServerShard(InRemoteProcess, ServerShard):
    """A shard of the server in a process of its own."""

    def apply_gradients_on(self, packed: StepRequest, *values: Any) -> Any:
        """Takes learner steps, and returns the time that they took and what is published as values of their own."""
        request = unpack(packed, values)
        return _as_published(self.apply_gradients(request.gradients, request.buffers), request.buffers)

    def average_gradients_on(self, packed: StepRequest, *values: Any) -> tuple[float, list[float]]:
        """Averages gradients, and returns the time that it took and the squared norms as values of their own."""
        return self.average_gradients(unpack(packed, values).gradients)

    def apply_averages_on(self, packed: ClippedStepRequest, *values: Any) -> Any:
        """Takes clipped learner steps, and returns what `apply_gradients_on` returns."""
        request = unpack(packed, values)
        return _as_published(self.apply_averages(request.squared_norms, request.buffers), request.buffers)


def submit_steps(
    supervisor: Supervisor,
    process: RemoteProcess,
    request: StepRequest | ClippedStepRequest,
    *,
    on_reply: Callable[..., None],
    on_dropped: Callable[[], None],
) -> list[Any]:
    """Asks a shard of the server for learner steps; `on_reply` gets the time that they took, and then references.

    Returns:
      References to what the shard will return: the time, and, if the request has no buffers, its pieces of the
      parameters and of the target network (of None if the target network stays the same).
    """
    method = "apply_gradients_on" if isinstance(request, StepRequest) else "apply_averages_on"
    num_returns = 1 if request.buffers else 3
    return _submit(
        supervisor, process, method, request, num_returns=num_returns, on_reply=on_reply, on_dropped=on_dropped
    )


def submit_averages(
    supervisor: Supervisor, process: RemoteProcess, request: StepRequest, *, on_reply: Callable[..., None]
) -> Any:
    """Asks a shard of the server to average gradients, and returns a reference to the squared norms of the means.

    `on_reply` gets the time that it took, and then that reference.
    """
    return _submit(supervisor, process, "average_gradients_on", request, num_returns=2, on_reply=on_reply)[1]


def submit_publish(
    supervisor: Supervisor,
    process: RemoteProcess,
    *,
    on_reply: Callable[..., None] = lambda *_: None,
    on_dropped: Callable[[], None] = lambda: None,
) -> tuple[Any, Any]:
    """Asks a shard of the server for its parameters; returns references to its pieces of them and of the target's.

    `on_reply` gets the time that it took, and then these references.
    """
    _, params, target_params = supervisor.submit(
        process, "publish", num_returns=3, on_reply=on_reply, on_dropped=on_dropped
    )
    return params, target_params


def submit_state(
    supervisor: Supervisor, process: RemoteProcess, *, on_reply: Callable[..., None], on_dropped: Callable[[], None]
) -> None:
    """Asks a shard for its state; `on_reply` gets the time that it took, and a reference to the leaves."""
    supervisor.submit(process, "state", num_returns=2, on_reply=on_reply, on_dropped=on_dropped)


def submit_restore(supervisor: Supervisor, process: RemoteProcess, leaves: StateLeaves | Any) -> None:
    """Has a shard of the server continue from these leaves, or from those that a reference refers to."""
    supervisor.submit(process, "restore", leaves)


def submit_reset(supervisor: Supervisor, process: RemoteProcess) -> None:
    """Has a shard of the server begin again with the parameters of the run's seed."""
    supervisor.submit(process, "reset")


def _as_published(published: PublishedParameters, buffers: ParameterBuffers | None) -> Any:
    """Returns three values for Ray to pass on by themselves, or the time alone if the parameters are in buffers."""
    return tuple(published) if buffers is None else published.busy_seconds


def submit_to_all(
    submit: Callable[..., Any],
    supervisor: Supervisor,
    processes: Sequence[RemoteProcess],
    *,
    on_replies: Callable[[list[Any]], None],
    on_dropped: Callable[[], None],
) -> None:
    """Asks all shards of the server for something, between the same two steps.

    Args:
      submit: `submit_state` or `submit_publish`.
      supervisor: supervisor of the shards.
      processes: all shards.
      on_replies: called with a reference to what each shard returned after the time.
      on_dropped: called instead, once, if any of them is lost meanwhile.
    """
    replies: dict[int, Any] = {}
    is_dropped = False

    def replied(i: int, _: float, reference: Any, *__: Any) -> None:
        replies[i] = reference
        if len(replies) == len(processes):
            on_replies([replies[i] for i in range(len(processes))])

    def dropped() -> None:
        nonlocal is_dropped
        if not is_dropped:
            is_dropped = True
            on_dropped()

    for i, process in enumerate(processes):
        submit(supervisor, process, on_reply=functools.partial(replied, i), on_dropped=dropped)


# --- Shards of the replay ---


class RemoteReplayShard(InRemoteProcess, ReplayShard):
    """A shard of the replay that all workers share, in a process of its own."""
