# SPDX-License-Identifier: Apache-2.0
"""The check of etcd and NATS: against real servers, and against everything that can stand in their place."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common.errors import AuthorizationError, DiscoveryError, DynamoMpiError, UsageError
from dynamo_mpi.deploy.certificates import Certificates
from dynamo_mpi.discovery.connectivity import check_connectivity, nats_server
from dynamo_mpi.discovery.endpoints import strip_credentials
from dynamo_mpi.discovery.etcd import etcd_endpoints
from tests.certificates import certificates, without_certificate
from tests.servers import closed_port, drip, listening, reply, running_nats, running_secured_etcd, say

TIMEOUT = 0.4
BOUND = 4.0
"""Seconds that a probe of TIMEOUT may take on a busy machine."""


@pytest.fixture(scope="module")
def nats() -> Iterator[str]:
    with running_nats() as url:
        yield url


def ask(
    *endpoints: str, plane: str = "tcp", timeout: float = TIMEOUT, nats: str = "", authority: str = ""
) -> list[str]:
    environ = {"ETCD_ENDPOINTS": ",".join(endpoints), "NATS_SERVER": nats, "ETCD_AUTH_CA": authority}
    return check_connectivity(environ, plane, timeout)


def refusal(*endpoints: str, nats: str = "") -> str:
    """Return what a probe that must fail says; it must end in time."""
    start = time.monotonic()
    with pytest.raises(DiscoveryError) as caught:
        ask(*endpoints, nats=nats)
    assert time.monotonic() - start < BOUND
    assert caught.value.exit_code == 69
    return str(caught.value)


def local(port: int, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ["http://localhost:2379"]),
        ({"ETCD_ENDPOINTS": ""}, ["http://localhost:2379"]),
        ({"ETCD_ENDPOINTS": " http://a:1 ,http://b:2,"}, ["http://a:1", "http://b:2"]),
    ],
)
def test_the_runtimes_own_endpoints_are_probed(environ: dict[str, str], expected: list[str]) -> None:
    assert etcd_endpoints(environ) == expected


@pytest.mark.parametrize(
    ("given_server", "plane", "expected"),
    [
        (None, "tcp", None),
        ("", "tcp", None),
        (None, "nats", "nats://localhost:4222"),
        ("nats://h:1", "tcp", "nats://h:1"),
        ("nats://h:1", "nats", "nats://h:1"),
    ],
)
def test_nats_is_probed_where_the_runtime_connects_to_it(
    given_server: str | None, plane: str, expected: str | None
) -> None:
    assert nats_server({} if given_server is None else {"NATS_SERVER": given_server}, plane) == expected


def test_real_servers_answer_at_once(etcd: str, nats: str) -> None:
    start = time.monotonic()
    assert ask(etcd, timeout=30, plane="nats", nats=nats) == [etcd]
    assert time.monotonic() - start < 5


def test_a_scheme_may_be_left_out(etcd: str, nats: str) -> None:
    bare = etcd.removeprefix("http://")
    assert ask(bare, nats=nats.removeprefix("nats://")) == [bare]


def test_dead_endpoints_come_last(etcd: str) -> None:
    with closed_port() as dead, listening() as silent:
        assert ask(local(dead), etcd) == [etcd, local(dead)]
        assert ask(local(dead), local(silent), etcd, local(dead)) == [etcd, local(dead), local(silent), local(dead)]


def test_no_listener() -> None:
    with closed_port() as port:
        text = refusal(local(port))
    assert f"127.0.0.1:{port}" in text
    assert "connection refused" in text
    assert "ETCD_ENDPOINTS" in text


def test_every_dead_endpoint_is_named() -> None:
    with closed_port() as first, closed_port() as second:
        text = refusal(local(first), local(second))
    assert f"127.0.0.1:{first}" in text
    assert f"127.0.0.1:{second}" in text


def test_one_that_accepts_and_never_answers() -> None:
    with listening() as port:
        assert "no answer in time" in refusal(local(port))


@pytest.mark.parametrize(
    "text", [b"x", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n" + b" " * 99]
)
def test_one_that_answers_drop_by_drop_does_not_hold_the_probe(text: bytes) -> None:
    with listening(drip(text, TIMEOUT / 4)) as port:
        refusal(local(port))
        # nor does it keep a thread of ours for as long as it likes
        for thread in threading.enumerate():
            if thread.name == "probe":
                thread.join(BOUND)
                assert not thread.is_alive()


HTML = b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\nContent-Length: 9\r\n\r\n<h1>No!</"


@pytest.mark.parametrize(
    "text",
    [
        HTML,
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n\xff",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\0\1\2\3",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"[" * 5000,
    ],
    ids=["html", "list", "object", "no text", "ssh", "binary", "brackets"],
)
def test_something_else_listens_in_etcds_place(text: bytes) -> None:
    with listening(reply(text)) as port:
        assert "something else than etcd" in refusal(local(port))


def test_etcd_given_natss_port_and_the_reverse(etcd: str, nats: str) -> None:
    assert "something else than etcd" in refusal(nats.replace("nats:", "http:"))
    assert "NATS does not answer" in refusal(etcd, nats=etcd.replace("http:", "nats:"))


def test_one_that_hangs_up() -> None:
    with listening(reply(b"")) as port:
        assert "does not answer" in refusal(local(port))


def test_an_etcd_that_is_not_healthy_says_why() -> None:
    body = json.dumps({"health": "false", "reason": "ALARM NOSPACE"}).encode()
    answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with listening(reply(answer)) as port:
        assert "ALARM NOSPACE" in refusal(local(port))


@contextlib.contextmanager
def black_hole(host: str) -> Iterator[int]:
    """Listen with a full queue: further connections get no answer at all, like behind a firewall that drops."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((host, 0))
        listener.listen(0)
        port: int = listener.getsockname()[1]
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex((host, port))
        yield port


