# SPDX-License-Identifier: Apache-2.0
"""One worker, or a pair of them, judged by every rule: what `dynamo-mpi check` and the ranks' preflight both ask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dynamo_mpi.exit_codes import ExitCode
from dynamo_mpi.parallelism.alternatives import meant_by_more_experts_than_ranks, short_name
from dynamo_mpi.parallelism.finding import Finding, errors
from dynamo_mpi.parallelism.legal import divisors, legal_ep_sizes, legal_tp_sizes
from dynamo_mpi.parallelism.memory import MemoryEstimate, estimate
from dynamo_mpi.parallelism.rules.registry import all_findings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.parallelism.subject import Subject

# rules about the text of the engine config: whoever breaks only these wrote bad data, not an illegal layout
TEXT_RULES = ("H",)
_MAX_GROUPED = 4096


@dataclass(frozen=True)
class Report:
    """What was found about one worker.

    Args:
        subject: the worker.
        findings: from every rule, in their order.
        memory: what it needs; None where the config doesn't say enough.
        nearest: for an error, layouts that would work: those that give what was meant, then those on the same GPUs.
    """

    subject: Subject
    findings: tuple[Finding, ...]
    memory: MemoryEstimate | None
    nearest: tuple[Subject, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Is nothing an error?"""
        return not errors(self.findings)

    @property
    def exit_code(self) -> ExitCode:
        """What a check ends with."""
        found = errors(self.findings)
        if not found:
            return ExitCode.OK
        return ExitCode.DATA if all(finding.rule in TEXT_RULES for finding in found) else ExitCode.ILLEGAL_LAYOUT

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data: the stable form that scripts read."""
        subject = self.subject
        return {
            "ok": self.ok,
            "model": subject.shape.name,
            "role": subject.role,
            "layout": _layout_as_json(subject),
            "ranks": self._ranks(),
            "groups": self._groups(),
            "findings": [finding.as_json() for finding in self.findings],
            "unknown": list(subject.shape.unknown),
            "legal": legal_sizes(subject),
            "memory": self.memory.as_json() if self.memory is not None else {},
            "nearest": [
                {"name": short_name(other), "role": other.role, "layout": _layout_as_json(other)}
                for other in self.nearest
            ],
        }

    def _placed(self) -> bool:
        """Are there ranks to speak of? Not where sizes don't multiply out, or are absurd."""
        layout, cluster = self.subject.layout, self.subject.cluster
        return layout.world_size == cluster.world_size <= _MAX_GROUPED and layout.multiplies_out

    def _ranks(self) -> list[dict[str, int]]:
        if not self._placed():
            return []
        layout, gpus = self.subject.layout, self.subject.cluster.gpus_per_node
        return [dict(vars(layout.place(rank, gpus))) for rank in range(layout.world_size)]

    def _groups(self) -> dict[str, list[list[int]]]:
        if not self._placed():
            return {}
        return {kind: self.subject.layout.groups(kind) for kind in ("tp", "pp", "cp", "moe_tp", "moe_ep")}


def _layout_as_json(subject: Subject) -> dict[str, object]:
    cluster = subject.cluster
    return {**subject.layout.as_json(), "nodes": cluster.nodes, "gpus_per_node": cluster.gpus_per_node}


@dataclass(frozen=True)
class PairReport:
    """What was found about a prefill and a decode worker."""

    prefill: Report
    decode: Report
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Is nothing an error, in either worker or between them?"""
        return self.prefill.ok and self.decode.ok and not errors(self.findings)

    @property
    def exit_code(self) -> ExitCode:
        """What a check ends with."""
        if errors(self.findings):
            return ExitCode.ILLEGAL_LAYOUT
        codes = {report.exit_code for report in (self.prefill, self.decode)} - {ExitCode.OK}
        return max(codes) if codes else ExitCode.OK

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "ok": self.ok,
            "prefill": self.prefill.as_json(),
            "decode": self.decode.as_json(),
            "pair": {"ok": not errors(self.findings), "findings": [finding.as_json() for finding in self.findings]},
        }


def check_worker(subject: Subject, more: Sequence[Finding] = (), *, suggest: bool = True) -> Report:
    """Judge one worker.

    Args:
        subject: the worker.
        more: findings made before, e.g. while its config was put together.
        suggest: look for layouts that would work where there is an error.
    """
    findings = (*more, *all_findings(subject))
    layout_is_wrong = any(finding.rule not in TEXT_RULES for finding in errors(findings))
    return Report(
        subject,
        findings,
        estimate(subject),
        tuple(suggestions(subject)) if suggest and layout_is_wrong else (),
    )


def check_pair(prefill: Report, decode: Report) -> PairReport:
    """Judge what two workers are to each other."""
    # not at the top: most checks are of one worker
    from dynamo_mpi.parallelism.contract import check_contracts, contract_of

    return PairReport(
        prefill, decode, tuple(check_contracts(contract_of(prefill.subject), contract_of(decode.subject)))
    )


def suggestions(subject: Subject, count: int = 3) -> list[Subject]:
    """Return layouts that would work: those that give what was meant, then the nearest on the same GPUs."""
    # not at the top: the planner is needed for errors alone
    from dynamo_mpi.parallelism.planner import nearest

    meant = meant_by_more_experts_than_ranks(subject)
    return [*meant, *(made.subject for made in nearest(subject, count))]


def legal_sizes(subject: Subject) -> dict[str, list[int]]:
    """Return what each size may be for this model and these GPUs, other sizes left alone."""
    shape = subject.shape
    legal: dict[str, list[int]] = {}
    tp_sizes = legal_tp_sizes(shape, subject.layout.cp_size)
    if tp_sizes is not None:
        legal["tp"] = list(tp_sizes)
    if shape.experts is not None:
        legal["ep"] = list(legal_ep_sizes(shape))
    if shape.num_layers is not None:
        legal["pp"] = [size for size in divisors(subject.cluster.world_size) if size <= shape.num_layers]
    if shape.attention_heads is not None:
        legal["cp"] = [size for size in divisors(shape.attention_heads) if size <= 16]
    return legal
