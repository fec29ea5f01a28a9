# SPDX-License-Identifier: Apache-2.0
"""The steps of the fabric check, a rank's measurements of them, and the measurements of groups that rank 0 derives.

The steps are the same list on every rank, made from the plan alone. Pairs come first, because a slow or blocked pair can be named: the
neighbours on a node, in a ring; then each rank and the rank of the same local number on the next node, so that every GPU's own network card
is used; then pairs of pipeline stages. Each takes a few rounds, for any number of ranks. Then come the collectives of the layout's groups.

Pure, except for `segments`, which reads ``/proc/net/snmp`` (RFC 4022): its counters show a bad link.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

from dynamo_mpi.checks.hardware import NODE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.checks.hardware import Groups, HardwareCheckPlan

T = TypeVar("T")
KIB, MIB = 2**10, 2**20
EXCHANGE, ALL_REDUCE, ALL_TO_ALL = "exchange", "all-reduce", "all-to-all"
NEAR, FAR, STAGES = "near", "far", "pp"
"""Kinds of pairs: of one node, of two nodes, of two pipeline stages."""
# by transport: the smallest for the latency, the largest for the rate
_SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "nccl": {
        EXCHANGE: (64 * KIB, 64 * MIB),
        ALL_REDUCE: (64 * KIB, 8 * MIB, 64 * MIB),
        ALL_TO_ALL: (64 * KIB, 64 * MIB),
    },
    "mpi": {EXCHANGE: (4 * KIB, MIB), ALL_REDUCE: (4 * KIB, MIB), ALL_TO_ALL: (4 * KIB, MIB)},
}


class Step(NamedTuple):
    """One operation that several groups do at the same time.

    Args:
        number: its index.
        operation: `EXCHANGE`, `ALL_REDUCE` or `ALL_TO_ALL`.
        kind: of its groups: `NEAR`, `FAR`, `STAGES`, ``tp`` or ``moe_ep``.
        groups: the ranks that communicate; a rank that is in none has nothing to do.
        sizes: bytes of each rank's message, ascending.
    """

    number: int
    operation: str
    kind: str
    groups: Groups
    sizes: tuple[int, ...]

    def group_of(self, rank: int) -> tuple[int, ...]:
        """Return a rank's group; empty if it has none."""
        return next((group for group in self.groups if rank in group), ())


def steps_of(plan: HardwareCheckPlan) -> tuple[Step, ...]:
    """Return the steps, in their order."""
    sizes = _SIZES[plan.over]
    wanted: list[tuple[str, str, Groups]] = [(EXCHANGE, kind, groups) for kind, groups in _pairs(plan)]
    wanted += [(ALL_REDUCE, "tp", plan.of_kind("tp"))]
    spread = "moe_ep" if plan.of_kind("moe_ep") else "tp"
    wanted += [(ALL_TO_ALL, spread, plan.of_kind(spread))]
    real = [step for step in wanted if step[2]]
    return tuple(
        Step(number, operation, kind, groups, sizes[operation]) for number, (operation, kind, groups) in enumerate(real)
    )


def _pairs(plan: HardwareCheckPlan) -> Iterator[tuple[str, Groups]]:
    """Yield rounds of pairs, each pair once."""
    nodes = plan.of_kind(NODE)
    near = [_rounds(node, closed=True) for node in nodes]
    far = [
        [pair for one, other in some for pair in zip(one, other, strict=False)] for some in _rounds(nodes, closed=True)
    ]
    stages = [_rounds(group, closed=False) for group in plan.of_kind("pp")]
    met: set[frozenset[int]] = set()
    for kind, rounds in ((NEAR, _together(near)), (FAR, far), (STAGES, _together(stages))):
        for pairs in rounds:
            fresh = tuple(pair for pair in pairs if frozenset(pair) not in met)
            met.update(map(frozenset, fresh))
            if fresh:
                yield kind, fresh


def _rounds(members: Sequence[T], *, closed: bool) -> list[list[tuple[T, T]]]:
    """Pair neighbours so that no member is in two pairs of a round: even ones, odd ones, and the pair that closes the ring."""
    pairs = list(zip(members, members[1:], strict=False))  # noqa: RUF007 - itertools would be one more module on every rank
    rounds = [pairs[0::2], pairs[1::2]]
    if closed and len(members) > 2:
        last = (members[-1], members[0])
        # with an even number, the first and the last are free in the second round
        rounds[1:] = [[*rounds[1], last]] if len(members) % 2 == 0 else [rounds[1], [last]]
    return [some for some in rounds if some]


def _together(groups: Sequence[list[list[tuple[int, int]]]]) -> list[list[tuple[int, int]]]:
    """Merge the rounds of several groups, so that they run at the same time."""
    longest = max(map(len, groups), default=0)
    return [[pair for rounds in groups if at < len(rounds) for pair in rounds[at]] for at in range(longest)]


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
