"""What the machine of the parameter server requests of workers and server shards, and what these reply.

All are records, in which large arrays are references. `ServerDirector._call` has the method that belongs to each
request.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qfleet.core.sharded_learner import StateLeaves
from qfleet.topologies.fleet.actor import Chunk, ChunkStats
from qfleet.topologies.fleet.messages import CallRequest
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.replay_shard import ShardStats, Writer
from qfleet.topologies.fleet.sharded_replay import Drawn
from qfleet.topologies.parameter_server.worker import GradientStats

Pieces = tuple[Reference[np.ndarray], ...]
"""A vector: each shard's piece of it, `[piece]`."""

# --- Parameters ---


class NewestParameters(NamedTuple):
    """The parameters that workers pull. The shards of the server may still be computing them."""

    version: int
    params: Pieces
    target_version: int
    """Version of the first parameters that had this target network."""
    target_params: Pieces


class Pull(NamedTuple):
    """The parameters that a worker pulls before it does what a call asks for."""

    version: int
    params: Pieces = ()
    """Empty if the worker is known to have this version already."""
    target_params: Pieces = ()
    """The same of the target network; empty if the worker is known to have that already."""


# --- Workers ---


class ActAnswer(NamedTuple):
    """A worker's answer to `Act`: an `ActReply` with a reference in place of the chunk."""

    chunk_stats: ChunkStats
    shard_stats: ShardStats | None
    chunk: Reference[Chunk] | None


class GradientAnswer(NamedTuple):
    """A worker's answer to `ComputeGradient` and `ComputeGradientOf`: a `GradientReply` with references."""

    result: GradientStats
    pieces: Pieces
    """For each shard of the server, the bytes of its piece, which has the type `gradient_dtype` of the config."""
    priorities: tuple[Reference[np.ndarray], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Act(CallRequest[ActAnswer]):
    """Pull, and act for one chunk."""

    newest: NewestParameters
    pull: Pull
    """What the worker lacks of `newest`."""
    exploration: float
    writer: Writer
    """Incarnation of the worker, and the number of chunks that it was asked for before."""


@dataclasses.dataclass(frozen=True, eq=False)
class ComputeGradient(CallRequest[GradientAnswer]):
    """Pull, and compute the gradient of a batch from the worker's own replay, whose priorities change with it."""

    newest: NewestParameters
    pull: Pull
    importance_exponent: float


@dataclasses.dataclass(frozen=True, eq=False)
class ComputeGradientOf(CallRequest[GradientAnswer]):
    """Pull, and compute the gradient of a batch that the shards of a replay draw."""

    newest: NewestParameters
    pull: Pull
    drawn: Drawn


# --- Shards of the server ---


class PublishedAnswer(NamedTuple):
    """A shard's answer to `ApplyGradients` and `ApplyAverages`: `PublishedParameters` with references."""

    busy_seconds: float
    params: Reference[np.ndarray]
    target_params: Reference[np.ndarray] | None


@dataclasses.dataclass(frozen=True, eq=False)
class ApplyGradients(CallRequest[PublishedAnswer]):
    """Take learner steps that need nothing of other shards: there are none, or the agent doesn't clip gradients."""

    gradients: Sequence[Reference[np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class AverageGradients(CallRequest[tuple[float, Reference[list[float]]]]):
    """Average the gradients of each learner step, and return the squares of their norms."""

    gradients: Sequence[Reference[np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class ApplyAverages(CallRequest[PublishedAnswer]):
    """Take learner steps with these averages, clipped by the norms over all shards."""

    squared_norms: Sequence[Reference[list[float]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Publish(CallRequest[tuple[Reference[np.ndarray], Reference[np.ndarray]]]):
    """Publish the parameters and those of the target network, as they are, when there are none to pull."""


class Snapshot(NamedTuple):
    """A copy of the server's state, in which all shards have taken the same steps."""

    version: int
    learner_steps: int
    target_age: int
    leaves: list[Reference[StateLeaves]]
    """For each shard, its leaves."""


@dataclasses.dataclass(frozen=True, eq=False)
class TakeSnapshot(CallRequest[Reference[StateLeaves]]):
    """Copy the state of the shard."""

    snapshot: Snapshot


@dataclasses.dataclass(frozen=True, eq=False)
class RestoreShard(CallRequest[None]):
    """Continue from a copy of the state of the shard."""

    leaves: Reference[StateLeaves]
    version: int
    """Version of the parameters from then on."""


@dataclasses.dataclass(frozen=True, eq=False)
class ResetShard(CallRequest[None]):
    """Begin again with the first parameters."""
