# SPDX-License-Identifier: Apache-2.0
"""A line to NATS for what may get lost: whatever NATS does, nobody here waits for it.

All of it runs in a thread of its own, on an event loop of its own. What can't be sent is kept, up to a limit, and sent in its order when
NATS is there again; the oldest goes first where there is too much of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_mpi.control_plane.nats_auth import NatsAuth

_MOST_KEPT = 256
_CONNECT_SECONDS = 3.0
_ANSWER_SECONDS = 2.0
_CLOSE_SECONDS = 0.5
_LEAST_REST_SECONDS, _MOST_REST_SECONDS = 0.5, 10.0


class Message(NamedTuple):
    """What is to be sent, and where to."""

    subject: str
    data: bytes


class NatsPublisher:
    """One connection to NATS, and what waits for it.

    Args:
        server: its address.
        auth: who we are.
        say: for a line to the user.
    """

    def __init__(self, server: str, auth: NatsAuth, say: Callable[[str], None]) -> None:
        self._server = server if "://" in server else f"nats://{server}"
        self._auth, self._say = auth, say
        # appended to by any thread, or by a signal's handler
        self._waiting: deque[Message] = deque(maxlen=_MOST_KEPT)
        # taken from there, and not confirmed yet
        self._sending: list[Message] = []
        # of those who wait until all has been sent
        self._waiters: deque[threading.Event] = deque()
        self._promised: list[threading.Event] = []
        self._trying = True
        self._has_warned = self._has_confirmed = False
        self._close_at = float("inf")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bell: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        """Begin to connect. Does not wait."""
        self._thread.start()

    def send(self, message: Message) -> None:
        """Send soon. Never waits, and may be called from a signal's handler."""
        # no lock: a handler may have interrupted whoever holds it
        self._waiting.append(message)
        self._ring()

    def flush(self, seconds: float) -> None:
        """Wait until all has been sent, or ``seconds`` have passed; not at all where NATS is away."""
        if self._trying:
            done = threading.Event()
            self._waiters.append(done)
            self._ring()
            done.wait(seconds)

    def close(self, seconds: float) -> None:
        """The same, and end the connection. Idempotent."""
        self._close_at = min(self._close_at, time.monotonic() + seconds)
        self._ring()
        if self._trying and self._thread.is_alive():
            self._thread.join(max(0.0, self._close_at - time.monotonic()))

    def _ring(self) -> None:
        loop, bell = self._loop, self._bell
        if loop is not None and bell is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                loop.call_soon_threadsafe(bell.set)

    def _run(self) -> None:
        # nobody is to hear of it but the user, once
        with contextlib.suppress(Exception):
            asyncio.run(self._live())
        self._trying = False
        self._release()

    async def _live(self) -> None:
        self._bell = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        rest = _LEAST_REST_SECONDS
        while not self._is_over():
            client = await self._connected()
            self._trying = client is not None
            if client is None:
                self._release()
                if self._close_at < float("inf"):
                    return
            else:
                self._has_confirmed = False
                # nats-py has many errors, and the loop others
                with contextlib.suppress(Exception):
                    await self._deliver(client)
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(client.close(), _CLOSE_SECONDS)
                # one that lets us in and hangs up each time isn't asked faster than one that is away
                rest = _LEAST_REST_SECONDS if self._has_confirmed else rest
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._closing(), rest)
            rest = min(2 * rest, _MOST_REST_SECONDS)

    def _is_over(self) -> bool:
        closing = self._close_at < float("inf")
        return closing and (not (self._sending or self._waiting) or time.monotonic() > self._close_at)

    async def _closing(self) -> None:
        while self._close_at == float("inf"):
            await self._rung()

    def _keep_promises(self) -> None:
        while self._promised:
            self._promised.pop().set()

    def _release(self) -> None:
        self._keep_promises()
        while self._waiters:
            self._waiters.popleft().set()

    async def _rung(self) -> None:
        if self._bell is not None:
            await self._bell.wait()
            self._bell.clear()

    async def _connected(self) -> Any:
        try:
            from nats.aio.client import Client

            client = Client()
            await asyncio.wait_for(client.connect(self._server, **self._options()), _CONNECT_SECONDS)
            return client
        except ImportError as error:
            self._warn(
                f"{error.name or error} isn't installed",
                f"pip install {'nkeys' if error.name == 'nkeys' else 'nats-py'}",
            )
        except Exception as error:  # nats-py raises its own, the loop's, the system's
            self._warn(
                str(error) or type(error).__name__,
                "look at nats-server; NATS_SERVER, NATS_AUTH_* and NATS_TLS_* say how it is reached",
            )
        return None

    def _options(self) -> dict[str, Any]:
        auth, login = self._auth, self._auth.connect_options()
        options: dict[str, Any] = {
            "name": "dynamo_mpi",
            # we begin anew ourselves, with what was not confirmed
            "allow_reconnect": False,
            "connect_timeout": _CONNECT_SECONDS,
            "user": login.get("user"),
            "password": login.get("pass"),
            "token": login.get("auth_token"),
            "error_cb": self._ignore,
            "closed_cb": self._lost,
        }
        if auth.uses_nkey:
            options |= {"nkeys_seed_str": auth.nkey} if auth.nkey else {"user_credentials": auth.credentials_file}
        if self._server.startswith("tls://") or auth.has_tls:
            options["tls"] = auth.tls()
        return options

    async def _ignore(self, _: Exception) -> None:
        """Say nothing: by itself nats-py would write a traceback."""

    async def _lost(self) -> None:
        if self._bell is not None:
            self._bell.set()

    async def _deliver(self, client: Any) -> None:
        """Send what there is and what comes, until the connection ends or is to end."""
        while client.is_connected:
            # first those who wait, then what they wait for
            while self._waiters:
                self._promised.append(self._waiters.popleft())
            while self._waiting and len(self._sending) < 2 * _MOST_KEPT:
                self._sending.append(self._waiting.popleft())
            is_idle = not self._sending
            for message in self._sending:
                # one that NATS never takes would keep all that come after it
                if len(message.data) <= client.max_payload:
                    await client.publish(message.subject, message.data)
            if not is_idle:
                await client.flush(_ANSWER_SECONDS)
                self._has_confirmed = True
                self._sending.clear()
            self._keep_promises()
            if self._is_over():
                return
            if is_idle:
                await self._rung()

    def _warn(self, found: str, fix: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            shown = " ".join(found.split())
            self._say(f"warning: no lifecycle events go out over NATS for now, the worker goes on: {shown}; do: {fix}")
