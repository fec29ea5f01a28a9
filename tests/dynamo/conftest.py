# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the tests against a real Dynamo."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dynamo.running import EtcdServer


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """An etcd of this test's own."""
    server = EtcdServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A node's disk, for TMPDIR; short, as a unix socket's name holds 107 bytes."""
    folder = tempfile.mkdtemp(prefix="t-")
    yield Path(folder)
    shutil.rmtree(folder)
