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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Protocol

from dynamo_mpi.common.admission import Admission
from dynamo_mpi.telemetry.health_state import Answer, health, live, metrics_of
from dynamo_mpi.telemetry.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from dynamo_mpi.telemetry.health_address import HealthEndpoint
    from dynamo_mpi.telemetry.health_state import HealthState

_JSON, _TEXT = "application/json", "text/plain; charset=utf-8"
# time limit for a client to send its request and read the answer; a probe takes milliseconds
_CLIENT_SECONDS = 10
# by default, a probe times out after a second
_RUNTIME_SECONDS = 0.8
_MAX_STRANGERS = 256
_MAX_ANSWERS = 256
_MAX_RELAYS = 64
_MAX_METRICS = 16 << 20
_CHUNK_BYTES = 64 << 10
_RETRY_SECONDS = 0.05
# they would keep a connection open for requests that this server must answer
_PER_CONNECTION = ("connection", "keep-alive", "proxy-connection", "upgrade")


class HasState(Protocol):
    """Has the rank's current state."""

    @property
    def state(self) -> HealthState:
        """The state."""


class HealthServer(ThreadingHTTPServer):
    """Answers HTTP requests from the rank's reported state, with one request per connection and thread.

    Args:
        endpoint: its address, the paths that it answers, and the listening socket.
        source: has the rank's state.
    """

    daemon_threads = True

    def __init__(self, endpoint: HealthEndpoint, source: HasState) -> None:
        listener = endpoint.listener
        super().__init__(listener.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.address, self._source = endpoint.address, source
        self.relays = threading.BoundedSemaphore(_MAX_RELAYS)
        self._lock = threading.Lock()
        # those that have not sent a whole request, and those that have
        self._strangers: Admission[socket.socket] = Admission(_MAX_STRANGERS, _CLIENT_SECONDS)
        self._answering: dict[socket.socket, float] = {}

    @property
    def state(self) -> HealthState:
        """What the rank has said last."""
        return self._source.state

    def close(self) -> None:
        """Close the listening socket and all connections."""
        self.shutdown()
        self.server_close()
        with self._lock:
            for connection in (*self._strangers, *self._answering):
                _cut(connection)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection."""
        try:
            return super().get_request()
        except OSError:  # for instance too many open files; the listener stays readable
            time.sleep(_RETRY_SECONDS)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the request, unless the connection must make room for others."""
        with self._lock:
            displaced = self._strangers.enter(request, client_address[0], time.monotonic())
            for connection in displaced:
                _cut(connection)
        if request in displaced:
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def begin_request(self, request: socket.socket) -> None:
        """Note that a request has begun."""
        with self._lock:
            self._strangers.begin_request(request, time.monotonic())

    def begin_answer(self, request: socket.socket) -> bool:
        """Note that a request is whole: from now on, no other connection displaces this one. Return whether it may be answered."""
        with self._lock:
            if request not in self._strangers or len(self._answering) >= _MAX_ANSWERS:
                return False
            self._strangers.leave(request)
            self._answering[request] = time.monotonic()
            return True

    def service_actions(self) -> None:
        """Close the connections of clients that have not sent a request, or not read the answer, in time. Called every half second."""
        now = time.monotonic()
        with self._lock:
            late = [connection for connection, since in self._answering.items() if now - since > _CLIENT_SECONDS]
            for connection in (*self._strangers.expired(now), *late):
                self._answering.pop(connection, None)
                _cut(connection)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        self.release(request)
        super().shutdown_request(request)

    def release(self, request: socket.socket) -> None:
        """Remove a connection's time limit."""
        with self._lock:
            self._strangers.leave(request)
            self._answering.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the error: the client has disconnected."""

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
                # a socket's own timeout restarts with every byte
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

    server: HealthServer
    timeout = _CLIENT_SECONDS
    protocol_version = default_request_version = "HTTP/1.1"
    server_version, sys_version = "dynamo_mpi", ""
    error_message_format, error_content_type = "%(message)s\n", _TEXT

    def parse_request(self) -> bool:
        """Read the head; reject HTTP/0.9, and lines that are no header fields."""
        self.server.begin_request(self.connection)
        if not super().parse_request():
            return False
        self.close_connection = True
        if not self.server.begin_answer(self.connection):
            return False
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
            runtime = self.server.connect_to_runtime(_CLIENT_SECONDS)
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
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _CLIENT_SECONDS, 0))
            runtime.sendall(head + body)
            upload = threading.Thread(target=_pump, args=(self.connection, runtime), name="upload", daemon=True)
            upload.start()
            _pump(runtime, self.connection)
            for sock in (self.connection, runtime):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            upload.join()


def _cut(connection: socket.socket) -> None:
    # its thread, which waits for the client, continues and closes it
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Copy until the end, and pass the end on: if the client has disconnected, the runtime can stop."""
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK_BYTES):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
