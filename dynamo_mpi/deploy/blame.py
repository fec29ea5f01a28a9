# SPDX-License-Identifier: Apache-2.0
"""Which rank and which host a worker's failure comes from, by what its ranks, its node agents and its launcher have left. Pure.

A rank that only lost its peer is never blamed: a report that a rank, or a node agent for it, has composed names the first cause; without
one, the causes in the ranks' failure files are ordered as rank 0 orders them; without any file, the launcher's output names the first death.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.errors import MISTAKES, ExitCode
from dynamo_mpi.common.failure import DetectedBy, Failure, first_line, is_secondary, root_cause
from dynamo_mpi.common.xids import GpuError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.deploy.first_death import Death

_CAUSES = {cause.name.lower(): cause for cause in DetectedBy}
_NUMBERS = re.compile(r"0x[0-9a-f]+|\d+(?:\.\d+)?", re.IGNORECASE)
# the preflight, and what comes before it, judges files and flags; the hardware check, GPUs and links
HARDWARE_CHECK = "hardware_check"
_LOST = DetectedBy.HOST_UNREACHABLE


class RankReport(NamedTuple):
    """One failure file.

    Args:
        rank: the rank that failed; -1 if it isn't known.
        host: its host.
        phase: its phase.
        cause: how the failure was detected.
        code: the exit code of all ranks.
        error: the error, in a line.
        time: when it was detected, in seconds since 1970.
        is_composed: whether it is the report of the whole worker, which names the first cause.
        text: the report's text, if it is composed.
        gpu_errors: Xids of the worker's GPUs before the failure.
    """

    rank: int
    host: str
    phase: str
    cause: DetectedBy
    code: int
    error: str
    time: float
    is_composed: bool = False
    text: str = ""
    gpu_errors: tuple[GpuError, ...] = ()

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> RankReport:
        """Read a failure file's content.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        cause = _CAUSES.get(str(content["cause"]), DetectedBy.REPORT)
        text = content.get("report")
        return cls(
            int(content["rank"]),
            str(content["host"]),
            str(content["phase"]),
            cause,
            int(content["exit_code"]),
            first_line(str(content["error"])),
            float(content["time"]),
            text is not None,
            str(text or ""),
            tuple(map(GpuError.of, content.get("gpu_errors") or ())),
        )


@dataclass(frozen=True)
class Evidence:
    """What is known of a worker's end.

    Args:
        code: its launcher's exit code.
        nodes: its nodes, in the order of their blocks of ranks.
        reports: its failure files.
        death: how the first rank ended according to the launcher's output; None if it names none.
        phase: the worker's phase, if no report has one.
        lost: nodes that are known to be lost.
        ranks_per_node: consecutive ranks on each node; 0 if that isn't known.
        is_reported: whether the worker's own processes have reported its end, not the launcher in their place.
    """

    code: int
    nodes: tuple[str, ...]
    reports: tuple[RankReport, ...] = ()
    death: Death | None = None
    phase: str = ""
    lost: tuple[str, ...] = ()
    ranks_per_node: int = 0
    is_reported: bool = False

    def node_of(self, host: str, rank: int) -> str:
        """Return the node of a rank; empty if it isn't known. A host may call itself by another name than Slurm or the hostfile does."""
        if host in self.nodes:
            return host
        short = host.partition(".")[0]
        for node in self.nodes:
            if short and node.rpartition("@")[2].partition(".")[0] == short:
                return node
        place = rank // self.ranks_per_node if self.ranks_per_node and rank >= 0 else -1
        return self.nodes[place] if 0 <= place < len(self.nodes) else ""


@dataclass(frozen=True)
class Blame:
    """The first cause of a worker's end.

    Args:
        code: the worker's exit code.
        rank: the rank; -1 if it isn't known.
        host: the node; empty if it isn't known.
        phase: the phase; empty if it isn't known.
        cause: a text that is the same for the same cause in another start: without numbers and hosts.
        error: the error, in a line.
        suspects: nodes that a report names as lost, or that are unfit in the hardware check.
        reporter: the node whose side reports another one as lost, and which may be the one that is cut off; empty for none.
        unfit: nodes with a GPU that needs a reset or a repair, according to the driver, each with the Xid.
        is_mistake: whether another start would end the same way, wherever it runs.
        is_killed: whether a rank was killed by SIGKILL, and the others' report shows that all hosts answered: that is no node's fault.
    """

    code: int
    rank: int = -1
    host: str = ""
    phase: str = ""
    cause: str = ""
    error: str = ""
    suspects: tuple[str, ...] = ()
    is_mistake: bool = False
    is_killed: bool = False
    unfit: Mapping[str, str] = field(default_factory=dict)
    reporter: str = ""

    def __str__(self) -> str:
        who = f"rank {self.rank}" if self.rank >= 0 else "a rank"
        where = f" on {self.host}" if self.host else ""
        phase = f" in {self.phase}" if self.phase else ""
        return f"{who}{where}{phase}: {self.error}" if self.error else f"{who}{where}{phase}"


