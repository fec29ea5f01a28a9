# SPDX-License-Identifier: Apache-2.0
"""Rules over all ranks' reports: the same command, files and version on all ranks, and a correct placement. Pure; rank 0 runs them."""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.finding import Finding, Severity
from dynamo_mpi.mpi.placement import describe_ranks, hosts, spans

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.checks.rank_report import RankReport


def check_ranks(reports: Sequence[RankReport]) -> list[Finding]:
    """Apply every rule to the reports, which are in rank order."""
    # problems that ranks of another version report may have another meaning
    return [*_placement(reports), *(_versions(reports) or _problems(reports))]


def _placement(reports: Sequence[RankReport]) -> list[Finding]:
    """A11: the engine takes node = rank // ranks per node, so every node holds equally many, consecutive ranks
    (``mapping.py: MappingBase.node_rank``)."""
    counts = {host: [i for i, report in enumerate(reports) if report.host == host] for host in hosts(reports)}
    if len(counts) == 1:
        return []
    found = "; ".join(f"{host}: {spans(ranks)}" for host, ranks in counts.items())
    per_node = -(-len(reports) // len(counts))
    if len({len(ranks) for ranks in counts.values()}) > 1:
        message = "the nodes hold unequal numbers of ranks"
        fix = f"srun --ntasks-per-node={per_node} ..., or mpirun --map-by ppr:{per_node}:node"
    elif any(ranks[-1] - ranks[0] + 1 != len(ranks) for ranks in counts.values()):
        message = "the ranks are not placed in blocks"
        fix = f"srun --distribution=block ..., or mpirun --map-by ppr:{per_node}:node --rank-by slot"
    else:
        return []
    needed = "equally many, consecutive ranks on each node"
    return [Finding("A11", Severity.ERROR, message, found=found, expected=needed, fix=fix)]


_SUBJECTS = {
    "command line": ("P1", "start every rank with the same command"),
    "engine config": ("P2", "put the same file on every node, or use one path on a shared file system"),
    "model config": ("P3", "put the same model folder on every node, or use one path on a shared file system"),
    "model": (
        "P3",
        "put the same model folder on every node, readable by you, or use one path on a shared file system",
    ),
}


def _problems(reports: Sequence[RankReport]) -> list[Finding]:
    """P1-P3: what must be the same on every rank. Ranks with the same problem share one finding."""
    groups: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        for problem in report.problems:
            groups.setdefault(problem, []).append(rank)
    findings = []
    for problem, ranks in groups.items():
        label, _, text = problem.partition(": ")
        rule, fix = _SUBJECTS[label]
        findings.append(
            Finding(
                rule,
                Severity.ERROR,
                f"the {label} is not the same everywhere: {describe_ranks(ranks, reports)}",
                found=text,
                expected=f"the same {label} on all {len(reports)} ranks",
                fix=fix,
            )
        )
    return findings


def _versions(reports: Sequence[RankReport]) -> list[Finding]:
    """P4: one dynamo_mpi everywhere: ranks of different versions may not understand each other."""
    odd = [rank for rank, report in enumerate(reports) if report.version != reports[0].version]
    if not odd:
        return []
    return [
        Finding(
            "P4",
            Severity.ERROR,
            f"dynamo_mpi is not the same everywhere: {describe_ranks(odd, reports)}",
            found=", ".join(sorted({reports[rank].version for rank in odd})) + f"; rank 0 has {reports[0].version}",
            expected=f"version {reports[0].version} on all {len(reports)} ranks",
            fix="install one version everywhere, or mount one checkout",
        )
    ]


RULES = (_placement, _problems, _versions)
