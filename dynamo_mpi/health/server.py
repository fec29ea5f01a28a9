# SPDX-License-Identifier: Apache-2.0
"""The process that answers a node's probes, beside the node's first rank.

It is no thread of the rank, whose interpreter native code may hold for minutes while it loads: a probe without an answer gets a whole pod
killed. It ends with its rank, whatever that ends by.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from typing import TYPE_CHECKING, Any

from dynamo_mpi.health.http import END_OF_HEAD, Request, read_request, response, status_and_body
from dynamo_mpi.health.state import Answer, State, health, live, metrics_of, note
from dynamo_mpi.observe.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from dynamo_mpi.health.address import ProbeAddress

_JSON, _TEXT = "application/json", "text/plain; charset=utf-8"
# a client that has connected and then says nothing, or reads nothing
_PATIENCE_SECONDS = 10.0
# a probe gives up after a second by default
_RUNTIME_SECONDS = 0.8
_MOST_CONNECTIONS = 64
_MOST_RELAYS = 64
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
        # in the order in which they came
        self._open: dict[asyncio.StreamWriter, None] = {}
        self._relays = 0

    async def run(self, listener: socket.socket, rank: socket.socket) -> None:
        """Serve until the rank has gone.

        Args:
            listener: listens already.
            rank: a connection to the rank, which is only read.
        """
        reader, writer = await asyncio.open_connection(sock=rank, limit=_LINE_BYTES)
        server = await asyncio.start_server(self._serve, sock=listener, limit=_MOST_HEAD)
        hearing = asyncio.ensure_future(self._hear(reader))
        with _at_end_of(self.state.pid, hearing.cancel), contextlib.suppress(asyncio.CancelledError):
            await hearing
        server.close()
        writer.close()

    async def _hear(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                text = line.decode("utf-8", "replace").rstrip("\n")
                self.state = note(self.state, text, time.monotonic(), time.time())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= _MOST_CONNECTIONS:
            # a probe takes milliseconds: whoever has been here for longest is none, and must not keep one out
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.transport.abort()
        self._open[writer] = None
        try:
            await self._answer(reader, writer)
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            # to close it would mean to wait until it has read everything
            writer.transport.abort()
        finally:
            self._open.pop(writer, None)
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
        elif self.state.runtime and self._relays >= _MOST_RELAYS:
            data = response(503, _TEXT, b"too many requests are being handed on to the Dynamo runtime\n")
        elif self.state.runtime:
            # it may take minutes, and is the runtime's then
            self._open.pop(writer, None)
            self._relays += 1
            try:
                await self._relay(request, reader, writer)
            finally:
                self._relays -= 1
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
            sending = asyncio.ensure_future(_pump_all(reader, ours))
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


async def _pump_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hand on to the end, and that it is the end: a client that has left is for the runtime to leave, too."""
    await _pump(reader, writer)
    writer.write_eof()


@contextlib.contextmanager
def _at_end_of(pid: int, call: Callable[[], object]) -> Iterator[None]:
    """Call this when a process has ended. The end of its connection need not tell: what it has forked may hold that open."""
    try:
        descriptor = os.pidfd_open(pid)
    except (OSError, AttributeError):  # not every kernel can, nor every Python: its connection has to tell then
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, call)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
