# SPDX-License-Identifier: Apache-2.0
"""Creates the credentials of one run: for etcd, a certificate authority with two certificates, the server's and one that all clients share;
for NATS, a password.

Uses the ``openssl`` program, 1.1.1 or newer, so that no Python package must be installed in the container. The authority's key
is deleted before the services start, so that no third certificate can be signed.
"""

from __future__ import annotations

import json
import secrets
import shutil
import ssl
import subprocess
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cached_property
from ipaddress import ip_address
from typing import TYPE_CHECKING

from dynamo_mpi.common.credentials import NATS_CA
from dynamo_mpi.common.errors import DynamoMpiError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

NATS_USER = "dynamo"
OPENSSL_SECONDS = 60.0  # each call takes some 10 ms
_HANDSHAKE_SECONDS = 15
_EARLIER = timedelta(days=1)  # clocks of other nodes may be behind
_LIFE = timedelta(days=3650)  # longer than any job, so that no certificate expires during one
_WITHOUT = "or use no credentials: --credentials none"


@dataclass(frozen=True)
class Certificates:
    """The files; only this user can read the keys.

    Args:
        folder: a private folder.
    """

    folder: Path

    @property
    def authority(self) -> Path:
        return self.folder / "authority.crt"

    @property
    def server(self) -> Path:
        return self.folder / "server.crt"

    @property
    def server_key(self) -> Path:
        return self.folder / "server.key"

    @property
    def client(self) -> Path:
        return self.folder / "client.crt"

    @property
    def client_key(self) -> Path:
        return self.folder / "client.key"

    @cached_property
    def client_context(self) -> ssl.SSLContext:
        """Return the context for Python's TLS clients."""
        context = ssl.create_default_context(cafile=str(self.authority))
        context.load_cert_chain(str(self.client), str(self.client_key))
        return context

    def client_environment(self) -> dict[str, str]:
        """Return the variables for the Dynamo runtime, which contain the PEM texts, not paths."""
        return {
            "ETCD_AUTH_CA": self.authority.read_text(),
            "ETCD_AUTH_CLIENT_CERT": self.client.read_text(),
            "ETCD_AUTH_CLIENT_KEY": self.client_key.read_text(),
        }


@dataclass(frozen=True)
class Credentials:
    """What a run's services ask of their clients.

    Args:
        certificates: etcd's.
        nats_config: NATS's configuration file, which holds its password.
        client_environment: the variables that clients need, as for a services file.
        nats_tls: whether NATS's clients need TLS.
    """

    certificates: Certificates
    nats_config: Path
    client_environment: Mapping[str, str]
    nats_tls: bool = False


def make_credentials(folder: Path, names: Sequence[str], *, nats_tls: bool) -> Credentials:
    """Create the credentials of one run.

    Args:
        folder: a private folder.
        names: addresses and host names of the services.
        nats_tls: whether NATS's clients, Dynamo's runtime among them, can do TLS.

    Raises:
        UsageError: openssl isn't installed.
        DynamoMpiError: it failed.
    """
    certificates = make_certificates(folder / "certificates", names)
    password = secrets.token_hex(24)
    config = folder / "nats.conf"
    config.touch(mode=0o600)
    # NATS accepts JSON strings
    text = f"authorization {{ user: {json.dumps(NATS_USER)}, password: {json.dumps(password)} }}\n"
    nats = {"NATS_AUTH_USERNAME": NATS_USER, "NATS_AUTH_PASSWORD": password}
    if nats_tls:
        pair = (
            f"cert_file: {json.dumps(str(certificates.server))}, key_file: {json.dumps(str(certificates.server_key))}"
        )
        # NATS's own limit of 2 s is short for a handshake on a busy host
        text += f"tls {{ {pair}, timeout: {_HANDSHAKE_SECONDS} }}\n"
        nats[NATS_CA] = certificates.authority.read_text()
    config.write_text(text)
    return Credentials(certificates, config, {**certificates.client_environment(), **nats}, nats_tls)


def make_certificates(folder: Path, names: Sequence[str], now: datetime | None = None) -> Certificates:
    """Create an authority, a server's and a client's certificate.

    Args:
        folder: a new private folder, which is created.
        names: addresses and host names of the server.
        now: the time in UTC.

    Raises:
        UsageError: openssl isn't installed.
        DynamoMpiError: it failed.
    """
    openssl = shutil.which("openssl")
    if openssl is None:
        raise UsageError(
            "no openssl on PATH: it makes the certificates for etcd",
            expected="openssl 1.1.1 or newer",
            fix=f"install it, {_WITHOUT}",
        )
    folder.mkdir(mode=0o700)
    (folder / "openssl.cnf").write_text(openssl_config(names))
    (folder / "index.txt").touch()
    try:
        for name in ("authority", "server", "client"):
            for words in openssl_calls(name, now or datetime.now(timezone.utc)):
                _run(openssl, words, folder)
    finally:
        (folder / "authority.key").unlink(missing_ok=True)
    return Certificates(folder)


def openssl_config(names: Sequence[str]) -> str:
    """Return the configuration of the authority (openssl-ca(1), x509v3_config(5)).

    Args:
        names: addresses and host names of the server.
    """
    return f"""\
[ca]
default_ca = run
[run]
database = index.txt
new_certs_dir = .
rand_serial = yes
default_md = sha256
policy = named
unique_subject = no
[named]
commonName = supplied
[req]
distinguished_name = nothing
[nothing]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
# etcd is a client too: of itself, for its JSON interface and its peers
extendedKeyUsage = serverAuth, clientAuth
authorityKeyIdentifier = keyid
subjectAltName = {", ".join(f"{_kind(name)}:{name}" for name in dict.fromkeys(names))}
[client]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = clientAuth
authorityKeyIdentifier = keyid
"""


def openssl_calls(name: str, now: datetime) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the arguments that create a key with a request, and those that sign it. Paths are relative to the folder.

    ``openssl ca`` signs, because ``openssl x509`` can't backdate a certificate before version 3.4.

    Args:
        name: ``authority``, ``server`` or ``client``.
        now: the time in UTC.
    """
    signer = ("-selfsign",) if name == "authority" else ("-cert", "authority.crt")
    request = (
        *("req", "-new", "-config", "openssl.cnf", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        *("-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN=dynamo-mpi {name}"),
    )
    sign = (
        *("ca", "-batch", "-notext", "-config", "openssl.cnf", *signer, "-keyfile", "authority.key"),
        *("-in", f"{name}.csr", "-out", f"{name}.crt", "-extensions", name),
        *("-startdate", _date(now - _EARLIER), "-enddate", _date(now + _LIFE)),
    )
    return request, sign


def _run(openssl: str, words: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            [openssl, *words],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=OPENSSL_SECONDS,
            umask=0o077,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DynamoMpiError(
            f"openssl {words[0]} takes longer than {OPENSSL_SECONDS:g} s",
            expected="keys and certificates within that time",
            fix=_WITHOUT[3:],
        ) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise DynamoMpiError(
            f"openssl {words[0]} failed with exit code {done.returncode}: {last}",
            expected="openssl 1.1.1 or newer",
            fix=f"another openssl on PATH, {_WITHOUT}",
        )


def _kind(name: str) -> str:
    try:
        ip_address(name)
    except ValueError:
        return "DNS"
    return "IP"


def _date(time: datetime) -> str:
    return time.strftime("%Y%m%d%H%M%SZ")
