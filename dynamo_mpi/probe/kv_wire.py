# SPDX-License-Identifier: Apache-2.0
"""What those who take part in the KV probe say to each other over TCP: JSON in frames that prove the world's token, and bare bytes.

    server: a nonce
    client: its purpose, and the number of the run
    then frames either way: length, HMAC, JSON

The key of a conversation is made of the world's token, the purpose and the run, so that a token never travels: a decode rank gets the one
key that it needs to fetch in this run. An HMAC covers the nonce, who speaks, and how much was said before. Nothing that comes is parsed
before its HMAC is found to be right; nobody makes anybody wait for longer than a deadline.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import select
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.engines.reference.kv_wire import Deadline

FETCH, ORDER = b"F", b"O"
"""Purposes: to fetch from a prefill rank; to tell a rank what to do."""
RUN_BYTES = 16
_NONCE_BYTES = 16
_MAC_BYTES = 32
_LENGTH = struct.Struct("!I")
_COUNT = struct.Struct("!Q")
_MOST_BYTES = 1 << 20
_MOST_AT_ONCE = 1 << 20


class TalkError(Exception):
    """The other side says something else than it should; the text says what."""


class Access(NamedTuple):
    """How to be let in.

    Args:
        purpose: `FETCH` or `ORDER`.
        run: number of the run.
        key: of both, as `key_of` makes it.
    """

    purpose: bytes
    run: bytes
    key: bytes


def access_of(token: str, purpose: bytes, run: bytes) -> Access:
    """Return how whoever knows a world's token is let in."""
    return Access(purpose, run, hmac.digest(bytes.fromhex(token), purpose + run, "sha256"))


class Talk:
    """One side of a conversation.

    Args:
        connection: connected; the caller closes it.
        access: what it is for.
        nonce: of this connection.
        deadline: for everything still to come; it may be moved.
        client: whether this is the client's side.
    """

    def __init__(
        self, connection: socket.socket, access: Access, nonce: bytes, deadline: Deadline, *, client: bool
    ) -> None:
        self._socket, self.access, self._nonce = connection, access, nonce
        self._mine, self._theirs = (b"c", b"s") if client else (b"s", b"c")
        self._said = self._heard = 0
        self.deadline = deadline

    def say(self, **content: Any) -> None:
        """Send a message.

        Raises:
            OSError: the other side has gone, or the deadline has passed.
        """
        body = json.dumps(content, separators=(",", ":")).encode()
        mac = self._mac(self._mine, self._said, body)
        self._said += 1
        self.send(_LENGTH.pack(len(body)) + mac + body)

    def hear(self) -> dict[str, Any]:
        """Return the next message.

        Raises:
            TalkError: it is none, or the other side refuses.
            OSError: the other side has gone, or the deadline has passed.
        """
        (size,) = _LENGTH.unpack(self.receive(_LENGTH.size))
        if size > _MOST_BYTES:
            raise TalkError(f"a message says it has {size} bytes, more than {_MOST_BYTES}")
        mac, body = self.receive(_MAC_BYTES), self.receive(size)
        if not hmac.compare_digest(mac, self._mac(self._theirs, self._heard, body)):
            raise TalkError("it doesn't know this world's token")
        self._heard += 1
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            raise TalkError("a message is no JSON") from None
        if not isinstance(content, dict):
            raise TalkError("a message is no JSON object")
        if isinstance(refusal := content.get("refused"), str):
            raise TalkError(f"it refuses: {refusal}")
        return content

    def send(self, data: bytes | memoryview) -> None:
        """Send bare bytes."""
        left = memoryview(data)
        while left:
            self._socket.settimeout(self.deadline.left())
            left = left[self._socket.send(left[:_MOST_AT_ONCE]) :]

    def receive(self, size: int) -> bytes:
        """Return so many bare bytes."""
        data = bytearray(size)
        self.receive_into(data)
        return bytes(data)

    def receive_into(self, target: bytearray) -> None:
        """Fill ``target`` with bare bytes."""
        left = memoryview(target)
        while left:
            self._socket.settimeout(self.deadline.left())
            count = self._socket.recv_into(left[:_MOST_AT_ONCE])
            if not count:
                raise ConnectionError("it closed the connection")
            left = left[count:]

    def readable(self) -> bool:
        """Has the other side said something, or gone? Doesn't wait.

        Raises:
            TimeoutError: the deadline has passed.
        """
        self.deadline.left()
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        return bool(poller.poll(0))

    @property
    def local_address(self) -> str:
        """The address of this host that the connection goes over."""
        return str(self._socket.getsockname()[0])

    def _mac(self, who: bytes, before: int, body: bytes) -> bytes:
        return hmac.digest(self.access.key, self._nonce + who + _COUNT.pack(before) + body, "sha256")


@contextlib.contextmanager
def talk_to(address: str, port: int, access: Access, deadline: Deadline) -> Iterator[Talk]:
    """Begin a conversation, and end it.

    Raises:
        OSError: nobody is there, or answers in time.
    """
    with socket.create_connection((address, port), timeout=deadline.left()) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        talk = Talk(connection, access, b"", deadline, client=True)
        nonce = talk.receive(_NONCE_BYTES)
        talk.send(access.purpose + access.run)
        yield Talk(connection, access, nonce, deadline, client=True)


def welcome(connection: socket.socket, token: str, deadline: Deadline) -> Talk:
    """Answer whoever begins a conversation; whether it knows the token, its first message shows.

    Raises:
        TalkError: it doesn't want anything that there is.
        OSError: it has gone, or is too slow.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    talk = Talk(connection, Access(b"", b"", b""), nonce, deadline, client=False)
    talk.send(nonce)
    head = talk.receive(1 + RUN_BYTES)
    if head[:1] not in (FETCH, ORDER):
        raise TalkError("there is no such purpose")
    return Talk(connection, access_of(token, head[:1], head[1:]), nonce, deadline, client=False)
