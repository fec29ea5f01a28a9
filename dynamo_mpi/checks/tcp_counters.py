# SPDX-License-Identifier: Apache-2.0
"""Numbers of sent and retransmitted TCP segments of this host (``/proc/net/snmp``, RFC 4022): they show a bad link."""

from __future__ import annotations

from typing import NamedTuple


class Segments(NamedTuple):
    """Counters of this network namespace since its start, or a difference of two.

    Args:
        sent: segments, without retransmissions.
        resent: retransmitted segments.
    """

    sent: int = 0
    resent: int = 0

    def since(self, earlier: Segments) -> Segments:
        """Return the difference from earlier counters."""
        return Segments(self.sent - earlier.sent, self.resent - earlier.resent)


def segments(path: str = "/proc/net/snmp") -> Segments:
    """Read the counters; zeros if the system doesn't provide them."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            names, values = [line.split() for line in file if line.startswith("Tcp:")]
        counters = dict(zip(names, values, strict=True))
        return Segments(int(counters["OutSegs"]), int(counters["RetransSegs"]))
    except (OSError, ValueError, KeyError):
        return Segments()
