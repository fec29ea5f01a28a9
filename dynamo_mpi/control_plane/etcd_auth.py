# SPDX-License-Identifier: Apache-2.0
"""How a worker shows etcd who it is: the ``ETCD_AUTH_*`` variables of Dynamo's runtime, which hold PEM texts, not paths."""

from __future__ import annotations

import os
import ssl
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_mpi.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True, repr=False)
class EtcdAuth:
    """Credentials. Empty texts: not given.

    Args:
        authority: PEM certificates that etcd's own has to come from; the system's where none is given.
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
    def of(cls, environ: Mapping[str, str]) -> EtcdAuth:
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
                    needed="both, or neither",
                    fix=f"set ETCD_AUTH_{missing}, or unset ETCD_AUTH_{there}",
                )
        return cls(*values.values())

    def tls(self) -> ssl.SSLContext:
        """Return the context for a connection to etcd.

        Raises:
            UsageError: a text is not what its variable's name says.
        """
        context = ssl.create_default_context()
        if self.authority:
            try:
                context.load_verify_locations(cadata=self.authority)
            except (OSError, ValueError, TypeError):
                raise _no_pem("ETCD_AUTH_CA holds no certificate") from None
        if self.certificate:
            try:
                # a key with a passphrase would be asked for on the terminal
                with _as_file(self.certificate) as certificate, _as_file(self.key) as key:
                    context.load_cert_chain(certificate, key, password=lambda: "")
            except (OSError, ValueError):
                raise _no_pem("ETCD_AUTH_CLIENT_CERT and ETCD_AUTH_CLIENT_KEY are no certificate and its key") from None
        return context


def _no_pem(found: str) -> UsageError:
    return UsageError(
        found,
        needed="the PEM text itself, not a path: so Dynamo's runtime wants it",
        fix='export ETCD_AUTH_CA="$(cat ca.crt)", and likewise the others',
    )


@contextmanager
def _as_file(text: str) -> Iterator[str]:
    """Lend ``text`` as a path, which OpenSSL asks for: memory of this process's own, so that a secret never lies on a disk."""
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, text.encode("utf-8", "surrogateescape"))
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
