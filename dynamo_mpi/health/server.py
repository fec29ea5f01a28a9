# SPDX-License-Identifier: Apache-2.0
"""The process that answers a node's probes, beside the node's first rank.

It is no thread of the rank, whose interpreter native code may hold for minutes while it loads: a probe without an answer gets a whole pod
killed. It ends with its rank, whatever that ends by.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

from dynamo_mpi.health.http import END_OF_HEAD, Request, read_request, response, status_and_body
from dynamo_mpi.health.state import Answer, State, health, live, metrics_of, note
from dynamo_mpi.observe.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    import socket

    from dynamo_mpi.health.address import ProbeAddress

_JSON, _TEXT = "application/json", "text/plain; charset=utf-8"
# a client that has connected and then says nothing, or reads nothing
_PATIENCE_SECONDS = 10.0
# a probe gives up after a second by default
_RUNTIME_SECONDS = 0.8
_MOST_CONNECTIONS = 64
_MOST_HEAD = 32 << 10
_MOST_METRICS = 16 << 20
_PUMP_BYTES = 64 << 10
_LINE_BYTES = 32 << 20


class ProbeServer:
    """Answers, from what the rank tells.

    Args:
        address: where.
        state: what is known at first.
    """

    def __init__(self, address: ProbeAddress, state: State) -> None:
        self._address, self.state = address, state
        self._open = 0

    async def run(self, listener: socket.socket, rank: socket.socket) -> None:
        """Serve until the rank has gone.

        Args:
            listener: listens already.
            rank: a connection to the rank, which is only read.
        """
        reader, writer = await asyncio.open_connection(sock=rank, limit=_LINE_BYTES)
        server = await asyncio.start_server(self._serve, sock=listener, limit=_MOST_HEAD)
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                text = line.decode("utf-8", "replace").rstrip("\n")
                self.state = note(self.state, text, time.monotonic(), time.time())
        server.close()
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            # without a word to those who are too many: they would be as many again with one
            if self._open <= _MOST_CONNECTIONS:
                await self._answer(reader, writer)
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = None
        with contextlib.suppress(asyncio.LimitOverrunError):
            head = await asyncio.wait_for(reader.readuntil(END_OF_HEAD), _PATIENCE_SECONDS)
            request = read_request(head[: -len(END_OF_HEAD)])
        if request is None:
            data = response(400, _TEXT, b"this is no HTTP/1.1 request\n")
        elif request.path in (self._address.health_path, self._address.live_path, "/metrics"):
            data = await self._own(request)
        elif self.state.runtime:
            await self._relay(request, reader, writer)
            return
        else:
            paths = f"{self._address.live_path}, {self._address.health_path} and /metrics"
            more = "" if self.state.rank else "; the Dynamo runtime, which answers more, has not started yet"
            data = response(404, _TEXT, f"Route not found: there are {paths}{more}\n".encode())
        writer.write(data)
        await asyncio.wait_for(writer.drain(), _PATIENCE_SECONDS)

    async def _own(self, request: Request) -> bytes:
        if request.method not in ("GET", "HEAD"):
            return response(405, _TEXT, b"GET or HEAD\n")
        head_only = request.method == "HEAD"
        if request.path == "/metrics":
            text = metrics_of(self.state, ready=(await self._health()).status == 200)
            return response(200, CONTENT_TYPE, (text + await self._runtime_metrics()).encode(), head_only=head_only)
        is_live = request.path == self._address.live_path
        answer = live(self.state, time.monotonic()) if is_live else await self._health()
        return response(answer.status, _JSON, json.dumps(answer.body).encode(), head_only=head_only)

    async def _health(self) -> Answer:
        answer = health(self.state, time.monotonic())
        # while the world is loading, the runtime isn't there to be asked
        if answer.status != 200 or not self.state.runtime:
            return answer
        return health(self.state, time.monotonic(), await self._runtime_health())

    async def _runtime_health(self) -> tuple[int, dict[str, Any]]:
        status, body = await self._ask(self._address.health_path)
        try:
            content = json.loads(body)
        except ValueError:
            content = {}
        return status, content if isinstance(content, dict) else {}

    async def _runtime_metrics(self) -> str:
        if not self.state.runtime:
            return ""
        status, body = await self._ask("/metrics")
        return body.decode("utf-8", "replace") if status == 200 else ""

    async def _ask(self, path: str) -> tuple[int, bytes]:
        """Ask the Dynamo runtime; status 0 where it does not answer in time."""
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            return status_and_body(await asyncio.wait_for(self._fetch(path), _RUNTIME_SECONDS))
        return 0, b""

    async def _fetch(self, path: str) -> bytes:
        reader, writer = await self._connect()
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            data = b""
            while len(data) < _MOST_METRICS and (more := await reader.read(_PUMP_BYTES)):
                data += more
            return data
        finally:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host = self._address.host.strip("[]")
        if self._address.is_everywhere:
            host = "::1" if host == "::" else "127.0.0.1"
        return await asyncio.open_connection(host, self.state.runtime)

    async def _relay(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hand a request on to the Dynamo runtime, and its answer back, as they are."""
        try:
            theirs, ours = await asyncio.wait_for(self._connect(), _PATIENCE_SECONDS)
        except (OSError, asyncio.TimeoutError):
            text = f"the Dynamo runtime does not answer at its port {self.state.runtime}\n"
            writer.write(response(502, _TEXT, text.encode()))
            await asyncio.wait_for(writer.drain(), _PATIENCE_SECONDS)
            return
        try:
            ours.write(request.relayed())
            sending = asyncio.ensure_future(_pump(reader, ours))
            try:
                await _pump(theirs, writer)
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
        finally:
            ours.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hand on until there is no more. How long that takes is not for us to say: an engine may profile itself for minutes."""
    while data := await reader.read(_PUMP_BYTES):
        writer.write(data)
        await asyncio.wait_for(writer.drain(), _PATIENCE_SECONDS)
