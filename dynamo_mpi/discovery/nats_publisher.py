# SPDX-License-Identifier: Apache-2.0
"""Publish messages over NATS without a guarantee of delivery: the worker never waits for NATS.

All of it runs in a thread of its own, on an event loop of its own. Messages that can't be sent are queued, up to a limit, and sent in their
order when NATS is back; if there are too many, the oldest are dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_mpi.discovery.nats_auth import NatsAuth

_MAX_QUEUED = 256
_CONNECT_SECONDS = 3.0
_ANSWER_SECONDS = 2.0
_CLOSE_SECONDS = 0.5
_MIN_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.5, 10.0


def _is_no_end_of_tls(record: logging.LogRecord) -> bool:
    return "eof_received() has no effect when using ssl" not in str(record.msg)


class Message(NamedTuple):
    """A message and its subject."""

    subject: str
    data: bytes


class NatsPublisher:
    """One connection to NATS, and the messages queued for it.

    Args:
        server: NATS's address.
        auth: our credentials.
        warn: logs a warning.
    """

    def __init__(self, server: str, auth: NatsAuth, warn: Callable[[str], None]) -> None:
        self._server = server if "://" in server else f"nats://{server}"
        self._auth, self._log_warning = auth, warn
        # any thread, or a signal handler, appends to it
        self._queued: deque[Message] = deque(maxlen=_MAX_QUEUED)
        # taken from the queue, and not confirmed by NATS yet
        self._unconfirmed: list[Message] = []
        # callers of `flush`, and those whose messages are being sent
        self._flushes: deque[threading.Event] = deque()
        self._flushing: list[threading.Event] = []
        self._is_trying = True
        self._has_warned = self._has_confirmed = False
        self._close_at = float("inf")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wakeup: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        """Start the connection. Does not wait."""
        self._thread.start()

    def send(self, message: Message) -> None:
        """Queue a message. Never waits, and may be called from a signal handler."""
        # no lock: a handler may have interrupted the thread that holds it
        self._queued.append(message)
        self._wake()

    def flush(self, seconds: float) -> None:
        """Wait until all messages are sent, at most ``seconds``; don't wait if NATS isn't connected."""
        if self._is_trying:
            done = threading.Event()
            self._flushes.append(done)
            self._wake()
            done.wait(seconds)

    def close(self, seconds: float) -> None:
        """Flush, and close the connection. Idempotent."""
        self._close_at = min(self._close_at, time.monotonic() + seconds)
        self._wake()
        if self._is_trying and self._thread.is_alive():
            self._thread.join(max(0.0, self._close_at - time.monotonic()))

    def _wake(self) -> None:
        loop, wakeup = self._loop, self._wakeup
        if loop is not None and wakeup is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                loop.call_soon_threadsafe(wakeup.set)

    def _run(self) -> None:
        # the user is warned once; the error must have no other effect
        with contextlib.suppress(Exception):
            asyncio.run(self._main())
        self._is_trying = False
        self._abandon_flushes()

    async def _main(self) -> None:
        self._wakeup = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        backoff = _MIN_BACKOFF_SECONDS
        while not self._is_over():
            client = await self._connected()
            self._is_trying = client is not None
            if client is None:
                self._abandon_flushes()
                if self._close_at < float("inf"):
                    return
            else:
                self._has_confirmed = False
                # nats-py has many error classes, and so has the event loop
                with contextlib.suppress(Exception):
                    await self._deliver(client)
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(client.close(), _CLOSE_SECONDS)
                # a server that accepts and then closes each connection is tried no more often than one that is down
                backoff = _MIN_BACKOFF_SECONDS if self._has_confirmed else backoff
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._closing(), backoff)
            backoff = min(2 * backoff, _MAX_BACKOFF_SECONDS)

    def _is_over(self) -> bool:
        closing = self._close_at < float("inf")
        return closing and (not (self._unconfirmed or self._queued) or time.monotonic() > self._close_at)

    async def _closing(self) -> None:
        while self._close_at == float("inf"):
            await self._wait_for_wakeup()

    def _finish_flushes(self) -> None:
        while self._flushing:
            self._flushing.pop().set()

    def _abandon_flushes(self) -> None:
        self._finish_flushes()
        while self._flushes:
            self._flushes.popleft().set()

    async def _wait_for_wakeup(self) -> None:
        if self._wakeup is not None:
            await self._wakeup.wait()
            self._wakeup.clear()

    async def _connected(self) -> Any:
        try:
            from nats.aio.client import Client

            # nats-py upgrades a plain stream to TLS, whose end asyncio then warns of
            logging.getLogger("asyncio").addFilter(_is_no_end_of_tls)
            client = Client()
            await asyncio.wait_for(client.connect(self._server, **self._options()), _CONNECT_SECONDS)
            return client
        except ImportError as error:
            self._warn(
                f"{error.name or error} isn't installed",
                f"pip install {'nkeys' if error.name == 'nkeys' else 'nats-py'}",
            )
        except Exception as error:  # errors of nats-py, of the event loop, of the system
            self._warn(
                str(error) or type(error).__name__,
                "check nats-server, and NATS_SERVER, NATS_AUTH_* and NATS_TLS_*",
            )
        return None

    def _options(self) -> dict[str, Any]:
        auth, login = self._auth, self._auth.connect_options()
        options: dict[str, Any] = {
            "name": "dynamo_mpi",
            # this class reconnects itself, and sends unconfirmed messages again
            "allow_reconnect": False,
            "connect_timeout": _CONNECT_SECONDS,
            "user": login.get("user"),
            "password": login.get("pass"),
            "token": login.get("auth_token"),
            "error_cb": self._ignore,
            "closed_cb": self._on_closed,
        }
        if auth.uses_nkey:
            options |= {"nkeys_seed_str": auth.nkey} if auth.nkey else {"user_credentials": auth.credentials_file}
        if self._server.startswith("tls://") or auth.has_tls:
            options["tls"] = auth.tls()
        return options

    async def _ignore(self, _: Exception) -> None:
        """Ignore errors: by default nats-py writes a traceback."""

    async def _on_closed(self) -> None:
        if self._wakeup is not None:
            self._wakeup.set()

    async def _deliver(self, client: Any) -> None:
        """Send queued messages, until the connection is lost or must be closed."""
        while client.is_connected:
            # first the flushes, then the messages that they wait for
            while self._flushes:
                self._flushing.append(self._flushes.popleft())
            while self._queued and len(self._unconfirmed) < 2 * _MAX_QUEUED:
                self._unconfirmed.append(self._queued.popleft())
            is_idle = not self._unconfirmed
            for message in self._unconfirmed:
                # a message that NATS never accepts would block all later ones
                if len(message.data) <= client.max_payload:
                    await client.publish(message.subject, message.data)
            if not is_idle:
                await client.flush(_ANSWER_SECONDS)
                self._has_confirmed = True
                self._unconfirmed.clear()
            self._finish_flushes()
            if self._is_over():
                return
            if is_idle:
                await self._wait_for_wakeup()

    def _warn(self, found: str, fix: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            reason = " ".join(found.split())
            self._log_warning(
                f"lifecycle events can't be sent over NATS for now, the worker goes on: {reason}; fix: {fix}"
            )
