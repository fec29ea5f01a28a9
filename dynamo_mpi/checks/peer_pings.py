# SPDX-License-Identifier: Apache-2.0
"""Who is not heard while a collective of the fabric probe is late.

MPI does not say for whom a collective waits, so its members call each other beside it: what holds up its messages holds up theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi4py import MPI

_CALL = b"\0"


class PeerPings:
    """One round of calls: to each of the others, and from each. Begun by each member that has waited for a while, so they need not meet.

    Args:
        comm: what the ranks are counted in.
        peers: the other members.
        tag: of this round alone: a call of an earlier one says nothing of now.
        earlier: tags of rounds that this rank had no reason to call in; members that are still there listen for it.
    """

    def __init__(self, comm: MPI.Comm, peers: Sequence[int], tag: int, earlier: Sequence[int] = ()) -> None:
        self._expected = {peer: comm.Irecv(bytearray(1), peer, tag) for peer in peers}
        self._made = [comm.Isend(_CALL, peer, one) for peer in peers for one in (*earlier, tag)]

    def unheard(self) -> tuple[int, ...]:
        """Return the ranks whose call has not come."""
        self._expected = {peer: request for peer, request in self._expected.items() if not request.Test()}
        return tuple(self._expected)

    def end(self) -> None:
        """Stop listening. A member that has not waited long enough never calls, and a call that nobody hears is left to MPI."""
        for request in self._expected.values():
            request.Cancel()
            request.Wait()
        for request in self._made:
            if not request.Test():
                request.Free()
