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
    """Send a GET request; the status is 0 if the service doesn't answer.

    Args:
        port: the service's port.
        path: the URL's path.
        host: the service's address.
        tls: TLS context; None for plain HTTP.
        seconds: the timeout of each read.
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
