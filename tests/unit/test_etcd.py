# SPDX-License-Identifier: Apache-2.0
"""Our connection to etcd: against real ones, with every way to show who we are, and against what stands in their place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from pyetcd import etcdrpc

from dynamo_mpi.common.errors import AuthorizationError, DiscoveryError
from dynamo_mpi.discovery.etcd import EtcdAuth, EtcdClient, LeaseLostError, is_outdated_etcd
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient
from dynamo_mpi.discovery.etcd_http import HttpEtcdClient, query_etcd
from tests.certificates import certificates, without_certificate
from tests.etcd_users import PASSWORDS, add_users
from tests.servers import closed_port, listening, running_etcd, running_secured_etcd


def user(name: str, password: str) -> EtcdAuth:
    return EtcdAuth("", "", "", name, password)


NO_CREDENTIALS = EtcdAuth()
WORKER = user("worker", PASSWORDS["worker"])


@pytest.fixture(scope="module")
def locked() -> Iterator[str]:
    """An etcd with users."""
    with running_etcd() as url:
        add_users(url, ["dynamo_mpi/"])
        yield url


def connect(*urls: str, auth: EtcdAuth = NO_CREDENTIALS, timeout: float = 5) -> GrpcEtcdClient:
    return GrpcEtcdClient(urls, auth, timeout)


def use(etcd: GrpcEtcdClient) -> None:
    """Do everything that there is to do, and look at it."""
    use_as_client(etcd)
    lease = etcd.grant(60)
    etcd.keep_alive(lease.id)
    assert etcd.lease_ttl(lease.id) == 60
    assert etcd.revoke(lease.id, 5)
    assert etcd.lease_ttl(lease.id) is None
    with pytest.raises(LeaseLostError):
        etcd.keep_alive(lease.id)
    etcd.close()


def use_as_client(etcd: EtcdClient) -> None:
    """Do what both transports do, and look at it."""
    lease = etcd.grant(60)
    assert lease.seconds == 60
    etcd.put("dynamo_mpi/a", b"1", lease.id)
    etcd.put("dynamo_mpi/b", b"2", lease.id)
    etcd.put("dynamo_mpi/a", b"3\xff\0", lease.id)
    first, second = etcd.get_prefix("dynamo_mpi/")
    assert (first.key, first.value, first.lease) == ("dynamo_mpi/a", b"3\xff\0", lease.id)
    assert 0 < first.create_revision < second.create_revision
    assert etcd.get_prefix("dynamo_mpi/b") == [second]
    assert etcd.create("dynamo_mpi/c", b"4", lease.id) is True
    assert etcd.create("dynamo_mpi/c", b"5", lease.id) is False
    assert [entry.value for entry in etcd.get_prefix("dynamo_mpi/c")] == [b"4"]
    assert etcd.revoke(lease.id) is True
    assert etcd.get_prefix("dynamo_mpi/") == []
    assert etcd.revoke(lease.id) is False
    with pytest.raises(LeaseLostError):
        etcd.put("dynamo_mpi/a", b"1", lease.id)


def test_http_client_does_what_the_grpc_client_does(etcd: str) -> None:
    with HttpEtcdClient(etcd, NO_CREDENTIALS, time.monotonic() + 20) as client:
        client.authenticate()
        use_as_client(client)


def test_query_falls_back_to_grpc_only_if_asked(etcd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gateway(*_: object) -> None:
        raise DiscoveryError("no gateway")

    monkeypatch.setattr(HttpEtcdClient, "get_prefix", no_gateway)
    environ = {"ETCD_ENDPOINTS": etcd}
    with pytest.raises(DiscoveryError, match="no gateway"):
        query_etcd(environ, 5, lambda client: client.get_prefix("dynamo_mpi/"))
    assert query_etcd(environ, 5, lambda client: client.get_prefix("dynamo_mpi/"), or_grpc=True) == []


def test_http_client_keeps_its_deadline_over_all_calls(etcd: str) -> None:
    with HttpEtcdClient(etcd, NO_CREDENTIALS, time.monotonic() + 0.5) as client:
        client.get_prefix("dynamo_mpi/")
        with pytest.raises(DiscoveryError, match="no answer in time"):
            while True:
                client.get_prefix("dynamo_mpi/")


def test_without_credentials(etcd: str) -> None:
    use(connect(etcd))


def test_a_scheme_may_be_left_out(etcd: str) -> None:
    use(connect(etcd.removeprefix("http://")))


def test_one_that_is_closed_connects_anew(etcd: str) -> None:
    connection = connect(etcd)
    use(connection)
    use(connection)


def test_a_password_without_tls(locked: str) -> None:
    use(connect(locked, auth=WORKER))


def test_a_token_that_etcd_has_forgotten_is_asked_for_anew(locked: str) -> None:
    connection = connect(locked, auth=WORKER)
    connection.get_prefix("dynamo_mpi/")
    root = grpc.insecure_channel(locked.removeprefix("http://"))
    stub = etcdrpc.AuthStub(root)
    token = stub.Authenticate(etcdrpc.AuthenticateRequest(name="root", password=PASSWORDS["root"])).token
    # every change of users makes all tokens old
    stub.UserAdd(etcdrpc.AuthUserAddRequest(name="one-more", password=token), metadata=(("token", token),))
    root.close()
    use(connection)


@pytest.mark.parametrize(
    ("auth", "word"),
    [
        (NO_CREDENTIALS, "ETCD_AUTH_"),
        (user("worker", "wrong"), "ETCD_AUTH_PASSWORD"),
        (user("stranger", "wrong"), "ETCD_AUTH_USERNAME"),
        (user("guest", "s3cret"), "grant-permission"),
    ],
    ids=["none", "wrong password", "no such user", "no rights"],
)
def test_a_missing_permission_is_reported(locked: str, auth: EtcdAuth, word: str) -> None:
    with pytest.raises(AuthorizationError) as caught:
        connect(locked, auth=auth).get_prefix("dynamo_mpi/")
    assert caught.value.exit_code == 77
    assert word in caught.value.fix
    assert auth.password == "" or auth.password not in str(caught.value)


def test_a_password_that_etcd_does_not_ask_for_does_no_harm(etcd: str) -> None:
    use(connect(etcd, auth=WORKER))


def test_certificates_in_both_directions(tmp_path: Path) -> None:
    files = certificates(tmp_path / "ours")
    worker = EtcdAuth.from_env(files.client_environment())
    with running_secured_etcd(files) as url:
        use(connect(url, auth=worker))
        use(connect(url.replace("127.0.0.1", "localhost"), auth=worker))
        for auth in (
            EtcdAuth.from_env(without_certificate(files)),
            EtcdAuth(certificate=worker.certificate, key=worker.key),
        ):
            with pytest.raises(DiscoveryError):
                connect(url, auth=auth, timeout=2).get_prefix("dynamo_mpi/")


def test_the_next_endpoint_is_taken_where_one_is_dead(etcd: str) -> None:
    with closed_port() as dead:
        use(connect(f"http://127.0.0.1:{dead}", f"http://[::1]:{dead}", etcd))


def test_a_password_is_shown_to_the_next_one_too(locked: str) -> None:
    with closed_port() as dead:
        use(connect(f"http://127.0.0.1:{dead}", locked, auth=WORKER))


@pytest.mark.parametrize("auth", [NO_CREDENTIALS, WORKER], ids=["no credentials", "a user"])
@pytest.mark.parametrize("listens", [True, False])
def test_no_answer_in_time(listens: bool, auth: EtcdAuth) -> None:
    with listening() as silent, closed_port() as dead:
        begin = time.monotonic()
        with pytest.raises(DiscoveryError, match="etcd does not answer") as caught:
            connect(f"http://127.0.0.1:{silent if listens else dead}", auth=auth, timeout=0.5).get_prefix("dynamo_mpi/")
        assert time.monotonic() - begin < 3
    assert caught.value.exit_code == 69


def test_it_is_found_again_as_soon_as_it_is_back() -> None:
    with running_etcd() as url:
        connection = connect(url, timeout=2)
        assert connection.get_prefix("dynamo_mpi/") == []
    with pytest.raises(DiscoveryError):
        connection.get_prefix("dynamo_mpi/")
    port = int(url.rpartition(":")[2])
    with running_etcd(port):
        assert connection.get_prefix("dynamo_mpi/") == []


def test_a_proxy_of_the_web_is_not_asked(etcd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_port() as dead:
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{dead}")
        monkeypatch.setenv("no_proxy", "")
        use(connect(etcd))


@pytest.mark.parametrize(
    ("version", "outdated"),
    [
        ("3.4.36", True),
        ("3.5.1", True),
        ("3.5.32", True),
        ("3.5.33", False),
        ("3.6.13", True),
        ("3.6.14", False),
        ("3.7.0-rc.1", True),
        ("3.7.1", False),
        ("3.8.0", False),
        ("4.0.0", False),
        ("", False),
        ("unknown", False),
    ],
)
def test_releases_of_etcd_with_known_holes_are_outdated(version: str, outdated: bool) -> None:
    assert is_outdated_etcd(version) is outdated


@pytest.mark.parametrize("endpoint", ["not a url", "http://h:x", "http://[::1"])
def test_an_endpoint_that_is_none_is_named(endpoint: str) -> None:
    with pytest.raises(DiscoveryError, match="can't be read"):
        HttpEtcdClient(endpoint, NO_CREDENTIALS, time.monotonic() + 20)
