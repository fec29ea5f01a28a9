# SPDX-License-Identifier: Apache-2.0
"""The one place where secrets are taken out of what doctor shows."""

from __future__ import annotations

import re

_IN_URL = re.compile(r"(?<=://)[^/\s]*@")


def redact(text: str) -> str:
    """Return ``text`` without credentials that stand in addresses. Pure, idempotent."""
    return _IN_URL.sub("", text)
