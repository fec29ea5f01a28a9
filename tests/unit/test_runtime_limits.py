# SPDX-License-Identifier: Apache-2.0
"""What Dynamo's runtime can't do is refused with its reason, and nothing else is."""

from __future__ import annotations

import pytest

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.discovery.etcd import EtcdAuth
from dynamo_mpi.discovery.nats_auth import NatsAuth
from dynamo_mpi.discovery.runtime_compat import check_runtime_can_use, require_nats, runtime_version

SECURED, PLAIN = "https://h:1", "http://h:1"
NO_CREDENTIALS, PASSWORD = EtcdAuth(), EtcdAuth("", "", "", "worker", "s3cret")
CERTIFICATES = EtcdAuth("CA", "CERT", "KEY")


def test_the_installed_runtime_is_known() -> None:
    installed = runtime_version()
    assert installed is not None
    assert installed >= (1, 4)


@pytest.mark.parametrize(
    ("endpoints", "auth"),
    [
        ([PLAIN], NO_CREDENTIALS),
        (["h:1"], NO_CREDENTIALS),
        ([SECURED], CERTIFICATES),
        ([PLAIN], EtcdAuth("CA")),
        ([SECURED, SECURED], CERTIFICATES),
    ],
)
def test_what_it_can_is_let_through(endpoints: list[str], auth: EtcdAuth) -> None:
    assert check_runtime_can_use(endpoints, auth) == []


def test_of_a_password_whose_token_ends_there_is_a_warning() -> None:
    (line,) = check_runtime_can_use([PLAIN], PASSWORD)
    assert "--auth-token-ttl" in line
    assert "CN=worker" in line
    assert "s3cret" not in line


@pytest.mark.parametrize(
    ("endpoints", "auth", "word"),
    [
        ([SECURED], PASSWORD, "only without TLS"),
        ([SECURED], EtcdAuth("CA", "CERT", "KEY", "worker", "s3cret"), "only without TLS"),
        ([SECURED], EtcdAuth("CA"), "only with all three"),
        ([SECURED], NO_CREDENTIALS, "only with all three"),
        ([PLAIN], CERTIFICATES, "etcd without TLS"),
        ([SECURED, PLAIN], CERTIFICATES, "etcd without TLS"),
    ],
)
def test_what_it_can_not_is_refused(endpoints: list[str], auth: EtcdAuth, word: str) -> None:
    with pytest.raises(UsageError, match=word) as caught:
        check_runtime_can_use(endpoints, auth)
    assert caught.value.fix
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("is_tls", "auth", "installed", "tls_required", "word"),
    [
        (False, NatsAuth(), (1, 4), False, ""),
        (True, NatsAuth(), (1, 5), True, ""),
        (True, NatsAuth(), None, True, ""),
        (True, NatsAuth(), (1, 4), False, "1.4 can't"),
        (False, NatsAuth(), (1, 4), True, "1.4 can't"),
        (False, NatsAuth(), (1, 6), True, "this NATS requires TLS"),
        (False, NatsAuth(insecure=True), (1, 6), False, "NATS_TLS_\\* is set"),
    ],
)
def test_tls_to_nats(
    is_tls: bool, auth: NatsAuth, installed: tuple[int, ...] | None, tls_required: bool, word: str
) -> None:
    if not word:
        require_nats(is_tls, auth, installed, tls_required=tls_required)
        return
    with pytest.raises(UsageError, match=word):
        require_nats(is_tls, auth, installed, tls_required=tls_required)
