# SPDX-License-Identifier: Apache-2.0
"""A node agent that answers health requests: its answers, what it forwards, that it ends with its rank, and watches whatever clients do."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.log import RankLogger
from dynamo_mpi.common.ports import is_free
from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo
from dynamo_mpi.supervisor.agent_client import NodeAgentClient
from dynamo_mpi.supervisor.frame_connection import FrameConnection
from dynamo_mpi.supervisor.heartbeat_protocol import NONCE_BYTES, TOKEN_BYTES, Frame, FrameType, Join, leader_mac
from dynamo_mpi.supervisor.rendezvous import Rendezvous
from dynamo_mpi.supervisor.stacks import IDLE_THREADS
from dynamo_mpi.telemetry import health_server as server
from dynamo_mpi.telemetry import request_listener
from dynamo_mpi.telemetry.health_address import (
    HealthAddress,
    HealthEndpoint,
    open_health_endpoint,
    runtime_port,
    url_of,
)
from dynamo_mpi.telemetry.health_client import HealthClient
from dynamo_mpi.telemetry.health_service import HealthService
from dynamo_mpi.telemetry.health_state import HealthState
from tests.conftest import ROOT
from tests.unit.test_liveness import WatchedServer, received

pytestmark = pytest.mark.slow

LOOPBACK = {"DYN_SYSTEM_PORT": "0", "DYN_SYSTEM_HOST": "127.0.0.1"}
PROMPT = 10.0


def is_gone(pid: int) -> bool:
    """Return whether a process has ended, also if no other has fetched its exit code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class Node:
    """A node whose first rank is probed."""

    def __init__(self, *flags: str, **environment: str) -> None:
        variables = {**os.environ, "PYTHONPATH": str(ROOT), **LOOPBACK, **environment}
        command = [sys.executable, "-m", "tests.unit.programs.probed_rank", *flags]
        self.process = subprocess.Popen(
            command, env=variables, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.port, self.server = map(int, self.process.stdout.readline().split())

    def do(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def ask(self, path: str, method: str = "GET", body: bytes | None = None) -> tuple[int, bytes, Mapping[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PROMPT)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            reply = connection.getresponse()
            return reply.status, reply.read(), dict(reply.getheaders())

    def answers(self, path: str, status: int, /, **content: Any) -> dict[str, Any]:
        """Wait until it answers this."""
        end = time.monotonic() + PROMPT
        while True:
            answered, body, _ = self.ask(path)
            found: dict[str, Any] = json.loads(body)
            if answered == status and content.items() <= found.items():
                return found
            assert time.monotonic() < end, (path, status, content, answered, found)
            time.sleep(0.01)

    def has_ended(self) -> bool:
        """Wait until nothing is left of the answers."""
        end = time.monotonic() + PROMPT
        while time.monotonic() < end:
            if is_free(self.port) and is_gone(self.server):
                return True
            time.sleep(0.01)
        return False

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PROMPT)


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    yield made
    end(made)


@pytest.fixture(scope="module")
def lasting_node() -> Iterator[Node]:
    """One for tests that leave it as it was."""
    made = Node()
    yield made
    end(made)


def end(node: Node) -> None:
    assert node.process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        node.process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        node.process.wait(PROMPT)
    node.process.kill()
    assert node.process.stdout is not None
    node.process.stdout.close()
    assert node.has_ended()


def test_a_follower_publishes_the_state_of_the_world(node: Node) -> None:
    watched = WatchedServer()
    node.answers("/live", 200, phase="environment")
    node.do("begin mpi_init")
    found = node.answers("/health", 503, phase="mpi_init", rank=2, host="n2", status="notready")
    assert (found["waits_for"], found["pid"]) == ("all ranks of all nodes to start MPI", node.process.pid)
    node.do(f"join {watched.rendezvous.pack(b'').hex()}")
    node.do("begin load")
    node.answers("/health", 503, phase="load", role="decode")
    # this rank is through, the world isn't
    node.do("begin serve")
    node.answers("/health", 503, phase="load", rank_phase="serve")
    for phase, status in (("warmup", 503), ("serve", 200), ("drain", 503)):
        watched.server.broadcast(Frame(FrameType.PHASE, phase.encode()))
        node.answers("/health", status, phase=phase)
        assert node.answers("/live", 200)["endpoints"] == {}
    watched.server.announce_abort(70)
    assert node.answers("/live", 503)["error"] == "rank 0 on n0 ends the world"
    assert node.process.wait(PROMPT) == 70
    watched.server.close()


def test_a_follower_that_fails_reports_it_until_the_world_ends(node: Node) -> None:
    watched = WatchedServer()
    node.do(f"join {watched.rendezvous.pack(b'').hex()}")
    node.do("fail no weights")
    # where in our code it came from is for the log
    assert node.answers("/live", 503)["error"] == "RuntimeError: no weights"
    assert node.answers("/health", 503)["error"]
    watched.server.announce_abort(66)
    watched.server.close()
    node.process.wait(PROMPT)


def test_a_follower_that_has_lost_rank_0_reports_it(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        rendezvous = Rendezvous("n0", "127.0.0.1", listener.getsockname()[1], secrets.token_hex(TOKEN_BYTES))
        node.do(f"join {rendezvous.pack(b'').hex()}")
        connection, _ = listener.accept()
    with contextlib.closing(FrameConnection(connection)) as line:
        line.send(Frame(FrameType.HELLO, secrets.token_bytes(NONCE_BYTES)))
        (join, *_) = received(line)
        proof = leader_mac(bytes.fromhex(rendezvous.token), Join.unpack(join.body).nonce, 2)
        for frame in (Frame(FrameType.WELCOME, proof), Frame(FrameType.PHASE, b"serve")):
            line.send(frame)
        node.answers("/health", 200)
    # it has gone without a word
    assert node.answers("/live", 503)["error"].startswith("rank 0 on n0 ")
    assert node.process.wait(PROMPT) != 0


def test_silence_is_too_long_only_when_it_is(node: Node) -> None:
    quick = Node("--heartbeat-timeout", "1")
    try:
        for each in (quick, node):
            # rank 0 watches it from now on; otherwise the agent would end it
            each.do("agent preflight_done {}")
            each.answers("/live", 200)
            os.kill(each.process.pid, signal.SIGSTOP)
        assert "the process is stopped or hung" in quick.answers("/live", 503)["error"]
        assert node.answers("/live", 200)["rank_silent_seconds"] > 0.5
        os.kill(quick.process.pid, signal.SIGCONT)
        quick.answers("/live", 200)
    finally:
        os.kill(node.process.pid, signal.SIGCONT)
        end(quick)


def test_it_ends_with_its_rank_and_only_then(node: Node) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(node.server, number)
    node.answers("/live", 200)
    begin = time.monotonic()
    os.kill(node.process.pid, signal.SIGKILL)
    assert node.has_ended()
    assert time.monotonic() - begin < 1.0
    # and holds none of its streams open
    assert node.process.stdout is not None
    assert node.process.stdout.read() == ""


def test_a_successor_of_the_agent_answers_the_same(node: Node) -> None:
    for line in ("begin mpi_init", "role decode", "begin preflight", "world load 1700000000.5"):
        node.do(line)
    before = node.answers("/live", 200, phase="load", rank_phase="preflight", role="decode")
    os.kill(node.server, signal.SIGKILL)
    # a request that arrives meanwhile waits for the successor
    after = node.answers("/live", 200, phase="load", rank_phase="preflight", role="decode", pid=node.process.pid)
    assert after["phase_since"] == before["phase_since"] == 1700000000.5
    assert after["uptime"]["secs"] >= before["uptime"]["secs"]
    assert is_gone(node.server)
    node.do("begin load")
    node.answers("/health", 503, rank_phase="load")


def test_unfinished_requests_take_no_threads(node: Node) -> None:
    node.answers("/live", 200)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(node.raw()).sendall(b"GET /metrics HTTP/1.1\r\nX: a")
        node.answers("/live", 200)
        status = Path(f"/proc/{node.server}/status").read_text()
        (threads,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("Threads:")]
        assert threads < 10


def test_an_end_of_input_ends_a_request(node: Node) -> None:
    with node.raw() as connection:
        connection.sendall(b"GET /live HTTP/1.1\r\nHost: n2\r\n")
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(PROMPT)
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_a_request_in_parts_gets_its_answer(node: Node) -> None:
    with node.raw() as connection:
        connection.settimeout(PROMPT)
        for part in (b"GET /live HT", b"TP/1.1\r\nHost: n2\r", b"\n\r", b"\n"):
            connection.sendall(part)
            node.answers("/live", 200)
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_hostile_clients_do_not_delay_the_watch(node: Node) -> None:
    node.do("begin mpi_init")
    node.answers("/live", 200, phase="mpi_init")
    done = threading.Event()

    def trickle() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError), node.raw() as connection:
                for byte in b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 500 + b"\r\n\r\n":
                    connection.send(bytes([byte]))

    clients = [threading.Thread(target=trickle) for _ in range(20)]
    for client in clients:
        client.start()
    try:
        node.answers("/live", 200)
        begin = time.monotonic()
        os.kill(node.process.pid, signal.SIGKILL)
        assert node.has_ended()
        assert time.monotonic() - begin < 2.0
    finally:
        done.set()
        for client in clients:
            client.join()


def test_an_error_of_the_server_does_not_end_the_watch() -> None:
    # it can't serve: nothing listens
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    endpoint = HealthEndpoint(HealthAddress("127.0.0.1", 1), listener)
    launch = LaunchInfo(Launcher.SLURM_PMIX, rank=2, size=4, local_rank=0, local_size=2)
    service = HealthService(endpoint, launch, "n2", None, (os.getpid(), time.time(), time.monotonic()))
    service.on_message("phase load nonsense")
    service.on_message("rank " + "9" * 5000)
    service.on_message("phase")
    assert service.state.phase == "load"
    service.start()
    service.on_message("world serve")
    assert service.state.world_phase == "serve"
    service.on_exit()
    service.on_exit()


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"GET /live HTTP/1.0\r\n\r\n", 200),
        (b"GET /live?full=1 HTTP/1.1\r\nHost: n2\r\n\r\n", 200),
        (b"HEAD /live HTTP/1.1\r\nHost: n2\r\n\r\n", 200),
        (b"POST /health HTTP/1.1\r\nHost: n2\r\nContent-Length: 0\r\n\r\n", 405),
        (b"GET /nowhere HTTP/1.1\r\nHost: n2\r\n\r\n", 404),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
        (b"GET /live\r\n\r\n", 400),
        (b"GET /live HTTP/1.1\r\nnonsense\r\n\r\n", 400),
        (b"GET /" + b"x" * 70000, 414),
        (b"GET /live HTTP/1.1\r\nX: " + b"x" * 70000, 431),
        (b"GET /live HTTP/2.0\r\n\r\n", 505),
        (b"\xff\r\n\x00:\n\n", 400),
    ],
)
def test_requests_of_any_kind_get_an_answer(lasting_node: Node, said: bytes, status: int) -> None:
    with lasting_node.raw() as connection:
        connection.sendall(said)
        connection.settimeout(PROMPT)
        got = b""
        with contextlib.suppress(ConnectionResetError):  # it has not read what was too long
            while data := connection.recv(4096):
                got += data
    assert got.startswith(f"HTTP/1.1 {status} ".encode()), got
    assert b"\r\nConnection: close\r\n" in got
    if said.startswith(b"HEAD"):
        assert got.endswith(b"\r\n\r\n")


