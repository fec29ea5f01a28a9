# SPDX-License-Identifier: Apache-2.0
"""The steps of the fabric check: the same list on every rank, made from the plan alone. Pure.

Pairs come first, because a slow or blocked pair can be named. First the neighbours on a node, in a ring; then each rank and the rank of the
same local number on the next node, so that every GPU's own network card is used; then pairs of pipeline stages. Each takes a few rounds,
for any number of ranks. Then come the collectives of the layout's groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

from dynamo_mpi.checks.hardware_check_plan import NODE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.checks.hardware_check_plan import Groups, HardwareCheckPlan

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
