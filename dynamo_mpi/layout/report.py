# SPDX-License-Identifier: Apache-2.0
"""Applies every rule to one worker or a pair: used by `dynamo-mpi check` and by the ranks' preflight."""

from __future__ import annotations

from functools import cached_property
from types import MappingProxyType

from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.common.frozen import dataclass, replace
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.layout.finding import Finding, errors
from dynamo_mpi.layout.layout import short_name
from dynamo_mpi.layout.memory import MemoryEstimate, estimate, missing_values
from dynamo_mpi.layout.rules.registry import all_findings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.layout.layout import LayoutSpec
    from dynamo_mpi.layout.staging_room import StagingRoom

# rules about the text of the engine config: if only these are broken, the file is invalid, not the layout
TEXT_RULES = ("H",)
_MAX_GROUPED = 1024


@dataclass(frozen=True)
class Report:
    """The report on one worker.

    Args:
        subject: the worker.
        findings: the findings of all rules, in the rules' order.
        memory: its memory estimate; None if the config lacks sizes.
        suggest: whether to find layouts that would work.
        staging: the room that a staged copy of the model takes on each node; None if it isn't known, or wasn't asked for.
    """

    subject: LayoutSpec
    findings: tuple[Finding, ...]
    memory: MemoryEstimate | None
    suggest: bool = True
    staging: StagingRoom | None = None

    @cached_property
    def nearest(self) -> tuple[LayoutSpec, ...]:
        """For an error about the layout, layouts that would work: first those that match the likely intention, then those on the same GPUs.

        Found when they are first asked for: that takes ten times as long as the check itself.
        """
        if not self.suggest or not any(map(_is_about_layout, errors(self.findings))):
            return ()
        from dynamo_mpi.layout.suggestions import suggestions

        return tuple(suggestions(self.subject))

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not errors(self.findings)

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of the check."""
        return exit_code_of(self.findings)

    @property
    def unknown(self) -> tuple[str, ...]:
        """What rules and estimates need and the model's config lacks, and the config's keys that aren't known here."""
        return tuple(dict.fromkeys((*self.missing, *self.subject.shape.unread)))

    @property
    def missing(self) -> tuple[str, ...]:
        """The values that rules and estimates need and the model's config lacks."""
        return tuple(dict.fromkeys((*self.subject.shape.missing, *missing_values(self.subject))))

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data, in the stable format for scripts."""
        from dynamo_mpi.layout.suggestions import legal_sizes

        subject = self.subject
        return {
            "ok": self.ok,
            "model": subject.shape.name,
            "role": subject.role,
            "trtllm_version": None if subject.version is None else str(subject.version),
            "layout": subject.layout_as_json(),
            "ranks": self._ranks(),
            "groups": self._groups(),
            "findings": [finding.as_json() for finding in self.findings],
            "unknown": list(self.unknown),
            "legal": legal_sizes(subject),
            "memory": self.memory.as_json() if self.memory is not None else {},
            "staging": self.staging.as_json() if self.staging is not None else {},
            "nearest": [
                {"name": short_name(other), "role": other.role, "layout": other.layout_as_json()}
                for other in self.nearest
            ],
        }

    def _placed(self) -> bool:
        """Whether the layout has valid ranks: its sizes multiply to the number of ranks, and are in range."""
        layout, cluster = self.subject.layout, self.subject.cluster
        part = cluster.nodes == 1 and layout.world_size <= cluster.world_size
        enough = part or layout.world_size == cluster.world_size
        return enough and layout.world_size <= _MAX_GROUPED and layout.multiplies_out

    def _ranks(self) -> list[dict[str, int]]:
        if not self._placed():
            return []
        layout, gpus = self.subject.layout, self.subject.cluster.gpus_per_node
        return [dict(vars(layout.place(rank, gpus))) for rank in range(layout.world_size)]

    def _groups(self) -> dict[str, list[list[int]]]:
        if not self._placed():
            return {}
        return {kind: self.subject.layout.groups(kind) for kind in ("tp", "pp", "cp", "moe_tp", "moe_ep")}


@dataclass(frozen=True)
class PairReport:
    """The report on a prefill and a decode worker."""

    prefill: Report
    decode: Report
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error in either worker or between them."""
        return self.prefill.ok and self.decode.ok and not errors(self.findings)

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of the check."""
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


def exit_code_of(findings: Sequence[Finding], special: Mapping[str, ExitCode] = MappingProxyType({})) -> ExitCode:
    """Return the exit code for findings: the first error decides; wrong keys count last, because other errors often exist too.

    Args:
        findings: in the order of the report.
        special: by rule, codes of rules that aren't about the layout.
    """
    found = errors(findings)
    if not found:
        return ExitCode.OK
    first = next((finding for finding in found if finding.rule not in TEXT_RULES), None)
    return ExitCode.DATA if first is None else special.get(first.rule, ExitCode.ILLEGAL_LAYOUT)


def check_worker(
    subject: LayoutSpec, more: Sequence[Finding] = (), *, suggest: bool = True, staging: StagingRoom | None = None
) -> Report:
    """Apply all rules to one worker.

    Args:
        subject: the worker.
        more: earlier findings, e.g. from merging its config.
        suggest: whether to find layouts that would work if there is an error.
        staging: the room that a staged copy takes, for the report.
    """
    report = Report(subject, (*more, *all_findings(subject)), estimate(subject), suggest, staging)
    if suggest and any(finding.rule == "A2" for finding in report.findings):
        findings = tuple(_with_what_was_meant(finding, report) for finding in report.findings)
        changed = replace(report, findings=findings)
        vars(changed)["nearest"] = report.nearest  # found already
        return changed
    return report


def _is_about_layout(finding: Finding) -> bool:
    """Return whether another layout could solve the error: not for wrong keys, limits, roles, or a format that the GPU doesn't support."""
    return not finding.rule.startswith(("H", "I", "G"))


def _with_what_was_meant(finding: Finding, report: Report) -> Finding:
    """A2: name layouts with the given tp and ep, on as many ranks as they need."""
    from dynamo_mpi.layout.suggestions import other_shapes

    layout = report.subject.layout
    wider = [other for other in report.nearest if other.layout.world_size > layout.world_size]
    if finding.rule != "A2" or not wider:
        return finding
    shapes, ranks = other_shapes(wider), layout.moe_world_size
    return replace(
        finding, fix=f"on {shapes}; on {'this rank' if ranks == 1 else f'these {ranks} ranks'} {finding.fix}"
    )


def check_pair(prefill: Report, decode: Report) -> PairReport:
    """Apply the rules between two workers."""
    # imported here: most checks are of one worker
    from dynamo_mpi.layout.contract import check_contracts, contract_of

    return PairReport(
        prefill, decode, tuple(check_contracts(contract_of(prefill.subject), contract_of(decode.subject)))
    )
