# SPDX-License-Identifier: Apache-2.0
"""Rejects settings that etcd, NATS and our own clients support but Dynamo's runtime doesn't: it would fail two minutes after the load.

Observed with ai-dynamo-runtime 1.4.2 and 1.6.1: it sends etcd a password *or* certificates, preferably a password, and certificates only if
all three variables are set and the endpoint is ``https://``; it never renews a password's token; it supports TLS for NATS since 1.5. An
empty variable counts as set. Pure, but for `runtime_version`.
"""

from __future__ import annotations

import re

from dynamo_mpi.common.distributions import installed_versions
from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    from dynamo_mpi.discovery.etcd import EtcdAuth
    from dynamo_mpi.discovery.nats_auth import NatsAuth

_NATS_TLS_SINCE = (1, 5)
_CREDENTIALS = ("ETCD_AUTH_", "NATS_AUTH_", "NATS_TLS_")
TOKENS_END = (
    "Dynamo's runtime does not renew its token for etcd's user {user}: it ends after etcd's --auth-token-ttl (300 s by default), "
    "and then neither deregistering nor a frontend's look at etcd works; set that as long as the job, or use certificates with CN={user} "
    "over https://"
)


def runtime_version() -> tuple[int, ...] | None:
    """Return the version of Dynamo's runtime that is installed here; None if that isn't known."""
    found = re.match(r"(\d+)\.(\d+)", installed_versions(["ai-dynamo-runtime"]).get("ai-dynamo-runtime", ""))
    return (int(found[1]), int(found[2])) if found else None


def has_nats_tls(installed: tuple[int, ...] | None) -> bool:
    """Return whether this version of Dynamo's runtime can use a NATS with TLS; False if the version isn't known."""
    return installed is not None and installed >= _NATS_TLS_SINCE


def remove_empty_credentials(environ: MutableMapping[str, str]) -> None:
    """Unset empty credentials: scripts use them for "none", but for the runtime an empty variable is set."""
    for name in [name for name, value in environ.items() if name.startswith(_CREDENTIALS) and not value]:
        del environ[name]


def check_runtime_can_use(endpoints: Sequence[str], auth: EtcdAuth) -> list[str]:
    """Reject settings of etcd that the runtime doesn't support.

    Args:
        endpoints: the endpoints that it must use.
        auth: our credentials.

    Returns:
        Warnings.

    Raises:
        UsageError: the runtime can't use them.
    """
    secured = [endpoint for endpoint in endpoints if endpoint.startswith("https://")]
    certificates = (auth.authority, auth.certificate, auth.key)
    if auth.username and secured:
        raise UsageError(
            "ETCD_AUTH_USERNAME is set, and etcd is https://: Dynamo's runtime sends etcd a password only without TLS",
            expected="certificates, whose CN is the user's name for etcd",
            fix="unset ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD, and set ETCD_AUTH_CA, ETCD_AUTH_CLIENT_CERT and ETCD_AUTH_CLIENT_KEY "
            "to PEM texts",
        )
    if secured and not all(certificates):
        raise UsageError(
            "etcd is https://, and not all of ETCD_AUTH_CA, ETCD_AUTH_CLIENT_CERT and ETCD_AUTH_CLIENT_KEY are set: Dynamo's runtime uses "
            "TLS to etcd only with all three",
            expected="all three as PEM texts, even if etcd requires no client certificate",
            fix='export ETCD_AUTH_CA="$(cat ca.crt)" ETCD_AUTH_CLIENT_CERT="$(cat client.crt)" ETCD_AUTH_CLIENT_KEY="$(cat client.key)"',
        )
    if all(certificates) and not auth.username and len(secured) < len(endpoints):
        raise UsageError(
            "ETCD_AUTH_CA, ETCD_AUTH_CLIENT_CERT and ETCD_AUTH_CLIENT_KEY are set, and etcd is not https://: Dynamo's runtime would send "
            "certificates to an etcd without TLS",
            expected="https:// for all endpoints, or no certificates",
            fix="correct ETCD_ENDPOINTS, or unset ETCD_AUTH_CA, ETCD_AUTH_CLIENT_CERT and ETCD_AUTH_CLIENT_KEY",
        )
    return [TOKENS_END.format(user=auth.username)] if auth.username else []


def require_nats(
    is_tls: bool, auth: NatsAuth, installed: tuple[int, ...] | None, *, tls_required: bool = False
) -> None:
    """Reject settings of NATS that the runtime doesn't support.

    Args:
        is_tls: its address is ``tls://``.
        auth: our credentials.
        installed: the runtime's version; None if it isn't known.
        tls_required: NATS accepts no connection without TLS.

    Raises:
        UsageError: the runtime can't use them.
    """
    if (is_tls or tls_required) and installed is not None and not has_nats_tls(installed):
        raise UsageError(
            f"this NATS needs TLS, which Dynamo's runtime {'.'.join(map(str, installed))} can't do",
            expected="ai-dynamo-runtime 1.5 or newer, or a NATS without TLS",
            fix="upgrade ai-dynamo, or leave NATS_SERVER unset and use the tcp request plane, which needs no NATS",
        )
    if (tls_required or auth.has_tls) and not is_tls:
        why = "this NATS requires TLS" if tls_required else "NATS_TLS_* is set"
        raise UsageError(
            f"NATS_SERVER is not tls://, and {why}: Dynamo's runtime uses TLS only for a tls:// address",
            expected="NATS_SERVER=tls://HOST:PORT",
            fix="correct NATS_SERVER" if tls_required else "correct NATS_SERVER, or unset NATS_TLS_*",
        )
