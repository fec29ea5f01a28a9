# SPDX-License-Identifier: Apache-2.0
"""The interface to etcd for the rest of the package: its addresses, our credentials, and a client that is independent of the transport.

Ranks use the transport `etcd_grpc`; hosts that have only Python use `etcd_http`. The credentials are the ``ETCD_AUTH_*``
variables of Dynamo's runtime, which hold PEM texts, not paths.
"""

from __future__ import annotations

import os
import ssl
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dynamo_mpi.common.errors import AuthorizationError, DiscoveryError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DEFAULT_PORT = 2379
_LEASE_SECONDS = 30
DEFAULT_ETCD = f"http://localhost:{DEFAULT_PORT}"


# the first release of each minor version in which clients without credentials can't use up the server's descriptors (CVE-2026-73500)
_SAFE_PATCH = {(3, 5): 33, (3, 6): 14, (3, 7): 1}
SAFE_ETCD = "etcd 3.5.33, 3.6.14, 3.7.1 or newer"


def is_outdated_etcd(version: str) -> bool:
    """Return whether this release of etcd has known security holes that concern a shared cluster; False if its version can't be read."""
    try:
        major, minor, patch = (int(part) for part in version.partition("-")[0].split("."))
    except ValueError:
        return False
    return (major, minor) < min(_SAFE_PATCH) or patch < _SAFE_PATCH.get((major, minor), 0)


class KeyValue(NamedTuple):
    """One key with its value.

    Args:
        key: its name.
        value: its content.
        create_revision: grows with every write to etcd, so of two keys the older has the smaller one.
        lease: the key is deleted when it ends; 0 for none.
    """

    key: str
    value: bytes
    create_revision: int
    lease: int


class Lease(NamedTuple):
    """A lease, and the seconds that it lives without being kept alive."""

    id: int
    seconds: int


class LeaseLostError(DiscoveryError):
    """The lease does not exist any more, and neither do its keys."""


class CredentialsError(AuthorizationError):
    """etcd knows no user with this name and password."""


class EtcdClient(Protocol):
    """The calls of both transports. Every call has a deadline, and raises a `DynamoMpiError`:

    Raises:
        DiscoveryError: etcd does not answer in time.
        AuthorizationError: it rejects our credentials.
    """

    def get_prefix(self, prefix: str) -> list[KeyValue]:
        """Return all keys that begin with ``prefix``."""

    def put(self, key: str, value: bytes, lease: int) -> None:
        """Write a key under a lease.

        Raises:
            LeaseLostError: there is no such lease.
        """

    def create(self, key: str, value: bytes, lease: int) -> bool:
        """Write a key as `put` does, unless it exists; return whether it was written."""

    def grant(self, seconds: int) -> Lease:
        """Return a new lease that lives at least ``seconds`` without being kept alive."""

    def revoke(self, lease: int) -> bool:
        """End a lease and delete its keys; return whether it existed."""


def lease_lost() -> LeaseLostError:
    """Return the error of a call whose lease does not exist."""
    return LeaseLostError("the lease in etcd is lost", expected="a lease that is kept alive", fix="look at etcd")


def end_of_prefix(prefix: str) -> bytes:
    """Return the first key behind all that begin with ``prefix``, as etcd's ranges need it."""
    start = prefix.encode()
    return start[:-1] + bytes([start[-1] + 1])


def etcd_endpoints(environ: Mapping[str, str]) -> list[str]:
    """Return the etcd endpoints that the Dynamo runtime must use: ``ETCD_ENDPOINTS``, or etcd's port on the head node that Dynamo's Slurm
    example names, or the runtime's default."""
    head = environ.get("HEAD_NODE_IP") or environ.get("HEAD_NODE")
    at_head = f"http://{f'[{head}]' if ':' in head else head}:{DEFAULT_PORT}" if head else ""
    text = environ.get("ETCD_ENDPOINTS") or at_head or DEFAULT_ETCD
    return [part.strip() for part in text.split(",") if part.strip()]


def lease_seconds(environ: Mapping[str, str]) -> int:
    """Return the seconds after which a lease of a worker that was killed expires: the same as for Dynamo's own."""
    text = environ.get("ETCD_LEASE_TTL", "")
    return int(text) if text.isdecimal() and 0 < int(text) < 2**31 else _LEASE_SECONDS


@dataclass(frozen=True, repr=False)
class EtcdAuth:
    """Credentials. Empty texts: not given.

    Args:
        authority: PEM certificates that sign etcd's own; the system's if none is given.
        certificate: this client's, PEM.
        key: its private key, PEM.
        username: of etcd's own users.
        password: that user's.
    """

    authority: str = ""
    certificate: str = ""
    key: str = ""
    username: str = ""
    password: str = ""

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> EtcdAuth:
        """Read them from the environment.

        Raises:
            UsageError: half of a pair is missing.
        """
        names = ("CA", "CLIENT_CERT", "CLIENT_KEY", "USERNAME", "PASSWORD")
        values = {name: environ.get(f"ETCD_AUTH_{name}", "") for name in names}
        for one, other in (("CLIENT_CERT", "CLIENT_KEY"), ("USERNAME", "PASSWORD")):
            if bool(values[one]) != bool(values[other]):
                there, missing = (one, other) if values[one] else (other, one)
                raise UsageError(
                    f"ETCD_AUTH_{there} is set and ETCD_AUTH_{missing} isn't",
                    expected="both, or neither",
                    fix=f"set ETCD_AUTH_{missing}, or unset ETCD_AUTH_{there}",
                )
        return cls(*values.values())

    def tls(self) -> ssl.SSLContext:
        """Return the context for a connection to etcd.

        Raises:
            UsageError: a text is no certificate or key.
        """
        try:
            # with an authority of its own, the system's authorities are not trusted
            context = ssl.create_default_context(cadata=self.authority or None)
        except (OSError, ValueError, TypeError):
            raise _no_pem("ETCD_AUTH_CA holds no certificate") from None
        if self.certificate:
            try:
                # for a key with a passphrase, OpenSSL would ask on the terminal
                with _as_file(self.certificate) as certificate, _as_file(self.key) as key:
                    context.load_cert_chain(certificate, key, password=lambda: "")
            except (OSError, ValueError):
                raise _no_pem("ETCD_AUTH_CLIENT_CERT and ETCD_AUTH_CLIENT_KEY are no certificate and its key") from None
        return context


def _no_pem(found: str) -> UsageError:
    return UsageError(
        found,
        expected="the PEM text itself, not a path, as for Dynamo's runtime",
        fix='export ETCD_AUTH_CA="$(cat ca.crt)", and likewise the others',
    )


@contextmanager
def _as_file(text: str) -> Iterator[str]:
    """Provide ``text`` under a path, which OpenSSL needs: a file in memory, so that a secret is never written to a disk."""
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, text.encode("utf-8", "surrogateescape"))
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
