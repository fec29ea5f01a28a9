# SPDX-License-Identifier: Apache-2.0
"""Credentials for NATS: what can't be used is refused, and real servers take the right ones and no others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.common.errors import AuthorizationError, UsageError
from dynamo_mpi.deploy.certificates import Certificates, make_certificates
from dynamo_mpi.discovery.connectivity import check_connectivity
from dynamo_mpi.discovery.endpoints import ConnectivityError, read_address
from dynamo_mpi.discovery.etcd import EtcdAuth
from dynamo_mpi.discovery.nats_auth import NatsAuth
from dynamo_mpi.discovery.nats_check import check_nats, nats_refused, nats_unanswered
from tests.certificates import certificates
from tests.nats_keys import Operator, identity
from tests.servers import running_etcd, running_nats

WORD = "s3cret-w0rd"
USER = {"NATS_AUTH_USERNAME": "me", "NATS_AUTH_PASSWORD": WORD}
TOKEN = {"NATS_AUTH_TOKEN": WORD}
SEED = "SU" + "A" * 56


def ask(url: str, environ: dict[str, str], installed: tuple[int, ...] | None = None) -> ConnectivityError | None:
    """Return what the check raises that is wrong with NATS."""
    auth = NatsAuth.from_env({**environ, "NATS_SERVER": url})
    address = read_address(url, 4222, ("nats", "tls"), "NATS_SERVER")
    try:
        check_nats(address, auth, auth.tls(), time.monotonic() + 10, installed)
    except ConnectivityError as error:
        return error
    return None


def refusal(url: str, environ: dict[str, str]) -> str:
    """Return what a worker gets that NATS must not take; no secret may be in it."""
    error_of_nats = ask(url, environ)
    assert error_of_nats is not None
    assert error_of_nats.refused, error_of_nats
    error = nats_refused(url, error_of_nats.text, NatsAuth.from_env(environ))
    assert error.exit_code == 77
    for secret in filter(None, (environ.get(f"NATS_AUTH_{name}") for name in ("PASSWORD", "TOKEN", "NKEY"))):
        assert secret not in str(error)
    return str(error)


@pytest.mark.parametrize(
    ("environ", "kind", "words"),
    [
        ({}, "", {"user": "user", "pass": "user"}),
        (USER | TOKEN, "NATS_AUTH_USERNAME and NATS_AUTH_PASSWORD", {"user": "me", "pass": WORD}),
        (TOKEN | {"NATS_AUTH_NKEY": SEED}, "NATS_AUTH_TOKEN", {"auth_token": WORD}),
        ({"NATS_AUTH_NKEY": SEED}, "NATS_AUTH_NKEY", {}),
        ({"NATS_AUTH_USERNAME": "", "NATS_AUTH_PASSWORD": "", **TOKEN}, "NATS_AUTH_TOKEN", {"auth_token": WORD}),
    ],
)
def test_the_first_kind_counts_as_with_the_runtime(environ: dict[str, str], kind: str, words: dict[str, str]) -> None:
    auth = NatsAuth.from_env(environ)
    assert (auth.kind, auth.connect_options()) == (kind, words)
    assert WORD not in repr(auth)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"NATS_AUTH_USERNAME": "me"}, "NATS_AUTH_PASSWORD isn't"),
        ({"NATS_AUTH_PASSWORD": WORD}, "NATS_AUTH_USERNAME isn't"),
        ({"NATS_TLS_CLIENT_CERT_PATH": __file__}, "NATS_TLS_CLIENT_KEY_PATH isn't"),
        ({"NATS_TLS_CA_CERT_PATH": "/no/such"}, "no such file"),
        ({"NATS_TLS_CA_CERT_PATH": "-----BEGIN CERTIFICATE-----\nx"}, "is the text itself"),
        ({"NATS_AUTH_CREDENTIALS_FILE": "/no/such"}, "no such file"),
        ({"NATS_AUTH_CREDENTIALS_FILE": "/"}, "is a directory"),
        ({"NATS_AUTH_CREDENTIALS_FILE": "a\0b"}, "is no path"),
        ({"NATS_AUTH_NKEY": WORD}, "no seed"),
        ({"NATS_SERVER": f"nats://me:{WORD}@h"}, "does not read there"),
    ],
)
def test_what_can_not_be_used_is_a_usage_error(environ: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        NatsAuth.from_env(environ)
    assert WORD not in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    "environ",
    [
        {"NATS_TLS_CA_CERT_PATH": __file__},
        {"NATS_TLS_CLIENT_CERT_PATH": __file__, "NATS_TLS_CLIENT_KEY_PATH": __file__},
    ],
)
def test_files_that_hold_something_else_are_a_usage_error(environ: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="NATS_TLS_"):
        NatsAuth.from_env(environ).tls()


@pytest.mark.parametrize(
    ("config", "right", "wrong"),
    [
        (f'authorization {{ user: "me", password: "{WORD}" }}', USER, USER | {"NATS_AUTH_PASSWORD": "0ther"}),
        (f'authorization {{ token: "{WORD}" }}', TOKEN, {"NATS_AUTH_TOKEN": "0ther"}),
    ],
    ids=["password", "token"],
)
def test_right_wrong_and_absent(config: str, right: dict[str, str], wrong: dict[str, str]) -> None:
    with running_nats(config) as url:
        assert ask(url, right) is None
        assert f"correct {NatsAuth.from_env(wrong).kind}" in refusal(url, wrong)
        assert "none are set" in refusal(url, {})


def test_who_is_asked_for_nothing_may_say_anything() -> None:
    with running_nats() as url:
        for environ in ({}, USER, TOKEN):
            assert ask(url, environ) is None


def test_a_user_that_the_runtime_shows_by_itself_is_let_in() -> None:
    with running_nats('authorization { user: "user", password: "user" }') as url:
        assert ask(url, {}) is None


def test_an_nkey() -> None:
    ours, other = identity(), identity()
    with running_nats(f'authorization {{ users: [{{ nkey: "{ours.public}" }}] }}') as url:
        assert ask(url, {"NATS_AUTH_NKEY": ours.seed}) is None
        assert "correct NATS_AUTH_NKEY" in refusal(url, {"NATS_AUTH_NKEY": other.seed})
        assert "none are set" in refusal(url, {})


def test_a_credentials_file(tmp_path: Path) -> None:
    operator, stranger = Operator(), Operator()
    files: dict[str, dict[str, str]] = {}
    for name, text in {
        "right": operator.credentials(),
        "wrong": stranger.credentials(),
        "expired": operator.credentials(time.time() - 100_000),
        "empty": "",
    }.items():
        (tmp_path / name).write_text(text)
        files[name] = {"NATS_AUTH_CREDENTIALS_FILE": str(tmp_path / name)}
    with running_nats(operator.config()) as url:
        assert ask(url, files["right"]) is None
        assert "correct NATS_AUTH_CREDENTIALS_FILE" in refusal(url, files["wrong"])
        assert "NATS_AUTH_CREDENTIALS_FILE has expired on 20" in refusal(url, files["expired"])
        assert "holds no key" in refusal(url, files["empty"])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("tls") / "ours")


def block(files: Certificates, verify: bool) -> str:
    names = {"cert_file": files.server, "key_file": files.server_key, "ca_file": files.authority}
    return (
        "tls {" + ", ".join(f'{name}: "{path}"' for name, path in names.items()) + f", verify: {str(verify).lower()}}}"
    )


def tls(files: Certificates, *, client: bool = True) -> dict[str, str]:
    own = {"NATS_TLS_CLIENT_CERT_PATH": str(files.client), "NATS_TLS_CLIENT_KEY_PATH": str(files.client_key)}
    return {"NATS_TLS_CA_CERT_PATH": str(files.authority)} | (own if client else {})


@pytest.fixture(scope="module")
def one_way(files: Certificates) -> Iterator[str]:
    with running_nats(block(files, verify=False)) as url:
        yield url.replace("nats:", "tls:")


@pytest.fixture(scope="module")
def both_ways(files: Certificates) -> Iterator[str]:
    with running_nats(block(files, verify=True)) as url:
        yield url.replace("nats:", "tls:")


def test_over_tls_its_certificate_is_checked(one_way: str, files: Certificates, tmp_path: Path) -> None:
    assert ask(one_way, tls(files, client=False)) is None
    assert ask(one_way, {"NATS_TLS_INSECURE": "1"}) is None
    theirs = certificates(tmp_path / "theirs")
    for environ in ({}, tls(theirs, client=False)):
        with pytest.raises(OSError, match="certificate verify failed") as caught:
            ask(one_way, environ)
        error = nats_unanswered(one_way, str(caught.value), 5)
        assert error.exit_code == 69
        assert "NATS_TLS_CA_CERT_PATH" in error.fix


def test_over_tls_in_both_directions_ours_is_too(both_ways: str, files: Certificates, tmp_path: Path) -> None:
    assert ask(both_ways, tls(files)) is None
    assert "a worker without a certificate" in refusal(both_ways, tls(files, client=False))
    theirs = certificates(tmp_path / "theirs")
    text = refusal(both_ways, tls(theirs) | tls(files, client=False))
    assert "this worker's certificate" in text
    assert "NATS_TLS_CLIENT_CERT_PATH" in text


def test_an_expired_certificate_is_reported(tmp_path: Path) -> None:
    old = make_certificates(tmp_path / "old", ("127.0.0.1",), datetime(2010, 1, 1, tzinfo=timezone.utc))
    # the authority has expired as well, so its own server is not to be believed either
    new = certificates(tmp_path / "new")
    config = block(new, verify=True).replace(str(new.authority), str(old.authority))
    with running_nats(config) as url:
        assert "expired" in refusal(url.replace("nats:", "tls:"), tls(old) | tls(new, client=False))


@pytest.mark.parametrize("installed", [(1, 4), (1, 6), None])
def test_a_nats_with_tls_needs_a_runtime_that_can(
    installed: tuple[int, ...] | None, one_way: str, files: Certificates
) -> None:
    plain = one_way.replace("tls:", "nats:")
    with pytest.raises(UsageError, match=r"1\.4 can't" if installed == (1, 4) else "this NATS requires TLS"):
        ask(plain, {}, installed)
    if installed == (1, 4):
        with pytest.raises(UsageError, match=r"1\.4 can't"):
            ask(one_way, tls(files, client=False), installed)
    else:
        assert ask(one_way, tls(files, client=False), installed) is None


def test_tls_to_a_nats_without_it() -> None:
    with running_nats() as url:
        error_of_nats = ask(url.replace("nats:", "tls:"), {})
        assert error_of_nats is not None
        assert "has no TLS" in error_of_nats.text
        assert not error_of_nats.refused


def test_the_probe_of_all_refuses_before_anything_is_loaded() -> None:
    with running_etcd() as etcd, running_nats(f'authorization {{ token: "{WORD}" }}') as nats:
        environ: dict[str, Any] = {"ETCD_ENDPOINTS": etcd, "NATS_SERVER": nats}
        assert check_connectivity(environ | TOKEN, "tcp", 10) == [etcd]
        for plane in ("tcp", "nats"):
            with pytest.raises(AuthorizationError, match="NATS requires credentials, and none are set"):
                check_connectivity(environ, plane, 10)


def test_with_an_authority_of_its_own_no_other_is_trusted(tmp_path: Path) -> None:
    ours = make_certificates(tmp_path / "ours", ("127.0.0.1",))
    etcd = EtcdAuth.from_env({"ETCD_AUTH_CA": ours.authority.read_text()}).tls()
    nats = NatsAuth.from_env({"NATS_TLS_CA_CERT_PATH": str(ours.authority)}).tls()
    assert [len(context.get_ca_certs()) for context in (etcd, nats)] == [1, 1]
