# SPDX-License-Identifier: Apache-2.0
"""The input of the rules over hosts and GPUs: a row for each rank, in rank order."""

from __future__ import annotations

from dynamo_mpi.checks.gpu_facts import NodeGpus
from dynamo_mpi.checks.host_facts import HostFacts
from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple
from dynamo_mpi.layout.format import listed
from dynamo_mpi.mpi.placement import describe_ranks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dynamo_mpi.checks.rank_report import RankReport

_MOST_HOSTS = 6
_MOST_LINES = 12


class RankFacts(NamedTuple):
    """One rank, its host and its GPUs.

    Args:
        rank: its number, and its index among the rows.
        host: its node's name.
        facts: facts about the host.
        gpus: facts about the node's GPUs.
    """

    rank: int
    host: str
    facts: HostFacts
    gpus: NodeGpus


class Requirements(NamedTuple):
    """A worker's requirements of its hosts.

    Args:
        weights: bytes of each rank's weights, by rank; empty if they aren't known.
        allow_no_gpu: whether the rules about GPUs are left out.
        memory_later: whether free memory is evaluated later, by the GPU check, after it has waited until memory is freed.
    """

    weights: tuple[int, ...] = ()
    allow_no_gpu: bool = False
    memory_later: bool = False


def rows_of(reports: Sequence[RankReport]) -> list[RankFacts]:
    """Unpack the facts about hosts and GPUs from the ranks' reports, which are in rank order and of this version."""
    return [
        RankFacts(
            rank,
            report.host,
            HostFacts.unpack(report.host_facts),
            NodeGpus.unpack(report.gpu_facts) if report.gpu_facts else NodeGpus(),
        )
        for rank, report in enumerate(reports)
    ]


def by_host(rows: Iterable[RankFacts]) -> dict[str, list[RankFacts]]:
    """Group rows by host, hosts in the order of their first rank."""
    nodes: dict[str, list[RankFacts]] = {}
    for row in rows:
        nodes.setdefault(row.host, []).append(row)
    return nodes


def where(some: Iterable[RankFacts], rows: Sequence[RankFacts] | Mapping[int, RankFacts]) -> str:
    """Name ranks with their hosts: ``ranks 0-3 on n1 and 4-7 on n2``; on many hosts, only how many there are."""
    ranks = [row.rank for row in some]
    if len(names := dict.fromkeys(rows[rank].host for rank in ranks)) > _MOST_HOSTS:
        return f"{len(ranks)} ranks on {on_hosts(names)}"
    return describe_ranks(ranks, rows)


def on_hosts(hosts: Iterable[str]) -> str:
    """Write ``n1, n2``; of many hosts the first few."""
    names = list(dict.fromkeys(hosts))
    more = len(names) - _MOST_HOSTS
    return listed(names) if more <= 0 else f"{listed(names[:_MOST_HOSTS])} and {more} more"


def lines(parts: Sequence[str]) -> str:
    """Put each part on a line of its own; of many the first few."""
    more = len(parts) - _MOST_LINES
    return "\n".join(parts if more <= 0 else [*parts[:_MOST_LINES], f"and {more} more"])


def groups(values: Mapping[str, Iterable[str]]) -> str:
    """Write ``2.7.0 on n1, n2; missing on n3``."""
    return "; ".join(f"{value} on {on_hosts(hosts)}" for value, hosts in values.items())
