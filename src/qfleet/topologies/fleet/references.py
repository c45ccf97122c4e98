"""References to values that one process makes and other processes read, and the records that hold them.

The director passes on arrays without reading them. The process that makes an array returns a `Reference` to it, inside
the record that it returns, and the director puts the reference into a record for another process. Where the value lies
meanwhile is the business of whoever carries the calls: in memory that the processes of one machine share (`channel`),
or in Ray's object store (`ray_calls`).
"""

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_MISSING: Any = object()


class Reference(Generic[T]):
    """A value that may lie in another process.

    A process that works makes one with `Reference(value)`, and reads one that it is given by `value`. In the director's
    process a reference has no value, only a place.
    """

    __slots__ = ("_read", "_value", "is_lost", "place")

    def __init__(self, value: T = _MISSING, *, read: Callable[[], T] | None = None, place: Any = None) -> None:
        """Refers to a value.

        Args:
          value: the value, in the process that has made it.
          read: returns the value when it is first asked for, in a process that was given the reference.
          place: where the value lies, in the director's process; None if it has not been made yet.
        """
        self._value, self._read, self.place = value, read, place
        self.is_lost = False
        """Whether the value will never be there: the process that was to make it is gone."""

    @property
    def value(self) -> T:
        """The value. Arrays in it are read-only, and may only be used until the call that brought them has ended."""
        if self._value is _MISSING:
            assert self._read is not None, "the director has no values"
            self._value = self._read()
        return self._value

    def copy(self) -> T:
        """Returns a copy of the value, which may be kept and changed."""
        return copy.deepcopy(self.value)

    @property
    def has_value(self) -> bool:
        """Whether the value is in this process, which has made it or has read it."""
        return self._value is not _MISSING

    @property
    def is_there(self) -> bool:
        """Whether the value has been made, so that a call that needs it can start."""
        return self.place is not None or self.has_value

    def __reduce__(self) -> Any:
        """Refuses to be sent by anything but `dump`."""
        raise TypeError("a Reference can only be an argument or a result of a remote call")


def dump(record: Any) -> tuple[bytes, list[Reference]]:
    """Returns a record in bytes, without its references, and the references in the order in which they stand there."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(record)
    return file.getvalue(), pickler.references


def load(data: bytes | memoryview, references: Sequence[Reference]) -> Any:
    """Returns the record that `dump` has made bytes of, with these references in it."""
    return _Unpickler(io.BytesIO(data), references).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.references: list[Reference] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Reference):
            return None
        self.references.append(value)
        return len(self.references) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, references: Sequence[Reference]) -> None:
        super().__init__(file)
        self._references = references

    def persistent_load(self, number: int) -> Reference:
        return self._references[number]
