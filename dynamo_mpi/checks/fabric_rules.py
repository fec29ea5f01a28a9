# SPDX-License-Identifier: Apache-2.0
"""Rules over the measurements of the fabric check. Pure; rank 0 runs them.

| rule | requirement | |
|---|---|---|
| N1 | what arrives is what was sent | error |
| N2 | the check ends in time | warning; error (124) over MPI, which can't cancel a message |
| N3 | no pair of ranks, and no node, is far slower than comparable ones | warning |
| N4 | no group is far slower than comparable ones | warning |
| N5 | GPUs of one node reach what their link allows | warning |
| N6 | nodes with InfiniBand or RoCE use it | warning |
| N7 | NCCL runs in every rank | warning |
| N8 | no link loses packets | warning |

A measurement is compared with the upper quartile of its kind, not with the median: in a small world one slow node is in two of three pairs,
and the median would be slow itself.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.checks.fabric_steps import EXCHANGE, FAILED, LATE, NEAR
from dynamo_mpi.checks.hang_diagnosis import find_blocking_ranks, read_note
from dynamo_mpi.checks.rank_facts import lines
from dynamo_mpi.layout.finding import Severity, error, warning
from dynamo_mpi.layout.format import counted, listed
from dynamo_mpi.mpi.placement import describe_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.checks.fabric_steps import FabricAnswer, Measured, Step
    from dynamo_mpi.layout.finding import Finding
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


SLOW = {"nccl": 3.0, "mpi": 8.0}
"""How many times slower than comparable ones is far slower; more on CPUs, because other processes use them too."""
# a latency below this never matters; on busy CPUs a rank may have to wait for its turn
_LATENCY_SECONDS = {"nccl": 1e-3, "mpi": 0.05}
_LATENCY_SLOW = 10.0
# a pair above it isn't slow, however fast others are: on shared CPUs, one local pair may be 14 times faster than another
_FAST = {"nccl": float("inf"), "mpi": 1e8}
_LEAST_LIKE = 3
# a healthy network loses far less, even when many hosts send to one; busy CPUs acknowledge packets late
_LOSS = {"nccl": 0.01, "mpi": 0.12}
_LEAST_RESENT = 10


def check_fabric(case: FabricCase) -> list[Finding]:
    """Apply every rule; over MPI, N2 is reported when it happens."""
    return [finding for rule in RULES for finding in rule(case)]


def check_data(case: FabricCase) -> Iterator[Finding]:
    """N1: every byte that arrives is the one that was sent, and every sum is right. Otherwise the worker's answers are wrong."""
    blamed: Counter[int] = Counter()
    details: list[str] = []
    groups: list[str] = []
    for one in case.measured:
        for receiver, sources in one.wrong:
            if one.step.operation == EXCHANGE or sources != one.group:
                blamed.update(sources)
                details.append(f"{case.name([receiver])} got wrong data from {case.name(sources)}, {what(one)}")
        if one.wrong and not blamed:
            groups.append(f"wrong results in an {what(one)} over {case.name(one.group)}")
    if not details and not groups:
        return
    who = case.name(sorted(rank for rank in blamed if blamed[rank] == max(blamed.values()))) if blamed else ""
    yield error(
        "N1",
        f"data are wrong when they arrive{f': {who}' if who else ''}",
        found=lines(list(dict.fromkeys(details or groups))),
        expected="what was sent: every answer of the engine rests on it",
        fix="leave the node out (sbatch --exclude=...), and have its memory, GPUs and cables checked (dcgmi diag -r 3)",
    )


def check_end(case: FabricCase) -> Iterator[Finding]:
    """N2: the check ends within `--probe-seconds`; if it hangs, it is ended, and the report names the ranks between which it hangs."""
    late = {rank: read_note(answer.text) for rank, answer in enumerate(case.answers) if answer.state == LATE}
    # a rank that waits for one whose process has ended is not the cause (N7)
    if late and not any(answer.state == FAILED for answer in case.answers):
        hosts = [one.host for one in case.ranks]
        # the processes that hung have been ended, and the ranks are unharmed: unlike over MPI, the worker can go on
        yield replace(
            find_blocking_ranks(late, [], case.steps, hosts, case.seconds, case.name), severity=Severity.WARNING
        )


