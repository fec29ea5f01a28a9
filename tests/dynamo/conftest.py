# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the tests against a real Dynamo."""

from __future__ import annotations

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
