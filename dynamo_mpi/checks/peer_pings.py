# SPDX-License-Identifier: Apache-2.0
"""Finds silent ranks while a collective of the fabric check is late.

MPI does not report for which ranks a collective waits, so its members send each other pings: what blocks its messages blocks the pings too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi4py import MPI

_PING = b"\0"


class PeerPings:
    """One round of pings, to and from each of the other members. Each member starts it after it has waited for a while, independently of the
    others.

    Args:
        comm: the communicator in which the ranks are numbered.
        peers: the other members.
        tag: unique for this round, so that pings of earlier rounds don't count.
        earlier: tags of rounds in which this rank sent no pings; members that are still in such a round wait for them.
    """

    def __init__(self, comm: MPI.Comm, peers: Sequence[int], tag: int, earlier: Sequence[int] = ()) -> None:
        self._expected = {peer: comm.Irecv(bytearray(1), peer, tag) for peer in peers}
        self._sent = [comm.Isend(_PING, peer, one) for peer in peers for one in (*earlier, tag)]

    def unheard(self) -> tuple[int, ...]:
        """Return the ranks whose ping has not arrived."""
        self._expected = {peer: request for peer, request in self._expected.items() if not request.Test()}
        return tuple(self._expected)

    def end(self) -> None:
        """Stop the round. Cancel the receives, since a member that did not wait long never sends a ping; MPI completes pings that no member
        receives."""
        for request in self._expected.values():
            request.Cancel()
            request.Wait()
        for request in self._sent:
            if not request.Test():
                request.Free()
