# SPDX-License-Identifier: Apache-2.0
"""What the deployment's frontend serves."""

from __future__ import annotations

import http.client
import json
from urllib.parse import urlsplit


def listed_models(url: str) -> list[str] | None:
    """Return the models that a frontend lists; None where it doesn't answer."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
    try:
        connection.request("GET", "/v1/models")
        content = json.loads(connection.getresponse().read())
        return [str(model["id"]) for model in content["data"]]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None
    finally:
        connection.close()
