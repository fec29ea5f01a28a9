# SPDX-License-Identifier: Apache-2.0
"""The publisher to NATS, against real servers that come late, go, come back and hang."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from dynamo_mpi.common.credentials import read_services_file, usable
from dynamo_mpi.common.ports import free_port
from dynamo_mpi.deploy.certificates import make_credentials
from dynamo_mpi.discovery.endpoints import read_address
from dynamo_mpi.discovery.nats_auth import NatsAuth
from dynamo_mpi.discovery.nats_check import check_nats
from dynamo_mpi.discovery.nats_publisher import Message, NatsPublisher
from tests.certificates import certificates
from tests.dynamo.running import eventually
from tests.nats_keys import Operator, identity
from tests.nats_listener import listening_to
from tests.servers import listening, running_nats

pytestmark = pytest.mark.slow

SUBJECT = "dynamo_mpi.v1.a.b.c"
MOST = 256
TOKEN = {"NATS_AUTH_TOKEN": "wr0ng"}
Make = Callable[..., NatsPublisher]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def line(said: list[str]) -> Iterator[Make]:
    lines: list[NatsPublisher] = []

    def make(url: str, **environ: str) -> NatsPublisher:
        lines.append(NatsPublisher(url, NatsAuth.from_env(environ), said.append))
        lines[-1].start()
        return lines[-1]

    yield make
    for each in lines:
        each.close(0.1)


def message(number: int) -> Message:
    return Message(SUBJECT, json.dumps(number).encode())


def test_all_arrive_in_their_order_and_the_last_before_the_end(line: Make, said: list[str]) -> None:
    with running_nats() as url, listening_to(url) as heard:
        ours = line(url)
        for number in range(100):
            ours.send(message(number))
        ours.close(10)
        eventually(lambda: len(heard.messages) == 100)
        assert heard.messages == [(SUBJECT, number) for number in range(100)]
        assert said == []


def test_what_was_sent_has_arrived_when_it_is_flushed(line: Make) -> None:
    with running_nats() as url, listening_to(url) as heard:
        ours = line(url.removeprefix("nats://"))
        for number in range(20):
            ours.send(message(number))
            ours.flush(10)
            eventually(lambda wanted=number: len(heard.messages) == wanted + 1, seconds=5)  # type: ignore[misc] # a default binds it


def test_a_nats_that_comes_late_gets_what_has_waited(line: Make, said: list[str]) -> None:
    port = free_port()
    ours = line(f"nats://127.0.0.1:{port}")
    eventually(lambda: len(said) == 1)
    for number in range(MOST + 50):
        ours.send(message(number))
    begin = time.monotonic()
    ours.flush(10)
    assert time.monotonic() - begin < 1, "nothing waits for a NATS that is away"
    with running_nats(port=port) as url, listening_to(url) as heard:
        eventually(lambda: len(heard.messages) == MOST)
        assert [body for _, body in heard.messages] == list(range(50, MOST + 50)), "the oldest have gone"
    assert len(said) == 1
    assert said[0].startswith("lifecycle events can't be sent over NATS for now, the worker goes on: ")
    assert "fix: check nats-server" in said[0]


def test_a_nats_that_dies_and_comes_back_is_found_again(line: Make) -> None:
    port = free_port()
    with running_nats(port=port) as url:
        ours = line(url)
        ours.send(message(0))
        ours.flush(10)
    for number in range(1, 4):
        ours.send(message(number))
    with running_nats(port=port) as url, listening_to(url) as heard:
        eventually(lambda: len(heard.messages) >= 3)
        ours.send(message(4))
        eventually(lambda: heard.messages[-1] == (SUBJECT, 4))
        assert [body for _, body in heard.messages] == [1, 2, 3, 4]


def test_what_nats_never_takes_does_not_keep_the_rest(line: Make) -> None:
    with running_nats("max_payload: 1000") as url, listening_to(url) as heard:
        ours = line(url)
        ours.send(Message(SUBJECT, b"1" * 2000))
        ours.send(message(1))
        eventually(lambda: heard.messages == [(SUBJECT, 1)])


def test_a_nats_that_hangs_up_each_time_is_not_asked_without_a_rest(line: Make) -> None:
    info = b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576,"proto":1}\r\n'
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        line(f"nats://127.0.0.1:{server.getsockname()[1]}")
        visits: list[float] = []
        while len(visits) < 3:
            visitor = server.accept()[0]
            with visitor:
                visits.append(time.monotonic())
                visitor.settimeout(5)
                visitor.sendall(info)
                while b"PING" not in visitor.recv(4096):
                    continue
                visitor.sendall(b"PONG\r\n")
        assert visits[1] - visits[0] > 0.4
        assert visits[2] - visits[1] > 0.8


@pytest.mark.parametrize("listens", [True, False], ids=["silent", "closed"])
def test_an_end_without_nats_does_not_wait_long(line: Make, listens: bool) -> None:
    with ExitStack() as stack:
        port = stack.enter_context(listening()) if listens else free_port()
        ours = line(f"nats://127.0.0.1:{port}")
        ours.send(message(0))
        begin = time.monotonic()
        ours.flush(0.5)
        ours.close(0.5)
        assert time.monotonic() - begin < 1.5


def test_it_may_be_used_in_a_signals_handler(line: Make) -> None:
    with running_nats() as url, listening_to(url) as heard:
        ours = line(url)
        numbers = itertools.count()

        def handle(_: int, __: object) -> None:
            ours.send(message(next(numbers)))

        before = signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
        try:
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                ours.flush(0)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        ours.close(10)
        sent = next(numbers)
        assert sent > 5
        eventually(lambda: len(heard.messages) == sent)
        # a handler may be interrupted by the next one
        assert sorted(body for _, body in heard.messages) == list(range(sent))


@pytest.mark.parametrize(
    ("config", "environ", "who"),
    [
        (
            'authorization { user: "me", password: "w0rd" }',
            {"NATS_AUTH_USERNAME": "me", "NATS_AUTH_PASSWORD": "w0rd"},
            {"user": "me", "pass": "w0rd"},
        ),
        ('authorization { token: "w0rd" }', {"NATS_AUTH_TOKEN": "w0rd"}, {"auth_token": "w0rd"}),
        ('authorization { user: "user", password: "user" }', {}, {"user": "user", "pass": "user"}),
    ],
    ids=["password", "token", "usual"],
)
def test_with_credentials(line: Make, config: str, environ: dict[str, str], who: dict[str, str]) -> None:
    with running_nats(config) as url, listening_to(url, **who) as heard:
        ours = line(url, **environ)
        ours.send(message(1))
        eventually(lambda: heard.messages == [(SUBJECT, 1)])


def test_wrong_credentials_are_reported_without_them(line: Make, said: list[str]) -> None:
    with running_nats('authorization { token: "right" }') as url:
        line(url, **TOKEN)
        eventually(lambda: len(said) == 1)
        assert "uthorization" in said[0]
        assert TOKEN["NATS_AUTH_TOKEN"] not in said[0]


def test_with_an_nkey_or_a_credentials_file(line: Make, said: list[str], tmp_path: Path) -> None:
    ours, operator = identity(), Operator()
    (tmp_path / "creds").write_text(operator.credentials())
    for config, environ in (
        (f'authorization {{ users: [{{ nkey: "{ours.public}" }}] }}', {"NATS_AUTH_NKEY": ours.seed}),
        (operator.config(), {"NATS_AUTH_CREDENTIALS_FILE": str(tmp_path / "creds")}),
    ):
        with running_nats(config) as url:
            begin = time.monotonic()
            sending = line(url, **environ)
            sending.send(message(1))
            sending.flush(10)
            assert time.monotonic() - begin < 9, "NATS has confirmed it"
            sending.close(10)
            assert said == []


def log_in(server: str, auth: NatsAuth) -> None:
    """Log in as a rank does to see whether NATS can be used, for a version of Dynamo's runtime that isn't known."""
    check_nats(read_address(server, 4222, ("nats", "tls"), "NATS_SERVER"), auth, auth.tls(), time.monotonic() + 10)


def test_a_jobs_own_nats_with_tls(line: Make, said: list[str], tmp_path: Path) -> None:
    """As ``head_node`` starts it for runtimes that can: this job's authority alone, by a services file, and no plain connection."""
    made = make_credentials(tmp_path, ("127.0.0.1",), nats_tls=True)
    with running_nats(made.nats_config.read_text()) as url:
        server = url.replace("nats:", "tls:")
        file = tmp_path / "services.json"
        file.write_text(json.dumps({"environment": {**made.client_environment, "NATS_SERVER": server}}))
        environ = read_services_file(str(file))
        log_in(server, NatsAuth.from_env(environ))
        ours = line(server, **environ)
        ours.send(message(1))
        begin = time.monotonic()
        ours.flush(10)
        assert time.monotonic() - begin < 9
        assert said == []
        (tmp_path / "strangers").mkdir()
        strangers = make_credentials(tmp_path / "strangers", ("127.0.0.1",), nats_tls=True).client_environment
        for changes in ({"NATS_TLS_CA_CERT_PATH": ""}, usable(dict(strangers))):
            with pytest.raises(ssl.SSLError, match="certificate verify failed"):
                log_in(server, NatsAuth.from_env({**environ, **changes}))
        place = urlsplit(url)
        with (
            socket.create_connection((place.hostname or "", place.port or 0), 10) as plain,
            plain.makefile("rb") as lines,
        ):
            assert lines.readline().startswith(b"INFO")
            login = {"user": "dynamo", "pass": made.client_environment["NATS_AUTH_PASSWORD"]}
            plain.sendall(f"CONNECT {json.dumps(login)}\r\nPING\r\n".encode())
            assert b"PONG" not in lines.read()


def test_over_tls_in_both_directions(line: Make, said: list[str], tmp_path: Path) -> None:
    files = certificates(tmp_path / "tls")
    names = {"cert_file": files.server, "key_file": files.server_key, "ca_file": files.authority}
    config = "tls {" + ", ".join(f'{name}: "{path}"' for name, path in names.items()) + ", verify: true}"
    environ = {
        "NATS_TLS_CA_CERT_PATH": str(files.authority),
        "NATS_TLS_CLIENT_CERT_PATH": str(files.client),
        "NATS_TLS_CLIENT_KEY_PATH": str(files.client_key),
    }
    with running_nats(config) as url:
        ours = line(url.replace("nats:", "tls:"), **environ)
        ours.send(message(1))
        begin = time.monotonic()
        ours.flush(10)
        assert time.monotonic() - begin < 9
        assert said == []
        line(url.replace("nats:", "tls:"))
        eventually(lambda: len(said) == 1)
