# SPDX-License-Identifier: Apache-2.0
"""What a killed worker has left, taken out of real etcds by the launcher, with nothing but the standard library."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.common.errors import AuthorizationError, DiscoveryError, UsageError
from dynamo_mpi.common.ports import free_port
from dynamo_mpi.deploy import services
from dynamo_mpi.deploy.programs import find_etcd
from dynamo_mpi.deploy.reports import REVOKE_SECONDS, revoke_registrations
from dynamo_mpi.discovery.etcd import EtcdAuth
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient
from dynamo_mpi.discovery.records import record_key
from tests.certificates import certificates, without_certificate
from tests.conftest import ROOT, run_command
from tests.etcd_users import PASSWORDS, add_users
from tests.servers import closed_port, drip, listening, reply, running, running_etcd, running_secured_etcd
from tests.unit.worlds import world

pytestmark = pytest.mark.slow

LAUNCH = "dynmpi-0a1b2c3d-decode-0"
# beyond the product's own limit, on a busy machine
MARGIN_SECONDS = 1.5


@dataclass
class Left:
    """What a worker has left in an etcd."""

    etcd: GrpcEtcdClient
    keys: tuple[str, ...]

    def there(self) -> list[bool]:
        """Return for each key whether it is still there."""
        return [any(entry.key == key for entry in self.etcd.get_prefix(key)) for key in self.keys]


Leave = Callable[..., Left]


@pytest.fixture
def leave() -> Iterator[Leave]:
    """Write what Dynamo and the worker would have written, under leases that outlive the test."""
    connections: list[GrpcEtcdClient] = []
    leases: list[tuple[GrpcEtcdClient, int]] = []

    def begin(
        environ: Mapping[str, str], launch: str | None = LAUNCH, *, registered: bool = True, **record: str
    ) -> Left:
        etcd = GrpcEtcdClient([environ["ETCD_ENDPOINTS"]], EtcdAuth.from_env(environ), 5)
        connections.append(etcd)
        instance, own = (etcd.grant(600).id for _ in range(2))
        leases.extend((etcd, lease) for lease in (instance, own))
        said: dict[str, Any] = {"instance": f"{instance:x}", **record} if registered else {}
        posted = world("decode", None, launch=launch, **said)
        keys = (f"v1/instances/dynamo/backend/generate/{instance:x}", record_key(posted, own))
        etcd.put(keys[0], b"{}", instance)
        etcd.put(keys[1], posted.pack(), own)
        return Left(etcd, keys)

    yield begin
    for connection, lease in leases:
        with contextlib.suppress(DiscoveryError):  # it is gone, as most are, or its etcd is
            connection.revoke(lease, 5)
    for connection in connections:
        connection.close()


def use(environ: Mapping[str, str], leave: Leave) -> None:
    """Take one of two workers out, and look at both."""
    left, other = leave(environ), leave(environ, "dynmpi-0a1b2c3d-decode-1")
    assert revoke_registrations(LAUNCH, environ) is True
    assert (left.there(), other.there()) == ([False, False], [True, True])
    assert revoke_registrations(LAUNCH, environ) is False


def test_one_worker_and_no_other(etcd: str, leave: Leave) -> None:
    use({"ETCD_ENDPOINTS": etcd}, leave)


def test_a_worker_without_a_launch_stays(etcd: str, leave: Leave) -> None:
    stranger = leave({"ETCD_ENDPOINTS": etcd}, None)
    assert revoke_registrations(LAUNCH, {"ETCD_ENDPOINTS": etcd}) is False
    assert stranger.there() == [True, True]


def test_one_that_was_not_registered_yet_leaves_its_record_alone(etcd: str, leave: Leave) -> None:
    left = leave({"ETCD_ENDPOINTS": etcd}, registered=False)
    assert revoke_registrations(LAUNCH, {"ETCD_ENDPOINTS": etcd}) is False
    assert left.there() == [True, False]


def test_one_whose_instance_has_gone_by_itself(etcd: str, leave: Leave) -> None:
    left = leave({"ETCD_ENDPOINTS": etcd}, instance="1234")
    assert revoke_registrations(LAUNCH, {"ETCD_ENDPOINTS": etcd}) is False
    assert left.there() == [True, False]


@pytest.mark.parametrize("instance", ["no number", "-1", "0", "f" * 17])
def test_a_record_that_makes_no_sense_is_no_obstacle(etcd: str, leave: Leave, instance: str) -> None:
    odd = leave({"ETCD_ENDPOINTS": etcd}, instance=instance)
    use({"ETCD_ENDPOINTS": etcd}, leave)
    assert odd.there()[0] is True


def test_what_is_no_record_is_no_obstacle(etcd: str, leave: Leave) -> None:
    environ = {"ETCD_ENDPOINTS": etcd}
    connection = leave(environ, None).etcd
    lease = connection.grant(60).id
    connection.put("dynamo_mpi/v1/worlds/dynamo/backend/x", b"\xff{", lease)
    connection.put("dynamo_mpi/v1/worlds/dynamo/backend/y", b"", lease)
    use(environ, leave)
    connection.revoke(lease, 5)


def test_a_scheme_may_be_left_out(etcd: str, leave: Leave) -> None:
    left = leave({"ETCD_ENDPOINTS": etcd})
    assert revoke_registrations(LAUNCH, {"ETCD_ENDPOINTS": etcd.removeprefix("http://")}) is True
    assert left.there() == [False, False]


def test_certificates_in_both_directions(tmp_path: Path, leave: Leave) -> None:
    files = certificates(tmp_path / "ours")
    with running_secured_etcd(files) as url:
        place = {"ETCD_ENDPOINTS": url}
        use({**place, **files.client_environment()}, leave)
        use({"ETCD_ENDPOINTS": url.replace("127.0.0.1", "localhost"), **files.client_environment()}, leave)
        left = leave({**place, **files.client_environment()})
        for credentials in ({}, without_certificate(files)):
            with pytest.raises((DiscoveryError, AuthorizationError), match=r"127\.0\.0\.1") as caught:
                revoke_registrations(LAUNCH, {**place, **credentials})
            assert isinstance(caught.value, AuthorizationError if credentials else DiscoveryError)
        assert left.there() == [True, True]
    with pytest.raises(UsageError, match="ETCD_AUTH_CA holds no certificate"):
        revoke_registrations(LAUNCH, {**place, "ETCD_AUTH_CA": "/a/path"})
    with pytest.raises(UsageError, match="ETCD_AUTH_CLIENT_KEY isn't"):
        revoke_registrations(LAUNCH, {**place, "ETCD_AUTH_CLIENT_CERT": "x"})


def test_over_ipv6(leave: Leave) -> None:
    with running(lambda folder: services.Etcd(find_etcd(), free_port(), folder, host="::1")) as url:
        assert "[::1]" in url
        use({"ETCD_ENDPOINTS": url}, leave)


def test_a_user_of_etcds(leave: Leave) -> None:
    worker = {"ETCD_AUTH_USERNAME": "worker", "ETCD_AUTH_PASSWORD": PASSWORDS["worker"]}
    with running_etcd() as url:
        environ = {"ETCD_ENDPOINTS": url, **worker}
        # one that asks for no password
        use(environ, leave)
        add_users(url, ["dynamo_mpi/", "v1/"])
        use(environ, leave)
        for changes in ({"ETCD_AUTH_PASSWORD": "wr0ng"}, {"ETCD_AUTH_USERNAME": "guest"}):
            with pytest.raises(AuthorizationError, match="etcd refuses") as caught:
                revoke_registrations(LAUNCH, {**environ, **changes})
            assert "wr0ng" not in str(caught.value)
        with pytest.raises(AuthorizationError, match="etcd refuses"):
            revoke_registrations(LAUNCH, {"ETCD_ENDPOINTS": url})


@pytest.mark.parametrize("listens", [True, False])
def test_the_next_endpoint_is_asked_where_one_is_dead(etcd: str, leave: Leave, listens: bool) -> None:
    left = leave({"ETCD_ENDPOINTS": etcd})
    with listening() as silent, closed_port() as dead:
        first = f"http://127.0.0.1:{silent if listens else dead}"
        assert revoke_registrations(LAUNCH, {"ETCD_ENDPOINTS": f"{first}, {etcd}"}) is True
    assert left.there() == [False, False]


def endless(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(bytes(1 << 20))


OTHERS: dict[str, tuple[Callable[[], AbstractContextManager[int]], str]] = {
    "no listener": (closed_port, "connection refused"),
    "it is silent": (listening, "no answer in time"),
    "it drips": (lambda: listening(drip(b"HTTP/1.1 200 OK\r\nx: y\r\n", 0.05)), "no answer in time"),
    "it never ends": (lambda: listening(endless), "an answer of more than 64 MiB"),
    "it hangs up": (lambda: listening(reply(b"")), "without response"),
    "another server": (
        lambda: listening(reply(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n<p/>")),
        "something else than etcd answers there",
    ),
    "JSON of another": (
        lambda: listening(reply(b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"kvs":[1]}')),
        "something else than etcd answers there",
    ),
    "no HTTP": (lambda: listening(reply(b"+OK ready\r\n")), "something else than etcd answers there"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_where_no_etcd_answers_it_ends_in_time_and_says_why(name: str) -> None:
    serve, words = OTHERS[name]
    with serve() as port:
        begin = time.monotonic()
        with pytest.raises(DiscoveryError) as caught:
            revoke_registrations(LAUNCH, {"ETCD_ENDPOINTS": f"http://user:secret@127.0.0.1:{port}"})
        assert time.monotonic() - begin < REVOKE_SECONDS + MARGIN_SECONDS
    assert words in caught.value.problem
    assert "secret" not in caught.value.problem


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://[::1", "can't be read"),
        ("http://h:99999", "can't be read"),
        ("http://" + "a" * 70, "label"),
        (" , ", "names no endpoint"),
    ],
)
def test_an_address_that_is_none(url: str, words: str) -> None:
    with pytest.raises(DiscoveryError, match=words):
        revoke_registrations(LAUNCH, {"ETCD_ENDPOINTS": url})


_PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[1])
from dynamo_mpi.deploy.reports import revoke_registrations
print(revoke_registrations(sys.argv[2], os.environ))
assert not [name for name in sys.modules if name.partition(".")[0] in ("grpc", "pyetcd", "yaml", "mpi4py", "numpy")]
"""


def test_no_package_is_needed(tmp_path: Path, leave: Leave) -> None:
    files = certificates(tmp_path / "ours")
    with running_secured_etcd(files) as url:
        environ = {"ETCD_ENDPOINTS": url, **files.client_environment()}
        left = leave(environ)
        words = [sys.executable, "-I", "-S", "-c", _PROGRAM, str(ROOT), LAUNCH]
        done = run_command(words, env={**os.environ, **environ}, timeout=60)
        assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
        assert left.there() == [False, False]