def check_pairs(case: FabricCase) -> Iterator[Finding]:
    """N3: no pair of ranks is three times (over MPI eight times) slower than comparable pairs, nor are all pairs of a node; with fewer
    than three pairs of a kind nothing is compared."""
    factor = SLOW[case.over]
    slow: list[Measured] = []
    details: list[str] = []
    for some in _alike(case, exchanges=True):
        best = _upper_quartile([one.rate for one in some])
        quick = _lower_quartile([one.seconds for one in some])
        smallest = some[0].size == some[0].step.sizes[0]
        for one in some:
            if not smallest and one.rate < min(best / factor, _FAST[case.over]):
                details.append(
                    f"{pair_of(case, one)}: {rate_text(one.rate)}, comparable ones {rate_text(best)} ({what(one)})"
                )
            elif smallest and one.seconds > max(_LATENCY_SECONDS[case.over], quick * _LATENCY_SLOW):
                details.append(
                    f"{pair_of(case, one)}: {time_text(one.seconds)}, comparable ones {time_text(quick)} ({what(one)})"
                )
            else:
                continue
            slow.append(one)
    if not slow:
        return
    nodes = _nodes_behind(case, slow)
    pairs = sorted({one.group for one in slow})
    if nodes:
        one_node = len(nodes) == 1
        message = f"{'node' if one_node else 'nodes'} {listed(nodes)} {'is' if one_node else 'are'} far slower to reach than others"
    else:
        message = f"the path between {pair_of(case, slow[0])} is far slower than others"
        message += f", and {counted(len(pairs) - 1, 'other pair')}" if len(pairs) > 1 else ""
    hosts = nodes or sorted({case.host(rank) for rank in pairs[0]})
    yield warning(
        "N3",
        message,
        found=lines(details),
        expected=f"pairs of one kind within a factor of {factor:g}: the slowest sets the pace of all",
        fix=f"look at the links of {listed(hosts)} (ibstat, ethtool, nvidia-smi nvlink -s), or leave the node out (sbatch --exclude=...)",
    )


def check_groups(case: FabricCase) -> Iterator[Finding]:
    """N4: no group of the layout is three times (over MPI eight times) slower than comparable groups; fewer than three groups aren't
    compared."""
    factor = SLOW[case.over]
    details, slow = [], []
    for some in _alike(case, exchanges=False):
        best = _upper_quartile([one.rate for one in some])
        for one in some:
            if one.size == one.step.sizes[-1] and one.rate < min(best / factor, _FAST[case.over]):
                details.append(
                    f"{what(one)} over {case.name(one.group)}: {rate_text(one.rate)}, comparable ones {rate_text(best)}"
                )
                slow.append(one)
    if slow:
        yield warning(
            "N4",
            f"{counted(len(slow), 'group')} of ranks {'is' if len(slow) == 1 else 'are'} far slower than others",
            found=lines(details),
            expected=f"groups of one kind within a factor of {factor:g}",
            fix="look at the links of their nodes; if one pair or node is the cause, N3 names it",
        )


def check_expectation(case: FabricCase) -> Iterator[Finding]:
    """N5: two GPUs of one node reach a quarter of their NVLink's bandwidth, or an eighth of their PCI Express's, if the kind of GPU is known.
    Cards (``PCIe``, ``NVL``) aren't checked: bridges join only some of them."""
    if case.least is None:
        return
    least, link = case.least
    below = [
        one
        for one in case.measured
        if one.step.operation == EXCHANGE
        and one.step.kind == NEAR
        and one.size == one.step.sizes[-1]
        and one.rate < least
    ]
    if below:
        yield warning(
            "N5",
            f"{counted(len(below), 'pair')} of GPUs {'is' if len(below) == 1 else 'are'} slower than {link} has to be",
            found=lines([f"{pair_of(case, one)}: {rate_text(one.rate)}{links_of(case, one)}" for one in below]),
            expected=f"at least {rate_text(least)} each way",
            fix="nvidia-smi topo -m and nvidia-smi nvlink -s on the node; NCCL_P2P_DISABLE and NCCL_P2P_LEVEL have to be unset; in a "
            "container or VM, see that peer access is allowed",
        )


def check_network(case: FabricCase) -> Iterator[Finding]:
    """N6: if all nodes have InfiniBand or RoCE cards with a port that is up, NCCL uses them instead of TCP."""
    sockets = [rank for rank, answer in enumerate(case.answers) if answer.network == "Socket" and answer.cards]
    if sockets and len({one.host for one in case.ranks}) > 1:
        yield warning(
            "N6",
            f"NCCL goes over TCP between nodes that have InfiniBand or RoCE: {case.name(sockets)}",
            found='NCCL chose the network "Socket"; /sys/class/infiniband has a port that is ACTIVE',
            expected="NCCL over verbs: TCP reaches a tenth of its rate",
            fix="unset NCCL_IB_DISABLE and NCCL_NET; give the container /dev/infiniband and libibverbs; NCCL_DEBUG=INFO says why",
        )


