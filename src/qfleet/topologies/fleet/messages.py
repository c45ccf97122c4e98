"""What a state machine hears and what it asks for: events in, requests out. All of them are records.

A request is a call of a method in another process, or something that the director itself does. Which method belongs to
a request is the director's business. Arrays are references, and a request makes the references that its reply will
hold. So a later request can have them as arguments before there is a reply.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from qfleet.core.replay import SavedReplay
from qfleet.topologies.fleet.references import Reference

R = TypeVar("R")


class ProcessId(NamedTuple):
    """A place in the run, which one process after the other holds."""

    role: str
    number: int = -1
    """Number among the processes of this role, from 0; -1 if there is only one."""

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.role if self.number < 0 else f"{self.role} {self.number}"


# --- Requests ---


@dataclasses.dataclass(frozen=True, eq=False)
class CallRequest(Generic[R]):
    """Call a method of a process, which replies with an `R`."""

    process: ProcessId
    results: Sequence[Reference[Any]] = dataclasses.field(default=(), kw_only=True)
    """The references that the reply will hold, in their order."""


@dataclasses.dataclass(frozen=True, eq=False)
class Begin(CallRequest[None]):
    """Begin new episodes in all lanes of an actor."""

    incarnation: int
    """Number of actors that held this place before."""


class ReadLearner(NamedTuple):
    """Read the learner of the newest checkpoint: the director answers with `LearnerFound`."""


class ReadReplay(NamedTuple):
    """Read a process's share of the replay in the newest checkpoint: the director answers with `ReplayFound`."""

    process: ProcessId


class CheckValues(NamedTuple):
    """Look whether the values of references are lost: the director answers with `ValuesChecked`."""

    references: Sequence[Reference[Any]]


class Warn(NamedTuple):
    """Tell the user."""

    text: str


Request = CallRequest[Any] | ReadLearner | ReadReplay | CheckValues | Warn


# --- Events ---


class Started(NamedTuple):
    """All processes have been asked for, for the first time."""


class Ready(NamedTuple):
    """A process has found a node, and can do what it is asked for."""

    process: ProcessId


class Lost(NamedTuple):
    """A process has been lost, and another is about to take its place. The calls that it had are dropped next."""

    process: ProcessId


class Replied(NamedTuple):
    """A process has done what it was asked for."""

    request: CallRequest[Any]
    reply: Any


class Dropped(NamedTuple):
    """A process will not do what it was asked for: it was lost, or an argument was."""

    request: CallRequest[Any]
    lost: Sequence[Reference[Any]] = ()
    """The arguments whose values are lost."""


class Paused(NamedTuple):
    """The run pauses: nothing may be stored or learned beyond what is under way. There is nothing to request."""


class Turn(NamedTuple):
    """The machine has heard all news, and the run isn't paused: it is time to request everything that is due."""


class LearnerFound(NamedTuple):
    """The learner of the newest checkpoint."""

    learner_steps: int
    learner: Any
    """The learner, in the form in which the machine passes it on; None if there is no checkpoint yet."""


class SavedShare(NamedTuple):
    """A process's share of the replay of a checkpoint."""

    replay: Reference[SavedReplay]
    num_transitions: int
    """Transitions in it, as the director counts them."""


class ReplayFound(NamedTuple):
    """A process's share of the replay in the newest checkpoint."""

    process: ProcessId
    share: SavedShare | None
    """The share; None if no checkpoint has it."""
    env_steps: int
    """Environment steps of the checkpoint."""


class ValuesChecked(NamedTuple):
    """The answer to `CheckValues`."""

    is_lost: bool
    """Whether any of the values is lost."""


class Restored(NamedTuple):
    """The run goes on from a checkpoint. It has not begun yet, and all processes are new."""

    env_steps: int
    learner_steps: int
    replay_starts_at: int
    """Environment steps when the replay was last empty."""
    incarnation: int
    """Incarnation of all actors; no actor has had it before."""
    version: int
    """Newest version of the parameters that any actor may have seen."""
    learner: Any
    """As in `LearnerFound`."""
    shares: Sequence[SavedShare]
    """The share of the replay of each process that keeps one; nothing if the checkpoint has no replay."""


Event = (
    Started | Ready | Lost | Replied | Dropped | Paused | Turn | LearnerFound | ReplayFound | ValuesChecked | Restored
)