def test_silent_clients_keep_no_other_out(node: Node) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(node.raw()) for _ in range(200)]
        half = stack.enter_context(node.raw())
        half.sendall(b"GET /live HTTP/1.1\r\n")
        silent += [stack.enter_context(node.raw()) for _ in range(400)]
        node.answers("/live", 200)
        # of too many, those that came first must go, and none that has begun a request
        assert silent[0].recv(1) == b""
        half.sendall(b"\r\n")
        assert half.recv(12) == b"HTTP/1.1 200"
    node.answers("/live", 200)


def test_requests_that_the_runtime_never_answers_keep_no_probe_out(node: Node, runtime: socket.socket) -> None:
    node.do(f"runtime {runtime.getsockname()[1]}")
    node.do("phase load")
    node.answers("/live", 200, phase="load")
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            asking = stack.enter_context(node.raw())
            asking.sendall(b"GET /metadata HTTP/1.1\r\n\r\n")
            stack.enter_context(runtime.accept()[0])
        node.answers("/live", 200)
        assert node.ask("/metadata")[0] == 503
    # the client has left, and the runtime gets notice
    with node.raw() as asking:
        asking.sendall(b"GET /metadata HTTP/1.1\r\n\r\n")
        connection, _ = runtime.accept()
    with connection:
        connection.settimeout(PROMPT)
        while connection.recv(4096):
            pass


