# SPDX-License-Identifier: Apache-2.0
"""Certificates for a test's own servers and clients, made by the ``openssl`` program."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Authority:
    """One that signs certificates, in a folder of its own."""

    pair: Pair

    @classmethod
    def make(cls, folder: Path) -> Authority:
        if shutil.which("openssl") is None:
            pytest.skip("no openssl to make certificates with")
        folder.mkdir(parents=True)
        pair = Pair(folder / "ca.crt", folder / "ca.key")
        words = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
        _openssl(*words, "-subj", "/CN=test authority", "-keyout", str(pair.key), "-out", str(pair.certificate))
        return cls(pair)

    def sign(self, name: str, usage: str) -> Pair:
        """Make a certificate for loopback.

        Args:
            name: its common name, which is the user that etcd takes the client for.
            usage: ``serverAuth`` or ``clientAuth``.
        """
        folder = self.pair.certificate.parent
        pair = Pair(folder / f"{name}.crt", folder / f"{name}.key")
        request, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage={usage}\n")
        words = (
            "req",
            "-new",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-subj",
            f"/CN={name}",
        )
        _openssl(*words, "-keyout", str(pair.key), "-out", str(request))
        authority = ("-CA", str(self.pair.certificate), "-CAkey", str(self.pair.key), "-CAcreateserial", "-days", "2")
        _openssl(
            "x509", "-req", "-in", str(request), *authority, "-extfile", str(extensions), "-out", str(pair.certificate)
        )
        return pair

    def environment(self, client: Pair | None) -> dict[str, str]:
        """Return the variables by which a worker presents ``client`` and knows this authority."""
        variables = {"ETCD_AUTH_CA": self.pair.certificate.read_text()}
        if client is not None:
            variables["ETCD_AUTH_CLIENT_CERT"] = client.certificate.read_text()
            variables["ETCD_AUTH_CLIENT_KEY"] = client.key.read_text()
        return variables


def _openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)
