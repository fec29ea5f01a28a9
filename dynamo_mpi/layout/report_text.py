# SPDX-License-Identifier: Apache-2.0
"""Formats a check's report and a planner's result as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.frozen import replace
from dynamo_mpi.layout.engine_yaml import ENGINE_CONFIG, engine_yaml, srun_line
from dynamo_mpi.layout.finding import Severity, errors, render
from dynamo_mpi.layout.format import columns, counted, gib
from dynamo_mpi.layout.layout import short_name
from dynamo_mpi.layout.suggestions import suggestions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.layout import LayoutSpec
    from dynamo_mpi.layout.library import PlanReport
    from dynamo_mpi.layout.memory import MemoryEstimate
    from dynamo_mpi.layout.planner import Plan
    from dynamo_mpi.layout.report import PairReport, Report


def describe_plans(report: PlanReport, limit: int) -> str:
    """Format the best layouts as a table, and the first one with its YAML and its srun command.

    Args:
        report: the layouts.
        limit: rows of the table.
    """
    model, subject, plans, general = sanitize(report.model), report.subject, report.layouts, report.findings
    shown = plans[:limit]
    head = ["", "layout", "fits", "weights", "KV copies", "room for tokens", "because"]
    rows = [[str(number), *_row(made)] for number, made in enumerate(shown, 1)]
    more = f"\n({len(plans) - len(shown)} more: --limit {len(plans)})" if len(plans) > len(shown) else ""
    on = f"{subject.cluster}" + (f" ({subject.cluster.gpu})" if subject.cluster.gpu else "")
    shown_findings = [finding for finding in general if finding.severity is not Severity.INFO]
    parts = [render(shown_findings)] if shown_findings else []
    nothing_fits = all(made.fits is False for made in plans)
    parts.append(
        f"{model}, role {subject.role}, on {on}: {counted(len(plans), 'legal layout')}"
        + (", and by estimate none fits" if nothing_fits else "")
        + f"\n{columns(head, rows, right=(0, 3, 4, 5))}{more}"
    )
    if report.staging is not None:
        parts[-1] += f"\n{report.staging.line(subject.cluster.gpu)}"
    if nothing_fits:
        parts.append(_enough(subject))
    else:
        best = plans[0].subject
        parts.append(
            f"{ENGINE_CONFIG} of the first:\n{_indent(engine_yaml(best, model))}\n"
            f"start it:\n  {srun_line(best, report.path)}"
        )
    return "\n\n".join(parts)


def _enough(subject: LayoutSpec) -> str:
    more = suggestions(subject, 1)
    if not more:
        return "take GPUs with more memory, or a checkpoint in FP8 or NVFP4"
    return f"it fits on {more[0].cluster}: {short_name(more[0])}"


def _row(made: Plan) -> list[str]:
    memory = made.memory
    weights = gib(memory.fullest.weights_bytes) if memory is not None else "?"
    tokens = f"{memory.world_tokens:,}" if memory is not None and memory.world_tokens is not None and made.fits else "?"
    fits = {True: "yes", False: "no", None: "?"}[made.fits]
    return [short_name(made.subject), fits, weights, str(made.kv_copies), tokens, ", ".join(made.reasons)]


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def describe_report(model: str, report: Report) -> str:
    """Format the report on one worker: the worker, the findings, and layouts that would work.

    Args:
        model: the user's name of the model.
        report: the findings.
    """
    return "\n".join(_lines(sanitize(model), report))


def describe_pair(model: str, report: PairReport) -> str:
    """Format the report on both workers of a pair, and on the pair itself."""
    # both load one model
    parts = [describe_report(model, report.prefill), describe_report(model, replace(report.decode, staging=None))]
    between = render(report.findings) if report.findings else ""
    parts.append(f"between prefill and decode: {summary(report.findings)}" + (f"\n{between}" if between else ""))
    return "\n\n".join(parts)


def summary(findings: Sequence[Finding]) -> str:
    """Count findings: ``ok``, ``ok, 2 warnings``, ``1 error, 1 warning``."""
    counts = [
        sum(finding.severity is severity for finding in findings) for severity in (Severity.ERROR, Severity.WARNING)
    ]
    parts = [counted(count, name) for count, name in zip(counts, ("error", "warning"), strict=True) if count]
    return ", ".join(parts if errors(findings) else ["ok", *parts])


def _lines(model: str, report: Report) -> Iterator[str]:
    subject = report.subject
    shape = subject.shape
    kind = "" if shape.name == model else f" ({shape.name})"
    yield f"{model}{kind}, role {subject.role}: {subject.layout} on {subject.cluster}"
    absent = [name for name in report.missing if name not in shape.unknown_layers]
    if absent:
        yield f"not in config.json, so not checked: {', '.join(absent)}"
    if shape.unknown_layers:
        yield f"kinds of layers in config.json that aren't known here, so not checked: {', '.join(shape.unknown_layers)}"
    if shape.unread:
        yield f"keys of config.json that aren't known here, so not considered: {', '.join(shape.unread)}"
    # J's information is in the line about memory
    shown = [
        found for found in report.findings if (found.rule, found.severity) != ("J", Severity.INFO) or not report.memory
    ]
    if shown:
        yield render(shown)
    if report.memory is not None:
        yield memory_line(report.memory)
    if report.staging is not None:
        yield report.staging.line(subject.cluster.gpu)
    if report.nearest:
        yield "layouts that would work:"
        width = max(len(short_name(other)) for other in report.nearest)
        yield from (f"  {short_name(other):{width}}  on {other.cluster}" for other in report.nearest)
    yield summary(report.findings)


def memory_line(memory: MemoryEstimate) -> str:
    """Format the memory of the fullest rank in one line."""
    stage = memory.fullest
    least = "at least " if memory.at_least else ""
    beside = (("draft model", stage.draft_bytes), ("adapters", stage.adapter_bytes))
    parts = [f"weights {least}{gib(stage.weights_bytes)}", *(f"{name} {gib(size)}" for name, size in beside if size)]
    if stage.kv_bytes_per_token:
        parts.append(f"KV {stage.kv_bytes_per_token / 1024:.1f} KiB per token")
    if memory.tokens is not None and memory.fits:
        room = f"room for {'at most' if memory.at_least else 'about'} {memory.tokens:,} tokens"
        if memory.full_length_requests is not None:
            room += f" ({counted(memory.full_length_requests, 'request')} of {memory.length})"
        parts.append(room + (f" on each of {memory.dp_size} ranks" if memory.dp_size > 1 else ""))
    where = f" on {memory.gpu}" if memory.gpu else ""
    unknown = f"; not counted: {', '.join(memory.at_least)}" if memory.at_least else ""
    return f"memory of a rank{where}, the fullest being rank {memory.fullest_rank}: {', '.join(parts)}{unknown}"
