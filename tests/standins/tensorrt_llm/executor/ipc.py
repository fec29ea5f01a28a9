# SPDX-License-Identifier: Apache-2.0
"""Signed messages between processes."""

from __future__ import annotations

import hashlib
import hmac
import os
import pickle
import time
from typing import Any

import zmq

_DIGEST_BYTES = 32


class ZeroMqQueue:
    """A queue of pickled objects over a ZeroMQ socket, each followed by its HMAC.

    Args:
        address: endpoint and key. A server without a key makes one.
        socket_type: PAIR, PUSH or PULL.
        is_server: bind at once, or connect at the first use.
        name: for messages.
        use_hmac_encryption: sign and verify (nothing is encrypted, whatever the name says).

    Attributes:
        address: of a server: the endpoint that was bound, and the key.
    """

    def __init__(
        self,
        address: tuple[str, bytes | None] | None = None,
        *,
        socket_type: int = zmq.PAIR,
        is_server: bool,
        name: str | None = None,
        use_hmac_encryption: bool = True,
    ) -> None:
        endpoint, key = address or ("tcp://127.0.0.1:*", None)
        if use_hmac_encryption and not is_server and key is None:
            raise ValueError("Client must receive HMAC key when encryption is enabled")
        if not use_hmac_encryption and key is not None:
            raise ValueError("Server and client should not receive HMAC key when encryption is disabled")
        self.name = name
        self._key = key or (os.urandom(_DIGEST_BYTES) if use_hmac_encryption else None)
        self._context = zmq.Context()
        self._socket = self._context.socket(socket_type)
        self._socket.set_hwm(0)
        self._endpoint: str | None = endpoint
        if is_server:
            self._socket.bind(endpoint)
            self.address = (self._socket.getsockopt_string(zmq.LAST_ENDPOINT), self._key)
            self._endpoint = None

    def put(self, obj: Any) -> None:
        """Send, waiting for a peer."""
        self._connected().send(self._sign(obj))

    def put_noblock(self, obj: Any, *, retry: int = 1, wait_time: float = 0.001) -> None:
        """Send if there is a peer, else drop it silently after ``retry`` more tries."""
        for attempt in range(retry + 1):
            try:
                self._connected().send(self._sign(obj), zmq.NOBLOCK)
            except zmq.Again:
                time.sleep(wait_time if attempt < retry else 0)
            else:
                return

    def get(self) -> Any:
        """Receive, waiting for ever.

        Raises:
            RuntimeError: the signature is wrong.
        """
        message = self._connected().recv()
        if self._key is not None:
            message, digest = message[:-_DIGEST_BYTES], message[-_DIGEST_BYTES:]
            if not hmac.compare_digest(hmac.digest(self._key, message, hashlib.sha256), digest):
                raise RuntimeError("HMAC verification failed")
        return pickle.loads(message)  # noqa: S301 - signed, and what the real one does

    def poll(self, timeout: float) -> bool:
        """Return whether something is there, after ``timeout`` seconds at the latest."""
        return bool(self._connected().poll(round(timeout * 1000)))

    def close(self) -> None:
        """Close without waiting for what was not sent, but for a second."""
        if not self._socket.closed:
            self._socket.close(linger=1000)
            self._context.term()

    def _connected(self) -> zmq.Socket[bytes]:
        if self._endpoint is not None:
            self._socket.connect(self._endpoint)
            self._endpoint = None
        return self._socket

    def _sign(self, obj: Any) -> bytes:
        data = pickle.dumps(obj)
        return data if self._key is None else data + hmac.digest(self._key, data, hashlib.sha256)
