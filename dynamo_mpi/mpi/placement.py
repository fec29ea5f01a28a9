# SPDX-License-Identifier: Apache-2.0
"""The hosts of a world's ranks, and the names of ranks in messages. Pure."""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class HasHost(Protocol):
    """A rank with its host."""

    @property
    def host(self) -> str:
        """The host's name."""


def hosts(ranks: Sequence[HasHost]) -> tuple[str, ...]:
    """Return the hosts in the order of their first rank."""
    return tuple(dict.fromkeys(place.host for place in ranks))


def ranks_by_host(ranks: Sequence[HasHost]) -> dict[str, list[int]]:
    """Return each host's ranks, hosts in the order of their first rank."""
    found: dict[str, list[int]] = {}
    for rank, place in enumerate(ranks):
        found.setdefault(place.host, []).append(rank)
    return found


def describe_ranks(ranks: Sequence[int], world: Sequence[HasHost] | Mapping[int, HasHost]) -> str:
    """Return the names of ranks with their hosts: ``rank 3 on n1``, ``ranks 0-3 on n1 and 4-7 on n2``.

    Args:
        ranks: the ranks to name.
        world: the ranks, by number.
    """
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(world[rank].host, []).append(rank)
    parts = [f"{spans(group)} on {host}" for host, group in by_host.items()]
    return ("rank " if len(ranks) == 1 else "ranks ") + " and ".join(parts)


def spans(ranks: Sequence[int]) -> str:
    """Format rank numbers as ``0-3, 8``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