def test_it_ends_with_its_rank_though_what_that_has_forked_lives_on(node: Node) -> None:
    node.do("fork")
    assert node.process.stdout is not None
    child = int(node.process.stdout.readline())
    try:
        os.kill(node.process.pid, signal.SIGKILL)
        assert node.has_ended()
        # the agent has ended it, too
        assert is_gone(child)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


@pytest.fixture
def runtime() -> Iterator[socket.socket]:
    """A port at which each client gets a recorded answer of the Dynamo runtime's kind."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PROMPT)
        yield listener


def answer_once(listener: socket.socket, answer: bytes, heard: list[bytes], body: int = 0) -> threading.Thread:
    """Have one request answered, and keep what was said."""

    def run() -> None:
        connection, _ = listener.accept()
        with connection:
            said = b""
            while b"\r\n\r\n" not in said or len(said.partition(b"\r\n\r\n")[2]) < body:
                said += connection.recv(65536)
            heard.append(said)
            connection.sendall(answer)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_what_is_not_ours_to_answer_is_handed_on_as_it_is(node: Node, runtime: socket.socket) -> None:
    node.do(f"runtime {runtime.getsockname()[1]}")
    node.do("phase load")
    node.answers("/live", 200, phase="load")
    body, said = os.urandom(300_000), list[bytes]()
    answer = b"HTTP/1.1 207 Odd\r\nX-Odd: a, b\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    thread = answer_once(runtime, answer, said, len(body))
    head = (
        b"POST /engine/start?x=1 HTTP/1.1\r\nHost: n2:1\r\nX-A: b:c\r\nConnection: keep-alive\r\nContent-Length: 300000"
    )
    with node.raw() as connection:
        connection.sendall(head + b"\r\n\r\n" + body)
        got = b""
        while data := connection.recv(4096):
            got += data
    thread.join()
    assert got == answer
    # but for how long the connection lives: its next request might be one of ours to answer
    assert said == [head.replace(b"Connection: keep-alive\r\n", b"") + b"\r\nConnection: close\r\n\r\n" + body]


def test_health_needs_the_runtimes_own(node: Node, runtime: socket.socket) -> None:
    node.do(f"runtime {runtime.getsockname()[1]}")
    node.do("phase serve")
    node.answers("/live", 200, phase="serve")
    for status, expected in ((503, 503), (200, 200)):
        said: list[bytes] = []
        content = json.dumps({"status": "x", "endpoints": {"generate": "so"}}).encode()
        answer = b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(content), content)
        thread = answer_once(runtime, answer, said)
        answered, body, _ = node.ask("/health")
        thread.join()
        assert said[0].startswith(b"GET /health HTTP/1.1\r\n")
        assert (answered, json.loads(body)["endpoints"]) == (expected, {"generate": "so"})
    # it has gone, and then it only hangs
    begin = time.monotonic()
    assert "does not answer at its port" in node.answers("/health", 503)["error"]
    assert time.monotonic() - begin < 2.0
    runtime.close()
    assert "does not answer at its port" in node.answers("/health", 503)["error"]
    assert node.ask("/metadata")[0] == 502


def test_metrics_are_ours_and_the_runtimes(node: Node, runtime: socket.socket) -> None:
    node.do(f"runtime {runtime.getsockname()[1]}")
    node.do("metrics dynamo_mpi_ranks 4\\n")
    node.do("phase load")
    node.answers("/live", 200, phase="load")
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n6\r\ndynamo\r\n12;x=y\r\n_uptime_seconds 3\n\r\n0\r\n\r\n"
    thread = answer_once(runtime, answer, [])
    status, body, fields = node.ask("/metrics")
    thread.join()
    assert (status, fields["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    lines = body.decode().splitlines()
    assert {"dynamo_mpi_ready 0", "dynamo_mpi_ranks 4", "dynamo_uptime_seconds 3"} <= set(lines)


@pytest.mark.parametrize(
    ("text", "port"), [("", None), ("-1", None), (" ", None), ("0", 0), ("9090", 9090), ("65535", 65535)]
)
def test_dynamos_variable_turns_it_on(text: str, port: int | None) -> None:
    address = HealthAddress.of({"DYN_SYSTEM_PORT": text})
    assert (None if address is None else address.port) == port


def test_paths_are_dynamos_too() -> None:
    named = {"DYN_SYSTEM_PORT": "1", "DYN_SYSTEM_HEALTH_PATH": "/healthz", "DYN_SYSTEM_LIVE_PATH": "/livez"}
    assert HealthAddress.of(named) == HealthAddress("0.0.0.0", 1, "/healthz", "/livez")  # noqa: S104 - Dynamo's default


@pytest.mark.parametrize("text", ["http", "65536", "1.5", "0x10"])
def test_a_port_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match=f"DYN_SYSTEM_PORT is '{text}'"):
        HealthAddress.of({"DYN_SYSTEM_PORT": text})


def test_a_taken_port_is_an_error_on_rank_0_and_a_warning_elsewhere(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = {**LOOPBACK, "DYN_SYSTEM_PORT": str(taken.getsockname()[1])}

        def begin(rank: int, local_rank: int | None) -> object:
            launch = LaunchInfo(Launcher.SLURM_PMIX, rank, 4, local_rank)
            return open_health_endpoint(launch, RankLogger(rank, "n1"), where)

        for local_rank in (0, None):
            error = begin(0, local_rank)
            assert isinstance(error, UsageError)
            assert f"process {os.getpid()} (" in str(error)
        assert begin(2, 0) is None
    assert capfd.readouterr().err.startswith("dynamo_mpi: rank 2 on n1: warning: this node has no health server: ")


def test_the_runtimes_port_is_one_that_it_can_read() -> None:
    address = HealthAddress("127.0.0.1", 9090)
    assert 20000 <= runtime_port(address, None) <= 32767
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="--runtime-system-port"):
        runtime_port(address, taken.getsockname()[1])
    assert url_of(address) == "http://127.0.0.1:9090"
    assert url_of(HealthAddress("::", 9090)).startswith("http://")
    assert url_of(HealthAddress("fd00::1", 9090)) == "http://[fd00::1]:9090"


def test_a_client_that_sends_slowly_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is that of the whole request: each byte would renew a socket's own timeout."""
    monkeypatch.setattr(request_listener, "CLIENT_SECONDS", 0.2)
    listener = socket.create_server(("127.0.0.1", 0))
    state = HealthState(0, "n0", os.getpid(), time.time(), time.monotonic(), last_seen=time.monotonic())
    endpoint = HealthEndpoint(HealthAddress("127.0.0.1", 0), listener)
    answering = server.HealthServer(endpoint, SimpleNamespace(state=state))
    thread = threading.Thread(target=answering.run)
    thread.start()
    try:
        with socket.create_connection(listener.getsockname(), PROMPT) as slow:
            slow.settimeout(0.01)
            end = time.monotonic() + PROMPT
            while time.monotonic() < end:
                try:
                    slow.sendall(b"x")
                    if slow.recv(1) == b"":
                        break
                except TimeoutError:
                    continue
                except ConnectionError:
                    break
            assert time.monotonic() < end
    finally:
        answering.close()
        thread.join()


def test_values_are_sent_from_a_thread_that_counts_as_idle() -> None:
    sent, arrived = list[str](), threading.Event()

    def send(line: str) -> None:
        sent.append(line)
        arrived.set()

    client = HealthClient(cast(NodeAgentClient, SimpleNamespace(send=send)), HealthAddress("127.0.0.1", 1), None)
    client.collect_by(lambda: {"metrics": "a 1\n"})
    assert arrived.wait(PROMPT)
    assert sent == ["health metrics a 1\\n"]
    assert "health" in IDLE_THREADS & {thread.name for thread in threading.enumerate()}


def test_values_without_an_agent_are_not_collected() -> None:
    client = NodeAgentClient(LaunchInfo(Launcher.ALONE), {}, None)
    before = len(str(vars(client)))
    for _ in range(100):
        client.send("health metrics " + "x" * 10000)
    assert len(str(vars(client))) - before < 50000