def test_a_host_that_swallows_packets() -> None:
    with black_hole("127.0.0.1") as port:
        assert "no answer in time" in refusal(local(port))


def test_a_name_with_several_dead_addresses_is_no_longer_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with black_hole("127.0.0.1") as port:
        address = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [address] * 20)
        assert "no answer in time" in refusal("http://many.example:2379")


def test_a_name_server_that_does_not_answer_is_no_longer_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm nodes often have a resolver that waits 5 s and more for each try."""
    released = threading.Event()

    def hang(*_: object) -> list[object]:
        released.wait(BOUND * 2)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        assert "no answer in time" in refusal("http://slow.example:2379")
    finally:
        released.set()


def test_an_unknown_host_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[object]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert "name or service not known" in refusal("http://nowhere.example:2379")


def test_nats_absent(etcd: str) -> None:
    with closed_port() as port:
        text = refusal(etcd, nats=local(port, "nats"))
    assert "NATS does not answer" in text
    assert "connection refused" in text
    assert "leave NATS_SERVER unset" in text


@pytest.mark.parametrize(
    ("behave", "words"),
    [
        (say(b""), "no answer in time"),
        (say(b"SSH-2.0-OpenSSH_9.2\r\n"), "something else than NATS"),
        (drip(b"INFO", 0.1), "NATS does not answer"),
    ],
    ids=["silent", "ssh", "drip"],
)
def test_something_else_in_natss_place(etcd: str, behave: Callable[[socket.socket], None], words: str) -> None:
    with listening(behave) as port:
        assert words in refusal(etcd, nats=local(port, "nats"))


def test_a_dead_nats_does_not_matter_on_the_tcp_plane(etcd: str) -> None:
    assert ask(etcd) == [etcd]


@pytest.mark.parametrize(
    ("url", "displayed"),
    [
        ("http://h:1", "http://h:1"),
        ("http://me:hunter2@h:1", "http://h:1"),
        ("me:hunter2@h", "h"),
        ("me:hunter2://x@h", "h"),
        ("tls://me:a://b@c@h:1", "tls://h:1"),
    ],
)
def test_an_address_is_displayed_without_credentials(url: str, displayed: str) -> None:
    assert strip_credentials(url) == displayed


SECRETS = ("hunter2", "p%40ss")


@pytest.mark.parametrize("secret", SECRETS)
def test_credentials_in_an_address_are_never_shown(etcd: str, secret: str) -> None:
    with closed_port() as dead:
        texts = [
            refusal(f"http://root:{secret}@127.0.0.1:{dead}"),
        ]
        with pytest.raises(UsageError, match="NATS_AUTH_USERNAME") as in_nats:
            ask(etcd, nats=f"nats://me:{secret}@127.0.0.1:{dead}")
        texts.append(str(in_nats.value))
    for address in (
        f"http://me:{secret}@h:port",
        f"ftp://me:{secret}@h",
        f"http://me:{secret}@",
        f"http://me:{secret}@[::1",
    ):
        with pytest.raises(UsageError) as caught:
            ask(address)
        texts.append(str(caught.value))
    for text in texts:
        assert secret not in text
    assert f"127.0.0.1:{dead}" in texts[0]


@pytest.mark.parametrize(
    "address",
    [
        "http://",
        "http://:2379",
        "http://h:99999",
        "http://h:x",
        "ftp://h",
        "nats://h:1",
        "http://[::1",
        "http://a..b:1",
        ",",
    ],
)
def test_an_address_that_cannot_be_read_is_a_usage_error(address: str) -> None:
    with pytest.raises(UsageError, match="ETCD_ENDPOINTS") as caught:
        ask(address)
    assert caught.value.exit_code == 64


@pytest.mark.parametrize("address", ["http://h:1", "nats://:1", "nats://[", "nats://h:x"])
def test_a_nats_address_that_cannot_be_read_is_a_usage_error(etcd: str, address: str) -> None:
    with pytest.raises(UsageError, match="NATS_SERVER"):
        ask(etcd, nats=address)


@given(st.text(alphabet="http:/[]@.%1a,#? \\é\ud800", max_size=14))
def test_any_address_is_read_or_refused(address: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # what is looked at is the reading; nothing may leave this machine
        patch.setattr(socket, "create_connection", _refuse)
        with pytest.raises(DynamoMpiError):
            ask(f"{address}.invalid", nats=f"{address}.invalid")


def _refuse(address: tuple[str, int], timeout: float) -> socket.socket:
    address[0].encode("idna")  # as the real one does
    raise ConnectionRefusedError(111, "Connection refused")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def secured(files: Certificates) -> Iterator[str]:
    with running_secured_etcd(files) as url:
        yield url


def test_etcd_over_tls_is_shown_our_certificate(secured: str, files: Certificates) -> None:
    environ = files.client_environment()
    assert check_connectivity(environ | {"ETCD_ENDPOINTS": secured}, "tcp", 10) == [secured]
    assert "certificate" in refusal(secured)


def test_a_worker_that_etcd_does_not_know_is_not_authorised(secured: str, files: Certificates, tmp_path: Path) -> None:
    no_certificate = without_certificate(files)
    wrong = certificates(tmp_path / "theirs").client_environment() | no_certificate
    for environ, word in ((no_certificate, "without a certificate"), (wrong, "this worker's certificate")):
        with pytest.raises(AuthorizationError, match=word) as caught:
            check_connectivity(environ | {"ETCD_ENDPOINTS": secured}, "tcp", 10)
        assert caught.value.exit_code == 77
        assert "ETCD_AUTH_CLIENT_CERT" in caught.value.fix


def test_half_of_a_pair_of_credentials_is_a_usage_error(files: Certificates, secured: str) -> None:
    complete = files.client_environment()
    for missing in ("ETCD_AUTH_CLIENT_CERT", "ETCD_AUTH_CLIENT_KEY"):
        environ = {name: text for name, text in complete.items() if name != missing}
        with pytest.raises(UsageError, match=f"{missing} isn't"):
            check_connectivity(environ | {"ETCD_ENDPOINTS": secured}, "tcp", 10)


def test_credentials_that_are_none_are_a_usage_error(files: Certificates, secured: str, tmp_path: Path) -> None:
    good = files.client_environment()
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "ec", "-aes128", "-passout", "pass:hunter2", "-in", str(files.client_key), "-out", str(locked)],
        check=True, capture_output=True,
    )  # fmt: skip
    for text in ("/etc/worker.key", "g\u00e4rbage", locked.read_text()):
        with pytest.raises(UsageError, match="ETCD_AUTH_CLIENT_KEY") as caught:
            check_connectivity(good | {"ETCD_ENDPOINTS": secured, "ETCD_AUTH_CLIENT_KEY": text}, "tcp", 10)
        assert text not in str(caught.value)


def test_a_silent_listener_in_tlss_place() -> None:
    with listening() as port:
        assert "no answer in time" in refusal(local(port, "https"))


@pytest.mark.parametrize("authority", ["garbage", "gärbage", "/etc/ssl/ca.pem"])
def test_an_authority_that_is_none_is_a_usage_error(authority: str) -> None:
    with listening() as port, pytest.raises(UsageError, match="ETCD_AUTH_CA") as caught:
        ask(local(port, "https"), authority=authority)
    assert authority not in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "endpoints"),
    [
        ({}, ["http://localhost:2379"]),
        ({"HEAD_NODE": "n1"}, ["http://n1:2379"]),
        ({"HEAD_NODE": "n1", "HEAD_NODE_IP": "10.0.0.1"}, ["http://10.0.0.1:2379"]),
        ({"HEAD_NODE_IP": "fd00::1"}, ["http://[fd00::1]:2379"]),
        ({"HEAD_NODE": "n1", "ETCD_ENDPOINTS": "http://a:1,http://b:2"}, ["http://a:1", "http://b:2"]),
        ({"HEAD_NODE": "", "ETCD_ENDPOINTS": ""}, ["http://localhost:2379"]),
    ],
)
def test_where_etcd_is(environ: dict[str, str], endpoints: list[str]) -> None:
    assert etcd_endpoints(environ) == endpoints
