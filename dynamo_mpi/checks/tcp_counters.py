# SPDX-License-Identifier: Apache-2.0
"""How many TCP segments this host has sent, and how many of them again (``/proc/net/snmp``, RFC 4022): there a bad link shows."""

from __future__ import annotations

from typing import NamedTuple


class Segments(NamedTuple):
    """Of this network namespace, since its start; or the difference of two such.

    Args:
        sent: segments, without those that were sent again.
        resent: segments that were sent again.
    """

    sent: int = 0
    resent: int = 0

    def since(self, earlier: Segments) -> Segments:
        """Return what has come since."""
        return Segments(self.sent - earlier.sent, self.resent - earlier.resent)


def segments(path: str = "/proc/net/snmp") -> Segments:
    """Read them; nothing where the system doesn't tell."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            names, values = [line.split() for line in file if line.startswith("Tcp:")]
        counters = dict(zip(names, values, strict=True))
        return Segments(int(counters["OutSegs"]), int(counters["RetransSegs"]))
    except (OSError, ValueError, KeyError):
        return Segments()
