# SPDX-License-Identifier: Apache-2.0
"""The protocol between pods and their leader: lines of JSON over TCP, each with an HMAC of the group's secret.

    leader: {"nonce"}
    pod:    {"nonce", "index", "host", "proof"}
    leader: {"proof"}
    then, with a key of this connection and a number that counts up:
    leader: {"start": {"daemon", "arguments"}}, {"end": exit code}
    pod:    {"started": true}, {"failed": text}, {"stop": signal}, {"ended": the daemon's exit code}

The secret itself is never sent. The messages aren't encrypted, as they contain no secret.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import socket
from typing import Any

from dynamo_mpi.common.errors import AuthorizationError

MOST_LINE = 1 << 18
HANDSHAKE_SECONDS = 10.0
_NONCE_BYTES = 16
# a lost node sends nothing: keepalive ends its connection after about a minute
_KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 60_000}


class Channel:
    """A connection with mutual authentication.

    Args:
        reader: the incoming stream.
        writer: the outgoing stream.
        key: the key of this connection.
        mine: this side, ``pod`` or ``lead``.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes, mine: str, theirs: str
    ) -> None:
        self._reader, self._writer, self._key = reader, writer, key
        self._mine, self._theirs = mine, theirs
        self._sent = self._received = 0

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. Does not wait."""
        self._sent += 1
        text = json.dumps(message, separators=(",", ":"))
        self._writer.write(f"{self._proof(self._mine, self._sent, text)} {text}\n".encode())

    async def receive(self) -> dict[str, Any] | None:
        """Return the next message; None if the connection is lost, or the message isn't authentic."""
        line = await _line(self._reader)
        proof, _, text = line.partition(" ")
        self._received += 1
        if not text or not _is_same(proof, self._proof(self._theirs, self._received, text)):
            return None
        return _object(text)

    async def close(self) -> None:
        """Flush and close the connection. Idempotent."""
        try:
            await asyncio.wait_for(self._writer.drain(), HANDSHAKE_SECONDS)
            self._writer.close()
            await asyncio.wait_for(self._writer.wait_closed(), HANDSHAKE_SECONDS)
        except (OSError, asyncio.TimeoutError):
            self._writer.transport.abort()

    def _proof(self, side: str, number: int, text: str) -> str:
        return hmac.digest(self._key, f"{side} {number} {text}".encode(), "sha256").hex()


def enable_keepalive(writer: asyncio.StreamWriter) -> None:
    """Enable TCP keepalive, so that a connection ends if the peer's node is lost."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


async def accept(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes
) -> tuple[Channel, int, str] | None:
    """Authenticate a pod, as the leader.

    Returns:
        The connection, and the pod's index and host name; None if the pod doesn't know the secret.
    """
    nonce = secrets.token_hex(_NONCE_BYTES)
    writer.write(json.dumps({"nonce": nonce}).encode() + b"\n")
    request = _object(await _line(reader)) or {}
    index, host, theirs, proof = (request.get(name) for name in ("index", "host", "nonce", "proof"))
    if type(index) is not int or not all(isinstance(part, str) for part in (host, theirs, proof)):
        return None
    if not _is_same(str(proof), _prove(secret, "pod", nonce, theirs, index, host)):
        writer.write(json.dumps({"refused": "the secret is another"}).encode() + b"\n")
        return None
    writer.write(json.dumps({"proof": _prove(secret, "lead", nonce, theirs, index, host)}).encode() + b"\n")
    return Channel(reader, writer, _key(secret, nonce, theirs), "lead", "pod"), index, str(host)


async def join(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, index: int, host: str
) -> Channel | None:
    """Authenticate to the leader, as a pod.

    Returns:
        The connection; None if the leader closed it meanwhile.

    Raises:
        AuthorizationError: leader and pod have different secrets.
    """
    nonce = secrets.token_hex(_NONCE_BYTES)
    hello = await _line(reader)
    if not hello:
        return None
    theirs = (_object(hello) or {}).get("nonce")
    proof = _prove(secret, "pod", theirs, nonce, index, host)
    writer.write(json.dumps({"nonce": nonce, "index": index, "host": host, "proof": proof}).encode() + b"\n")
    reply = await _line(reader)
    if not reply:
        return None
    answer = (_object(reply) or {}).get("proof")
    if not isinstance(answer, str) or not _is_same(answer, _prove(secret, "lead", theirs, nonce, index, host)):
        raise AuthorizationError(
            "the leader refused this pod, or couldn't prove that it is the leader",
            expected="the same secret in all pods of a group",
            fix="mount one Secret in all of them; see --secret-file",
        )
    return Channel(reader, writer, _key(secret, theirs, nonce), "pod", "lead")


def _prove(secret: bytes, side: str, *parts: object) -> str:
    return hmac.digest(secret, json.dumps([side, *parts]).encode(), "sha256").hex()


def _is_same(proof: str, due: str) -> bool:
    # an unauthenticated peer may send any text, not only ASCII
    return hmac.compare_digest(proof.encode("utf-8", "replace"), due.encode())


def _key(secret: bytes, *nonces: object) -> bytes:
    return hmac.digest(secret, json.dumps(["key", *nonces]).encode(), "sha256")


async def _line(reader: asyncio.StreamReader) -> str:
    try:
        line = await reader.readline()
    except (OSError, ValueError):  # ValueError: a line without an end
        return ""
    return line.decode("utf-8", "replace").removesuffix("\n") if line.endswith(b"\n") else ""


def _object(text: str) -> dict[str, Any] | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
