# SPDX-License-Identifier: Apache-2.0
"""One HTTP request with a short timeout, to a service that may not run yet."""

from __future__ import annotations

import http.client
import json
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.ports import LOOPBACK

if TYPE_CHECKING:
    import ssl

PROBE_SECONDS = 1.0


def get_json(
    port: int, path: str, *, host: str = LOOPBACK, tls: ssl.SSLContext | None = None, seconds: float = PROBE_SECONDS
) -> tuple[int, dict[str, Any]]:
    """GET from a service; status 0 when it doesn't answer.

    Args:
        port: where it listens.
        path: what is asked for.
        host: the address at which it listens.
        tls: ask over TLS, with the certificates in here.
        seconds: for each of its answers' parts to come in.
    """
    connection = (
        http.client.HTTPConnection(host, port, timeout=seconds)
        if tls is None
        else http.client.HTTPSConnection(host, port, timeout=seconds, context=tls)
    )
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = json.loads(response.read() or b"{}")
        return response.status, body if isinstance(body, dict) else {}
    except (OSError, http.client.HTTPException, ValueError):
        return 0, {}
    finally:
        connection.close()