def check_run(case: FabricCase) -> Iterator[Finding]:
    """N7: every rank has NCCL and a GPU; otherwise nothing is measured."""
    reasons: dict[str, list[int]] = {}
    for rank, answer in enumerate(case.answers):
        if answer.state == FAILED:
            reasons.setdefault(answer.text, []).append(rank)
    if reasons:
        failed = sorted(rank for ranks in reasons.values() for rank in ranks)
        yield warning(
            "N7",
            f"the fabric could not be checked: {case.name(failed)}",
            found=lines([f"{case.name(ranks)}: {text}" for text, ranks in reasons.items()]),
            expected="NCCL (libnccl.so.2) and a GPU in every rank, as the engine needs them",
            fix="correct what NCCL reports; NCCL_DEBUG=INFO shows more; --probe none skips this check",
        )


def check_loss(case: FabricCase) -> Iterator[Finding]:
    """N8: between nodes that communicate over TCP, fewer than one segment of a hundred (over MPI twelve) are retransmitted: a link that
    loses packets is slow at times, or hangs."""
    shares: dict[tuple[int, ...], Measured] = {}
    for one in case.measured:
        lossy = one.resent >= _LEAST_RESENT and one.resent > _LOSS[case.over] * one.sent
        if one.step.operation == EXCHANGE and lossy and _over_tcp(case, one):
            shares.setdefault(one.group, one)
    if shares:
        pairs = [*shares.values()]
        more = f", and {counted(len(pairs) - 1, 'other pair')}" if len(pairs) > 1 else ""
        yield warning(
            "N8",
            f"packets are lost between {pair_of(case, pairs[0])}{more}",
            found=lines(
                [f"{pair_of(case, one)}: {one.resent} TCP segments retransmitted, {one.sent} sent" for one in pairs]
            ),
            expected=f"less than {_LOSS[case.over]:.0%} of them",
            fix="look at cables, ports and MTU of these nodes (ethtool -S, ip -s link), or leave them out (sbatch --exclude=...)",
        )


def _over_tcp(case: FabricCase, one: Measured) -> bool:
    """Return whether these messages may have used TCP: a host's retransmissions may also be those of its storage, or of another job."""
    sockets = case.over == "mpi" or any(case.answers[rank].network == "Socket" for rank in one.group)
    return sockets and len({case.host(rank) for rank in one.group}) > 1


def _alike(case: FabricCase, *, exchanges: bool) -> Iterator[list[Measured]]:
    """Yield measurements that can be compared: one operation over one kind of group, of one size, at least three of them."""
    kinds: dict[tuple[str, str, int, int], list[Measured]] = {}
    for one in case.measured:
        if (one.step.operation == EXCHANGE) is exchanges:
            kinds.setdefault((one.step.operation, one.step.kind, one.size, len(one.group)), []).append(one)
    yield from (some for some in kinds.values() if len(some) >= _LEAST_LIKE)


def _upper_quartile(values: Sequence[float]) -> float:
    return sorted(values)[-(-3 * len(values) // 4) - 1 if len(values) > _LEAST_LIKE else -1]


def _lower_quartile(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 4]


def _nodes_behind(case: FabricCase, slow: Sequence[Measured]) -> list[str]:
    """Return nodes whose pairs with other nodes are all slow, if they explain every slow pair; a node needs at least two such pairs."""
    slow_pairs = {one.group for one in slow}
    ways: dict[str, set[tuple[int, ...]]] = {}
    for one in case.measured:
        ends = {case.host(rank) for rank in one.group}
        if one.step.operation == EXCHANGE and len(ends) > 1:
            for host in ends:
                ways.setdefault(host, set()).add(one.group)
    behind = [
        host
        for host, groups in ways.items()
        if len(groups) > 1 and groups <= slow_pairs and _many_ends(case, host, groups)
    ]
    explained = {pair for host in behind for pair in ways[host]}
    return behind if behind and slow_pairs <= explained else []


def _many_ends(case: FabricCase, host: str, groups: set[tuple[int, ...]]) -> bool:
    """Return whether a node is in pairs with several others; with one, either node may be the slow one."""
    return len({case.host(rank) for group in groups for rank in group} - {host}) > 1


RULES = (check_data, check_end, check_pairs, check_groups, check_expectation, check_network, check_run, check_loss)
