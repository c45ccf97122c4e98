"""Carries calls between processes of one machine: a socket for what is to be done, shared memory for arrays.

Each process that Ray has started connects to the director's `Switchboard` by a Unix socket. There it gets calls, which
it carries out and answers one by one. Arrays lie in an `Arena`: the process reads those that a call names, and writes
those that it makes to the block that came with the call. Its answer is sent after that, so nobody reads an array that
is half written. A round trip costs microseconds where a call of Ray costs a millisecond of CPU.

    director                                          process
    ChannelConnection.send   -- call, blocks, room -->  serve: reads arguments, calls the method,
                             <------ reply, blocks ---         writes the arrays of the reply into the room
    or, if the room is too small or there is none:
                             <---- more room wanted --
                             -------- room ---------->  then it replies

The socket's end is the process's end. Only then are the blocks reused that it may have been writing to. A process of
another user can't connect, and one without the run's token isn't heard. A value is never changed once it is written, so
there is nothing to lock: all readers share a block, which is used again when the last of them has answered.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import hmac
import os
import pickle
import secrets
import selectors
import socket
import struct
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from qfleet.topologies.fleet.calls import Call, Failure, Inbox, Reply
from qfleet.topologies.fleet.references import Reference, dump, load
from qfleet.topologies.fleet.shared_memory import Address, Arena, Block, Encoded, Mapping, Stored, encode

_MOST_INLINE_BYTES = 32_000
"""Longest record that goes through the socket. Arguments and replies that are longer go through the arena."""

_MESSAGE_BYTES = 100_000
"""Longest message that is read from a socket."""

_SPARE_ROOM = 1.25
"""Room that a call gets for its reply, as a multiple of what the last reply of its kind has used."""

_MOST_ROOM_IN_ADVANCE = 64_000_000
"""Bytes. A larger reply, such as a whole replay, has to ask for its room."""

_HELLO = struct.Struct("32sQ")
"""The first message of a process: the run's token, and the number of the connection."""


class Welcome(NamedTuple):
    """What a process needs to connect to the switchboard."""

    address: bytes
    """Abstract address of its socket, which is no file."""
    token: bytes
    number: int
    """Number of the connection."""


# --- What goes through the socket: plain tuples, because named ones take much longer to pickle ---

_Place = tuple[int, tuple[int, ...]]
"""An `Address`."""

_Room = tuple[int, int]
"""Offset and capacity of the block for the arrays of a reply."""

_Request = tuple[str, bytes | _Place, list[_Place], _Room]
"""A call: its method, its arguments from `references.dump`, the values of their references, and room for its reply."""

_ANSWER, _ROOM_WANTED, _RAISED = range(3)
"""What a message of the process begins with. Then follow: the reply from `references.dump` and the values of its
references; the number of bytes that they need; the text of an error with its traceback."""


class MethodRaised(Exception):
    """An error of a method in another process. Its text has the traceback."""


# --- In the process that is called ---