def blame(evidence: Evidence) -> Blame:
    """Find the first cause of a worker's end."""
    if evidence.lost:
        host = evidence.lost[0]
        error = f"{', '.join(evidence.lost)} is lost"
        rank_reports = [report for report in evidence.reports if report.host in evidence.lost]
        phase = rank_reports[0].phase if rank_reports else _phase_of(evidence)
        return Blame(evidence.code, -1, host, phase, "host lost", error, evidence.lost)
    report = _first(evidence.reports)
    if report is None:
        return _of_launcher(evidence)
    code = report.code if evidence.code not in MISTAKES and report.code in MISTAKES else evidence.code
    if code not in MISTAKES and (broken := _broken(evidence)):
        return _of_gpus(evidence, report, broken)
    host = evidence.node_of(report.host, report.rank)
    lost = [evidence.node_of(each.host, each.rank) for each in evidence.reports if each.cause is _LOST]
    named = _named(report.text or report.error, evidence.nodes) if report.phase == HARDWARE_CHECK else []
    death = evidence.death
    is_bare = report.cause is DetectedBy.DISCONNECT and death is not None and report.rank in death.ranks
    error = _how(death) if is_bare and death is not None else report.error
    is_killed = is_bare and death is not None and death.is_sure and death.signal == signal.SIGKILL
    return Blame(
        code,
        report.rank,
        host if not named else named[0],
        report.phase,
        _cause(report.cause, error, evidence.nodes),
        error,
        tuple(dict.fromkeys(node for node in (*lost, *named) if node)),
        code in MISTAKES and report.phase != HARDWARE_CHECK,
        is_killed and report.is_composed and evidence.is_reported and not lost,
        # another rank's loss is reported by rank 0's side
        reporter=evidence.nodes[0] if report.cause is _LOST and report.rank else "",
    )


def _broken(evidence: Evidence) -> dict[str, GpuError]:
    """Return the worker's nodes with a GPU that needs a reset or a repair, each with its first error, in the order of the errors."""
    errors = {error for report in evidence.reports for error in report.gpu_errors if error.may_be_cause()}
    found: dict[str, GpuError] = {}
    for error in sorted(errors, key=lambda error: error.at):
        if node := evidence.node_of(error.host, -1):
            found.setdefault(node, error)
    return found


def _of_gpus(evidence: Evidence, report: RankReport, broken: Mapping[str, GpuError]) -> Blame:
    """Blame the node whose GPU failed first: ranks elsewhere, which wait for it, may have noticed it before."""
    host, error = next(iter(broken.items()))
    is_there = evidence.node_of(report.host, report.rank) == host
    return Blame(
        evidence.code,
        report.rank if is_there else -1,
        host,
        report.phase,
        f"xid {error.xid}",
        str(error),
        unfit={node: str(each) for node, each in broken.items()},
    )


def _first(reports: Sequence[RankReport]) -> RankReport | None:
    """Return the report of the first cause."""
    ordered = sorted(reports, key=lambda report: report.time)
    composed = [report for report in ordered if report.is_composed]
    if composed:
        # hosts that are cut off from each other write a report each, and each calls the other one lost: rank 0's side knows more than a rank
        # that can't reach rank 0. The times don't show it, as each host has its own clock
        return min(composed, key=lambda each: (each.cause is DetectedBy.SIGNAL, each.cause is _LOST and each.rank == 0))
    own = [report for report in ordered if report.code != ExitCode.TEMPORARY or not is_secondary(report.error)]
    chosen = own or ordered
    if not chosen:
        return None
    failures = [Failure(each.rank, each.code, each.error, each.cause, each.phase, each.time) for each in chosen]
    return chosen[failures.index(root_cause(failures))]


def _of_launcher(evidence: Evidence) -> Blame:
    death, code = evidence.death, evidence.code
    is_mistake = code in MISTAKES
    if death is None:
        return Blame(code, phase=evidence.phase, cause=f"exit code {code}", is_mistake=is_mistake)
    error = _how(death)
    rank = death.ranks[0] if len(death.ranks) == 1 else -1
    host = evidence.node_of(death.host, rank)
    is_lost = "lost with its" in death.how
    return Blame(
        # of srun, which ends the other ranks, it says nothing of the cause
        ExitCode.TEMPORARY if is_lost and not is_mistake else code,
        rank,
        # a launcher that had begun to end the ranks may name one of those
        host if death.is_sure else "",
        evidence.phase,
        "host lost" if is_lost else _cause(DetectedBy.DISCONNECT, error, evidence.nodes),
        error,
        (host,) if is_lost and host else (),
        is_mistake,
    )


def _how(death: Death) -> str:
    """Return what a launcher says of a death, without its rank and its host."""
    text = str(death)
    return text.partition(f" on {death.host} ")[2] or text if death.host else text


def _phase_of(evidence: Evidence) -> str:
    report = _first(evidence.reports)
    return evidence.phase if report is None else report.phase


def _cause(detected: DetectedBy, error: str, nodes: Sequence[str]) -> str:
    text = error
    for node in nodes:
        text = re.sub(_word(node), "HOST", text)
    return f"{detected.name.lower()}: {_NUMBERS.sub('#', text)}"


def _word(node: str) -> str:
    """Return the pattern of a node's name, not as a part of another word."""
    return rf"(?<![\w.-]){re.escape(node)}(?![\w-])"


def _named(text: str, nodes: Sequence[str]) -> list[str]:
    """Return the nodes that a text names, in the text's order."""
    found = [(match.start(), node) for node in nodes if (match := re.search(_word(node), text))]
    return [node for _, node in sorted(found)]
