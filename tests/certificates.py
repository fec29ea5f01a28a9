# SPDX-License-Identifier: Apache-2.0
"""Certificates for a test's own servers and clients: those of a run's own authority."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dynamo_mpi.deploy.certificates import Certificates, make_certificates


def certificates(folder: Path) -> Certificates:
    """Make an authority, and what it signs for servers on loopback and for their clients.

    Args:
        folder: a new one.
    """
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    return make_certificates(folder, ("127.0.0.1", "localhost"))


def without_certificate(files: Certificates) -> dict[str, str]:
    """Return the variables of a worker that knows the authority, and has no certificate of its own to show."""
    return {"ETCD_AUTH_CA": files.authority.read_text()}
