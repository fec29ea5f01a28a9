# SPDX-License-Identifier: Apache-2.0
"""Doctor's look at what this user's processes of deployments listen at on this node, by the table of docs/concepts/security.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.layout.format import listed
from dynamo_mpi.ops.doctor.check import Check, Context, Probe, Section, ok, skipped, warning
from dynamo_mpi.ops.listeners import Found, Reach, find_listeners

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SUFFIXES = {Reach.EVERYWHERE: "-all-addresses", Reach.LOOPBACK: "-loopback", Reach.ADDRESS: ""}


def check_listeners(_: Context) -> Iterator[Check]:
    """Report what listens, where, and who can use it."""
    return judge_listeners(find_listeners())


def judge_listeners(found: Sequence[Found]) -> Iterator[Check]:
    """Yield a check for each kind of process and listener; a warning for one that the table doesn't have."""
    if not found:
        yield skipped("listeners", "no process of a deployment of this user's listens on this node")
    for each in found:
        id = each.kind.replace(" ", "-").lower() + _SUFFIXES[each.reach]
        processes = f"process{'es' if len(each.pids) > 1 else ''} {listed([str(pid) for pid in each.pids])}"
        text = f"{listed(each.places)} ({processes})"
        if each.rows:
            yield ok(id, f"{text}: " + "; or ".join(f"{row.what.replace('`', '')}: {row.who}" for row in each.rows))
        else:
            needed = "a listener of docs/concepts/security.md"
            yield warning(id, f"{text}: not known", needed, f"ss -ltnp | grep pid={each.pids[0]}, to see what it is")


SECTION = Section("listeners", (Probe("listeners", check_listeners),))
