# SPDX-License-Identifier: Apache-2.0
"""What this host has for hand-offs, and marks for tests that need it."""

from __future__ import annotations

import socket

import pytest

from dynamo_mpi.checks.kv_pull import nixl_installed


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this host has no ::1")
needs_nixl = pytest.mark.skipif(not nixl_installed(), reason="NIXL is not installed: pip install --no-deps nixl-cu12")
TRANSPORTS = ["tcp", pytest.param("nixl", marks=needs_nixl)]
