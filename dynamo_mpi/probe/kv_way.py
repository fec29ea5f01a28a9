# SPDX-License-Identifier: Apache-2.0
"""Which transport and device carried the bytes, out of what UCX writes about itself and what the kernel counts. Pure but for `Counters`.

UCX writes at ``UCX_LOG_LEVEL=info`` the lanes of an endpoint, and newer ones with ``UCX_PROTO_INFO=y`` a table for each operation towards
each kind of peer (seen of 1.13 and 1.23):

    | fa504ba0f8d6c32f inter-node cfg#1                                  |
    | remote memory read by ucp_get*(multi) into host memory from host   |
    | 0..inf | zero-copy | rc_mlx5/mlx5_0:1                              |
    ... inter-node cfg#1 rma(rc_mlx5/mlx5_0:1) am(rc_mlx5/mlx5_0:1) ...
    ... ep_cfg[0]: rma(rc_mlx5/mlx5_0:1) ka(ud_mlx5/mlx5_0:1)
"""

from __future__ import annotations

import contextlib
import glob
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SETTINGS: Mapping[str, str] = {"UCX_LOG_LEVEL": "info", "UCX_PROTO_INFO": "y", "UCX_LOG_FILE": "stderr"}
"""What makes UCX tell."""
_READ = "remote memory read"
_PEER = re.compile(r"\b(?:intra|inter)-node cfg#\d+|\bep_cfg\[\d+\]: ")
_LANES = re.compile(r"\brma(?:_am)?\(([^)]*)\)")
_WAY = re.compile(r"([a-z]\w*)/([\w.:-]+)")
_WARNING = re.compile(r"UCX\s+WARN\s+(.*(?:network device|transport)s? (\S+) (?:is|are) not available.*)")
# a station has no GPU, so that of these nothing can be said
_OF_GPUS = re.compile(r"'(?:cuda|gdr_copy|rocm|ze)[\w:]*'")
_INFINIBAND = "/sys/class/infiniband"
_WORD_BYTES = 4  # port_rcv_data counts words (Linux, Documentation/ABI/stable/sysfs-class-infiniband)
_MOST_WARNINGS = 4


def ways_of_reads(log: str) -> tuple[str, ...]:
    """Return what large reads go over, by UCX's last word on it: ``transport/device``; nothing where it doesn't say."""
    last = ""
    reads = lanes = ""
    about_peer = about_reads = False
    for line in log.splitlines():
        if _PEER.search(line):
            about_peer, about_reads = True, False
            if found := _LANES.search(line):
                lanes = found[1]
        elif "cfg#" in line:  # with itself
            about_peer = about_reads = False
        elif _READ in line:
            about_reads = about_peer
        elif about_reads and "|" in line:
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            if len(cells) >= 3 and cells[0].endswith("..inf"):
                reads = cells[-1]
    last = reads or lanes
    return tuple(dict.fromkeys(f"{transport}/{device}" for transport, device in _WAY.findall(last)))


def warnings_of(log: str) -> tuple[str, ...]:
    """Return UCX's warnings about devices and transports that its variables name and that aren't there."""
    matches = (match for match in map(_WARNING.search, log.splitlines()) if match)
    found = (" ".join(match[1].split()) for match in matches if _OF_GPUS.sub("", match[2]).strip(","))
    return tuple(dict.fromkeys(found))[:_MOST_WARNINGS]


class Counters:
    """What this host's interfaces and InfiniBand ports have received, from construction on."""

    def __init__(self) -> None:
        self._before = dict(_received())

    def busiest(self, size: int) -> str:
        """Return who has received the most, if it was at least half of ``size``: ``eth0`` or ``mlx5_0:1``; else nothing."""
        grown = {name: count - self._before.get(name, 0) for name, count in _received()}
        name = max(grown, key=lambda name: grown[name], default="")
        return name if name and 2 * grown[name] >= size else ""


def _received() -> Iterator[tuple[str, int]]:
    with contextlib.suppress(OSError):
        # of this network namespace, whatever /sys shows
        for line in Path("/proc/self/net/dev").read_text(encoding="ascii", errors="replace").splitlines()[2:]:
            name, _, counts = line.partition(":")
            yield name.strip(), int(counts.split()[0])
    for path in glob.glob(f"{_INFINIBAND}/*/ports/*/counters/port_rcv_data"):
        parts = path.split("/")
        with contextlib.suppress(OSError, ValueError):
            yield f"{parts[4]}:{parts[6]}", int(Path(path).read_text(encoding="ascii")) * _WORD_BYTES
