# SPDX-License-Identifier: Apache-2.0
"""The HTTP side of the health endpoint, in threads of the node agent: Kubernetes probes, metrics, and what the Dynamo runtime answers.

The number of connections, of forwarded requests and the time of each are bounded.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler

from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any, Protocol, cast
from dynamo_mpi.telemetry.health_state import Answer, health, live, metrics_of
from dynamo_mpi.telemetry.metrics import CONTENT_TYPE
from dynamo_mpi.telemetry.request_listener import CLIENT_SECONDS, RequestListener

if TYPE_CHECKING:
    from dynamo_mpi.telemetry.health_address import HealthEndpoint
    from dynamo_mpi.telemetry.health_state import HealthState

_JSON, _TEXT = "application/json", "text/plain; charset=utf-8"
# by default, a probe times out after a second
_RUNTIME_SECONDS = 0.8
_MAX_RELAYS = 64
_MAX_METRICS = 16 << 20
_CHUNK_BYTES = 64 << 10
# they would keep a connection open for requests that this server must answer
_PER_CONNECTION = ("connection", "keep-alive", "proxy-connection", "upgrade")


class HasState(Protocol):
    """Has the rank's current state."""

    @property
    def state(self) -> HealthState:
        """The state."""


class HealthServer:
    """Answers HTTP requests from the rank's reported state, with one request per connection.

    Args:
        endpoint: its address, the paths that it answers, and the listening socket.
        source: has the rank's state.
    """

    def __init__(self, endpoint: HealthEndpoint, source: HasState) -> None:
        self.address, self._source = endpoint.address, source
        self.relays = threading.BoundedSemaphore(_MAX_RELAYS)
        self._requests = RequestListener(endpoint.listener, self._answer)

    @property
    def state(self) -> HealthState:
        """What the rank has said last."""
        return self._source.state

    def run(self) -> None:
        """Answer requests until `close` is called."""
        self._requests.run()

    def close(self) -> None:
        """Close the listening socket and all connections. From any thread."""
        self._requests.close()

    def release(self, connection: socket.socket) -> None:
        """Remove a connection's time limit."""
        self._requests.release(connection)

    def _answer(self, connection: socket.socket, address: Any) -> None:
        _Handler(connection, address, cast("Any", self))

    def connect_to_runtime(self, timeout: float) -> socket.socket:
        """Connect to the Dynamo runtime's own port.

        Raises:
            OSError: it doesn't answer within ``timeout`` seconds.
        """
        host = self.address.host.strip("[]")
        if self.address.is_everywhere:
            host = "::1" if host == "::" else "127.0.0.1"
        return socket.create_connection((host, self.state.runtime), timeout)

    def ask_runtime(self, path: str) -> tuple[int, bytes]:
        """GET from the Dynamo runtime; status 0 if it does not answer in time."""
        deadline = time.monotonic() + _RUNTIME_SECONDS
        connection = http.client.HTTPConnection("localhost")
        try:
            connection.sock = sock = self.connect_to_runtime(_RUNTIME_SECONDS)
            connection.request("GET", path, headers={"Connection": "close"})
            reply = connection.getresponse()
            body = b""
            while len(body) < _MAX_METRICS and (data := reply.read1(_CHUNK_BYTES)):
                body += data
                # a socket's own timeout restarts with every byte; Python 3.13 closes it with the last one
                if sock.fileno() >= 0:
                    sock.settimeout(max(0.001, deadline - time.monotonic()))
            return reply.status, body
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def health(self) -> Answer:
        """Return the answer of ``/health``; only a world that serves has a runtime to query."""
        answer = health(self.state, time.monotonic())
        if answer.status != 200 or not self.state.runtime:
            return answer
        status, body = self.ask_runtime(self.address.health_path)
        try:
            content = json.loads(body)
        except ValueError:
            content = {}
        return health(self.state, time.monotonic(), (status, content if isinstance(content, dict) else {}))

    def metrics(self) -> str:
        """Return the answer of ``/metrics``: this world's metrics, then the runtime's."""
        text = metrics_of(self.state, ready=self.health().status == 200)
        status, body = self.ask_runtime("/metrics") if self.state.runtime else (0, b"")
        return text + (body.decode("utf-8", "replace") if status == 200 else "")


class _Handler(BaseHTTPRequestHandler):
    """Answers one request; forwards other paths to the Dynamo runtime."""

    server: HealthServer  # type: ignore[assignment] # only this project's methods use it
    timeout = int(CLIENT_SECONDS)
    protocol_version = default_request_version = "HTTP/1.1"
    server_version, sys_version = "dynamo_mpi", ""
    error_message_format, error_content_type = "%(message)s\n", _TEXT

    def parse_request(self) -> bool:
        """Read the head; reject HTTP/0.9, and lines that are no header fields."""
        if not super().parse_request():
            return False
        self.close_connection = True
        if len(self.requestline.split()) != 3 or self.headers.defects:
            self.send_error(400, "this is no HTTP/1.1 request")
            return False
        return True

    def handle_expect_100(self) -> bool:
        """Leave it to the runtime: requests that are answered here have no body."""
        return True

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a probe comes every few seconds."""

    def _handle(self) -> None:
        address, state = self.server.address, self.server.state
        path = self.path.partition("?")[0]
        if path in (address.health_path, address.live_path, "/metrics"):
            if self.command not in ("GET", "HEAD"):
                self._send(405, _TEXT, "GET or HEAD\n")
            elif path == "/metrics":
                self._send(200, CONTENT_TYPE, self.server.metrics())
            else:
                answer = live(state, time.monotonic()) if path == address.live_path else self.server.health()
                self._send(answer.status, _JSON, json.dumps(answer.body))
        elif not state.runtime:
            more = "" if state.rank else "; the Dynamo runtime, which answers more, has not started yet"
            paths = f"{address.live_path}, {address.health_path} and /metrics"
            self._send(404, _TEXT, f"Route not found: there are {paths}{more}\n")
        elif not self.server.relays.acquire(blocking=False):
            self._send(503, _TEXT, "too many requests are being forwarded to the Dynamo runtime\n")
        else:
            try:
                self._relay()
            finally:
                self.server.relays.release()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _handle

    def _send(self, status: int, content_type: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _relay(self) -> None:
        """Forward the request to the Dynamo runtime, and its answer to the client, unchanged."""
        # it may take minutes: an engine may profile itself
        self.server.release(self.connection)
        try:
            runtime = self.server.connect_to_runtime(CLIENT_SECONDS)
        except OSError:
            text = f"the Dynamo runtime does not answer at its port {self.server.state.runtime}\n"
            self._send(502, _TEXT, text)
            return
        kept = [f"{name}: {value}" for name, value in self.headers.items() if name.lower() not in _PER_CONNECTION]
        head = "\r\n".join([self.requestline, *kept, "Connection: close", "", ""]).encode("iso-8859-1")
        # the part of the body that was read together with the head
        self.connection.setblocking(False)
        body = self.rfile.peek()  # type: ignore[attr-defined] # it is a BufferedReader
        with runtime:
            for sock in (self.connection, runtime):
                sock.settimeout(None)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(CLIENT_SECONDS), 0))
            runtime.sendall(head + body)
            upload = threading.Thread(target=_pump, args=(self.connection, runtime), name="upload", daemon=True)
            upload.start()
            _pump(runtime, self.connection)
            for sock in (self.connection, runtime):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            upload.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Copy until the end, and pass the end on: if the client has disconnected, the runtime can stop."""
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK_BYTES):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
