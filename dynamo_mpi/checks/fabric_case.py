# SPDX-License-Identifier: Apache-2.0
"""The input of the fabric rules, and the text of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.checks.fabric_steps import EXCHANGE
from dynamo_mpi.layout.format import listed
from dynamo_mpi.mpi.placement import describe_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.checks.fabric_steps import Step
    from dynamo_mpi.checks.fabric_timing import FabricAnswer, Measured
    from dynamo_mpi.mpi.placement import HasHost


class FabricCase(NamedTuple):
    """The input of the fabric rules.

    Args:
        measured: the groups' measurements.
        answers: the ranks' answers, in rank order.
        ranks: where each is.
        steps: the steps of the check.
        seconds: the time limit.
        over: what carried the messages, `nccl` or `mpi`.
        least: bytes per second that two GPUs of a node must reach, and over which link; None if it isn't known.
    """

    measured: Sequence[Measured]
    answers: Sequence[FabricAnswer]
    ranks: Sequence[HasHost]
    steps: Sequence[Step] = ()
    seconds: float = 0.0
    over: str = "nccl"
    least: tuple[float, str] | None = None

    def name(self, ranks: Sequence[int]) -> str:
        """Name ranks with their hosts."""
        return describe_ranks(ranks, self.ranks)

    def host(self, rank: int) -> str:
        """Return a rank's node."""
        return self.ranks[rank].host


def pair_of(case: FabricCase, one: Measured) -> str:
    """Name the two ranks of a pair, with their hosts."""
    first, second = one.group
    return f"{case.name([first])} and {case.name([second])}"


def what(one: Measured) -> str:
    """Describe the operation: ``all-reduce of 8 MiB in tp``."""
    kind = "" if one.step.operation == EXCHANGE else f" in {one.step.kind}"
    return f"{one.step.operation} of {size_text(one.size)}{kind}"


def links_of(case: FabricCase, one: Measured) -> str:
    """Name the links that NCCL used for a group; empty if NCCL did not log them."""
    links = sorted({link for rank in one.group for link in case.answers[rank].links})
    return f" over {listed(links)}" if links else ""


def size_text(size: int) -> str:
    """Format a number of bytes as ``64 MiB``."""
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def rate_text(rate: float) -> str:
    """Format bytes per second as ``256.9 GB/s``."""
    return f"{rate / 1e9:.1f} GB/s" if rate >= 1e9 else f"{rate / 1e6:.1f} MB/s"


def time_text(seconds: float) -> str:
    """Format seconds as ``18.9 ms`` or ``19 µs``."""
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