def serve(target: object, welcome: Welcome) -> None:
    """Carries out calls of an object's methods, until the director's process closes the connection or ends."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(welcome.address)
        connection.send(_HELLO.pack(welcome.token, welcome.number))
        _, files, _, _ = socket.recv_fds(connection, 1, 1)
        if files:
            mapping = Mapping(files[0])
            os.close(files[0])
            _Server(target, connection, mapping).run()


class _Server:
    def __init__(self, target: object, connection: socket.socket, mapping: Mapping) -> None:
        self._target, self._connection, self._mapping = target, connection, mapping
        self._waiting: collections.deque[_Request] = collections.deque()

    def run(self) -> None:
        while request := self._waiting.popleft() if self._waiting else self._receive():
            try:
                answer: Any = self._answer(request)
            except Exception as error:
                answer = _RAISED, "".join(traceback.format_exception(error))[-_MOST_INLINE_BYTES:]
            self._connection.send(_in_bytes(answer))

    def _receive(self) -> Any:
        data = self._connection.recv(_MESSAGE_BYTES)
        return pickle.loads(data) if data else ()

    def _answer(self, request: _Request) -> tuple[int, bytes | _Place, list[_Place]]:
        method, data, places, room = request
        read = self._mapping.read
        if isinstance(data, tuple):
            data = read(Address(*data))
        references = [Reference[Any](read=functools.partial(read, Address(*place))) for place in places]
        reply, results = dump(getattr(self._target, method)(*load(data, references)))
        values = [encode(result.value) for result in results]
        if len(reply) <= _MOST_INLINE_BYTES:
            return _ANSWER, reply, self._write(values, room)
        *written, place = self._write([*values, encode(pickle.PickleBuffer(reply))], room)
        return _ANSWER, place, written

    def _write(self, values: Sequence[Encoded], room: _Room) -> list[_Place]:
        wanted, (offset, capacity) = sum(value.num_bytes for value in values), room
        if wanted > capacity:
            self._connection.send(pickle.dumps((_ROOM_WANTED, wanted)))
            while len(message := self._receive()) > 2:  # a call that the director has sent meanwhile
                self._waiting.append(message)
            if not message:
                raise EOFError("the director's process has ended")
            offset, _ = message
        places = []
        for value in values:
            places.append(_place_of(self._mapping.write(value, offset)))
            offset += value.num_bytes
        return places


# --- In the director's process ---


@dataclasses.dataclass
class _InFlight:
    """A call that has been sent, and the blocks that the process reads and writes until it has answered."""

    call: Call
    blocks: list[Block]
    room: Block | None


class ChannelConnection:
    """The director's end of the connection to one process."""

    def __init__(self, switchboard: "Switchboard") -> None:
        """Is not connected yet: calls wait until the process has come."""
        self._switchboard = switchboard
        self._socket: socket.socket | None = None
        self._in_flight: collections.deque[_InFlight] = collections.deque()
        self._outgoing: collections.deque[bytes] = collections.deque()
        self._events = 0
        """What the inbox listens for."""
        self._is_closed = False

    def send(self, call: Call) -> None:
        """Sends a call, as soon as the process is connected and reads."""
        arena = self._switchboard.arena
        stored = [self._switchboard.stored(reference) for reference in call.references]
        blocks: list[Block] = [each.block for each in stored]
        data: bytes | _Place = call.data
        if len(call.data) > _MOST_INLINE_BYTES:
            block, address = arena.put(pickle.PickleBuffer(call.data))
            blocks.append(block)
            data = _place_of(address)
        room = self._switchboard.lease_room(call)
        self._in_flight.append(_InFlight(call, blocks, room))
        self._send((call.method, data, [_place_of(each.address) for each in stored], _room_of(room)))

    def close(self) -> None:
        """Hears no more of the process. What it may still be writing to stays reserved until it has ended."""
        self._is_closed = True
        if self._socket is None:
            self._in_flight.clear()

    def end(self) -> None:
        """Closes the socket, because the process has ended or nothing more will be asked of it."""
        assert self._socket is not None
        self._listen(0)
        self._socket.close()
        self._socket = None
        self._in_flight.clear()
        self._switchboard.connected.discard(self)

    def accept(self, connected: socket.socket) -> None:
        """Takes the socket of the process, which has connected."""
        if self._is_closed:
            connected.close()
            return
        socket.send_fds(connected, [b"!"], [self._switchboard.arena.file])
        connected.setblocking(False)
        self._socket = connected
        self._switchboard.connected.add(self)
        self._flush()

    def _send(self, message: _Request | _Room) -> None:
        self._outgoing.append(_in_bytes(message))
        self._flush()

    def _flush(self) -> None:
        if self._socket is None:
            return
        try:
            while self._outgoing:
                self._socket.send(self._outgoing[0])
                self._outgoing.popleft()
        except BlockingIOError:  # the process doesn't read at the moment
            self._listen(selectors.EVENT_READ | selectors.EVENT_WRITE)
        except ConnectionError:  # it has ended, which reading will tell
            self._outgoing.clear()
        else:
            self._listen(selectors.EVENT_READ)

    def _listen(self, events: int) -> None:
        if events != self._events:
            self._events = events
            self._switchboard.inbox.listen(self._socket, events, self._is_ready)

    def _is_ready(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush()
        if events & selectors.EVENT_READ:
            self._read()

    def _read(self) -> None:
        assert self._socket is not None
        while True:
            try:
                data = self._socket.recv(_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except ConnectionError:
                data = b""
            if not data:
                if not self._is_closed:
                    self._switchboard.inbox.put(self, Failure(None, "died"))
                self.end()
                return
            self._hear(pickle.loads(data))

    def _hear(self, message: Any) -> None:
        kind, *rest = message
        if kind == _ROOM_WANTED:
            self._in_flight[0].room = self._switchboard.arena.lease(*rest)
            self._send(_room_of(self._in_flight[0].room))
            return
        sent = self._in_flight.popleft()
        if self._is_closed:
            return
        if kind == _RAISED:
            (text,) = rest
            cause = f"raised {text.strip().splitlines()[-1]}"
            news: Reply | Failure = Failure(sent.call, cause, MethodRaised(text), is_alive=True)
        else:
            news = self._reply_to(sent, *rest)
        self._switchboard.inbox.put(self, news)

    def _reply_to(self, sent: _InFlight, data: bytes | _Place, places: list[_Place]) -> Reply:
        addresses = [Address(*place) for place in places]
        num_bytes = sum(address.num_bytes for address in addresses)
        if isinstance(data, tuple):
            address = Address(*data)
            num_bytes += address.num_bytes
            data = bytes(self._switchboard.arena.read(address))
        self._switchboard.note_used_room(sent.call, num_bytes)
        stored = [Stored(sent.room, address) for address in addresses if sent.room is not None]
        return Reply(sent.call, data, stored)


class Switchboard:
    """Connects the director with all processes of a run on this machine: a `calls.Carrier`."""

    def __init__(self, inbox: Inbox, cause_of: Callable[[Exception], str]) -> None:
        """Waits for processes to connect.

        Args:
          inbox: for what is heard of them.
          cause_of: describes an error of Ray in words that follow the name of the process.

        Raises:
          OSError: if this system has no memory to share.
        """
        self.inbox, self._cause_of = inbox, cause_of
        self.arena = Arena()
        self._used_room: dict[str, int] = {}
        """Bytes of room that the last reply of a method has used."""
        self._token = secrets.token_bytes(32)
        self._expected: dict[int, ChannelConnection] = {}
        """Connections whose processes have not come yet, by number."""
        self.connected: set[ChannelConnection] = set()
        self._num_connections = 0
        self._strangers: set[socket.socket] = set()
        """Sockets of processes that have not said yet who they are."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(b"\0qfleet-" + secrets.token_hex(16).encode())
        self._socket.listen(1000)
        self._socket.setblocking(False)
        inbox.listen(self._socket, selectors.EVENT_READ, self._accept)

    def connect(self, handle: Any) -> ChannelConnection:
        """Has a process connect."""
        number = self._num_connections
        self._num_connections += 1
        self._expected[number] = connection = ChannelConnection(self)

        def ended(future: Any) -> None:
            if error := future.exception():
                self.inbox.put(connection, Failure(None, self._cause_of(error), error))
                self.inbox.wake()

        welcome = Welcome(self._socket.getsockname(), self._token, number)
        handle.serve.remote(welcome).future().add_done_callback(ended)
        return connection

    def read(self, place: Stored) -> Any:
        """Returns a copy of a value."""
        return copy.deepcopy(self.arena.read(place.address))

    def is_lost(self, place: Stored) -> bool:
        """Returns False: this process keeps all values."""
        return False

    def stored(self, reference: Reference) -> Stored:
        """Returns where a value lies. If this process has made it, it is written to the arena first."""
        if reference.place is None:
            reference.place = self.arena.put(reference.value)
        stored: Stored = reference.place
        return stored

    def lease_room(self, call: Call) -> Block | None:
        """Leases room for a reply; None if it is not known how much it will need, or if it is much."""
        used = self._used_room.get(call.method, 0)
        return self.arena.lease(int(_SPARE_ROOM * used)) if 0 < used < _MOST_ROOM_IN_ADVANCE else None

    def note_used_room(self, call: Call, num_bytes: int) -> None:
        """Remembers how much room a reply has used. The next one of its kind gets as much."""
        self._used_room[call.method] = num_bytes

    def close(self) -> None:
        """Ends all connections and frees the memory. The processes that are still there carry out no more calls."""
        self._expected.clear()
        for connection in list(self.connected):
            connection.end()
        for each in [self._socket, *self._strangers]:
            self.inbox.listen(each, 0, self._accept)
            each.close()
        self.arena.close()

    def _accept(self, _: int) -> None:
        connected, _address = self._socket.accept()
        _, user, _ = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user != os.getuid():
            connected.close()
            return
        self._strangers.add(connected)
        self.inbox.listen(connected, selectors.EVENT_READ, functools.partial(self._identify, connected))

    def _identify(self, connected: socket.socket, _: int) -> None:
        self._strangers.discard(connected)
        self.inbox.listen(connected, 0, self._accept)
        with contextlib.suppress(OSError, struct.error):
            token, number = _HELLO.unpack(connected.recv(_MESSAGE_BYTES))
            if hmac.compare_digest(token, self._token) and number in self._expected:
                self._expected.pop(number).accept(connected)
                return
        connected.close()


def _in_bytes(message: tuple) -> bytes:
    data = pickle.dumps(message)
    if len(data) > _MESSAGE_BYTES:  # the other side would read only the beginning
        raise ValueError(f"a message must have at most {_MESSAGE_BYTES} bytes, got {len(data)}; pass fewer references")
    return data


def _place_of(address: Address) -> _Place:
    return address.offset, address.lengths


def _room_of(block: Block | None) -> _Room:
    return (block.offset, block.capacity) if block else (0, 0)
