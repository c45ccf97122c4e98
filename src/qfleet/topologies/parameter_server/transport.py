"""Vectors between workers and server: by memory that they share on one machine, by Ray's object store elsewhere."""

import contextlib
import itertools
from typing import Any, NamedTuple

from qfleet.config import ParameterServerConfig
from qfleet.topologies.fleet.cluster import is_local
from qfleet.topologies.fleet.rate_limiter import CHUNKS_AHEAD
from qfleet.topologies.parameter_server.server_shard import Division, Room
from qfleet.topologies.parameter_server.shared_memory import Place, SharedMemory, Slot, can_share


class Vector(NamedTuple):
    """A vector in pieces, one for each shard of the server, that is kept as long as anything refers to this."""

    pieces: tuple[Any, ...]
    """References to them, or their places in `slot`."""
    slot: Slot | None
    needs: tuple[Any, ...]
    """References: once all are there the vector is."""


class Vectors:
    """Finds room for vectors: None where there is none, and then Ray takes them. For the director's thread."""

    def __init__(self, config: ParameterServerConfig, division: Division) -> None:
        """Has no memory yet."""
        self._config, self._division = config, division
        self._memory: SharedMemory | None = None

    def share(self, stack: contextlib.ExitStack) -> str | None:
        """Makes memory if all parts are on this machine, until the stack ends, and returns where it is."""
        config = self._config
        if not is_local() or not can_share():
            return None
        # Each worker may have other parameters for each of its chunks and for its gradient, and two gradients on the
        # way; then there are the parameters, the target network, and the gradients of the step that is taken.
        num_slots = (CHUNKS_AHEAD + 3) * config.num_workers + config.gradients_per_learner_step + 4
        self._memory = SharedMemory(num_slots, [end - start for start, end in self._division.bounds])
        stack.callback(self._memory.close)
        return self._memory.path

    def slot(self) -> Slot | None:
        """Returns room for one vector."""
        return self._memory.slot() if self._memory else None

    def gradient_room(self, slot: Slot | None) -> list[Place] | None:
        """Returns where a worker puts each piece of a gradient."""
        return self._memory.places(slot, self._config.gradient_dtype) if self._memory and slot else None

    def server_rooms(self, slots: list[Slot | None]) -> list[Room] | list[None]:
        """Returns where each shard of the server puts its pieces of the parameters, and of the target network."""
        if self._memory is None or None in slots:
            return [None] * self._config.num_server_shards
        places = [self._memory.places(slot, "float32") for slot in slots if slot]
        target = places[1] if len(places) > 1 else [None] * len(places[0])
        return [Room(*each) for each in zip(places[0], target, strict=True)]


def handed_out(asked: list[list[Any]], rooms: list[Room] | list[None], slots: list[Slot | None]) -> list[Vector]:
    """Returns the parameters and the target network that the server will have handed out.

    Args:
      asked: for each of its shards, references to what it returns.
      rooms: of each.
      slots: that these are in.
    """
    first, *others = zip(*asked, strict=True)
    if rooms[0] is None:
        return [Vector(references, None, references) for references in others]
    pieces: Any = zip(*rooms, strict=True)
    return [Vector(places, slot, first) for places, slot in itertools.zip_longest(pieces, slots)]


def to_pull(vectors: list[Vector]) -> tuple[Any, ...]:
    """Returns what a worker is given to pull some vectors: how many pieces, these, and what else they wait for."""
    pieces = [piece for vector in vectors for piece in vector.pieces]
    return len(pieces), *pieces, *needs_of([vector for vector in vectors if vector.slot])


def needs_of(vectors: list[Vector]) -> tuple[Any, ...]:
    """Returns each reference that they wait for, once."""
    return tuple(dict.fromkeys(reference for vector in vectors for reference in vector.needs))
