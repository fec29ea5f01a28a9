# SPDX-License-Identifier: Apache-2.0
"""Frames and payloads over a TCP socket, every read and write under one deadline."""

from __future__ import annotations

import socket
import time
import zlib
from dataclasses import dataclass

from dynamo_mpi.engines.reference.kv_wire import HEADER_BYTES, Message, body_size, decode, encode

_MOST_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Deadline:
    """A moment of the monotonic clock."""

    moment: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Return the seconds that are left.

        Raises:
            TimeoutError: none are.
        """
        seconds = self.moment - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("timed out")
        return seconds


class FrameSocket:
    """One connection.

    Args:
        connection: connected; the caller closes it.
        deadline: for everything that is still to come; it may be moved.
    """

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self._socket = connection
        self.deadline = deadline

    def send(self, message: Message) -> None:
        """Send one frame."""
        self.send_payload(memoryview(encode(message)))

    def receive(self) -> Message:
        """Return the next frame.

        Raises:
            WireError: what came is none.
            ConnectionError: the peer has gone.
            TimeoutError: the deadline has passed.
        """
        header = bytearray(HEADER_BYTES)
        self.receive_payload(memoryview(header))
        body = bytearray(body_size(bytes(header)))
        self.receive_payload(memoryview(body))
        return decode(bytes(header + body))

    def send_payload(self, payload: memoryview) -> None:
        """Send bytes."""
        while payload:
            self._socket.settimeout(self.deadline.left())
            payload = payload[self._socket.send(payload) :]

    def receive_payload(self, target: memoryview) -> int:
        """Fill ``target``; return its CRC-32, made of each part while the next is on its way."""
        checksum = 0
        while target:
            self._socket.settimeout(self.deadline.left())
            count = self._socket.recv_into(target[:_MOST_AT_ONCE])
            if not count:
                raise ConnectionError("the peer closed the connection")
            checksum = zlib.crc32(target[:count], checksum)
            target = target[count:]
        return checksum
