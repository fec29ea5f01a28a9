# SPDX-License-Identifier: Apache-2.0
"""One rank's measurements of the fabric, as it sends them to rank 0, and the measurements of groups that rank 0 derives. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.checks.fabric_steps import ALL_REDUCE, ALL_TO_ALL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.checks.fabric_steps import Step

OK, FAILED, LATE, SKIPPED = "ok", "failed", "late", "skipped"


class Timing(NamedTuple):
    """One rank's measurement of one size of one step.

    Args:
        step: its number.
        size: bytes of the message.
        seconds: for one operation.
        wrong: ranks whose data arrived changed; for a collective, the whole group.
        sent: TCP segments that the rank's host sent during the step.
        resent: those that it retransmitted.
    """

    step: int
    size: int
    seconds: float
    wrong: tuple[int, ...] = ()
    sent: int = 0
    resent: int = 0


class FabricAnswer(NamedTuple):
    """One rank's answer.

    Args:
        state: `OK`, `FAILED`, `LATE` (it was ended at the deadline) or `SKIPPED` (another rank could not begin).
        text: the reason, or the step in which it was.
        library: the library that carried the messages, with its version.
        network: NCCL's network between nodes, ``IB`` or ``Socket``; empty if NCCL did not log it.
        links: links that NCCL chose, for example ``P2P/CUMEM``.
        cards: whether the node has an InfiniBand or RoCE card whose port is up.
        begin: seconds from the start of the check to the first step.
        timings: of the finished steps.
    """

    state: str
    text: str = ""
    library: str = ""
    network: str = ""
    links: tuple[str, ...] = ()
    cards: bool = False
    begin: float = 0.0
    timings: tuple[Timing, ...] = ()

    def pack(self) -> list[str]:
        """Write it as a list of texts, for `dynamo_mpi.common.codec`."""
        head = [
            self.state,
            self.text,
            self.library,
            self.network,
            ",".join(self.links),
            "1" if self.cards else "",
            repr(self.begin),
        ]
        return head + [
            f"{one.step} {one.size} {one.seconds!r} {one.sent} {one.resent} {','.join(map(str, one.wrong))}"
            for one in self.timings
        ]

    @classmethod
    def unpack(cls, values: Sequence[str]) -> FabricAnswer:
        """Read what `pack` wrote."""
        state, text, library, network, links, cards, begin, *rest = values
        timings = []
        for one in rest:
            step, size, seconds, sent, resent, wrong = one.split(" ")
            ranks = tuple(map(int, wrong.split(","))) if wrong else ()
            timings.append(Timing(int(step), int(size), float(seconds), ranks, int(sent), int(resent)))
        return cls(
            state,
            text,
            library,
            network,
            tuple(filter(None, links.split(","))),
            bool(cards),
            float(begin),
            tuple(timings),
        )


class Measured(NamedTuple):
    """A group's measurement of one size of one step: the time of its slowest member.

    Args:
        step: the step.
        group: its ranks.
        size: bytes of each rank's message.
        seconds: for one operation.
        wrong: ranks whose data were wrong, by the rank that saw it.
        sent: TCP segments that a member's host sent during the step, for the member with most retransmissions.
        resent: those that it retransmitted.
    """

    step: Step
    group: tuple[int, ...]
    size: int
    seconds: float
    wrong: tuple[tuple[int, tuple[int, ...]], ...] = ()
    sent: int = 0
    resent: int = 0

    @property
    def rate(self) -> float:
        """Bus bandwidth in bytes per second, as nccl-tests defines it: what each member's link carries one way, for any group size."""
        return (
            bus_share(self.step.operation, len(self.group)) * self.size / self.seconds
            if self.seconds > 0
            else float("inf")
        )


def bus_share(operation: str, members: int) -> float:
    """Return the fraction of a message that each link carries (nccl-tests, ``doc/PERFORMANCE.md``)."""
    if operation == ALL_REDUCE:
        return 2 * (members - 1) / members
    return (members - 1) / members if operation == ALL_TO_ALL else 1.0


def gather_up(steps: Sequence[Step], answers: Sequence[FabricAnswer]) -> list[Measured]:
    """Combine the measurements of each group's members; a group with a member that has not finished is left out."""
    by_step = [{(one.step, one.size): one for one in answer.timings} for answer in answers]
    measured = []
    for step in steps:
        for group in step.groups:
            for size in step.sizes:
                parts = [by_step[rank].get((step.number, size)) for rank in group]
                there = [part for part in parts if part is not None]
                if len(there) < len(group):
                    continue
                wrong = tuple((rank, part.wrong) for rank, part in zip(group, there, strict=True) if part.wrong)
                seconds, worst = max(part.seconds for part in there), max(there, key=lambda part: part.resent)
                measured.append(Measured(step, group, size, seconds, wrong, worst.sent, worst.resent))
    return measured
