# SPDX-License-Identifier: Apache-2.0
"""Formats a check's report as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.layout.finding import Severity, errors, render
from dynamo_mpi.layout.format import counted, gib, short_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.layout.check import PairReport, Report
    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.memory import MemoryEstimate


def describe_report(model: str, report: Report) -> str:
    """Format the report on one worker: the worker, the findings, and layouts that would work.

    Args:
        model: the user's name of the model.
        report: the findings.
    """
    return "\n".join(_lines(model, report))


def describe_pair(model: str, report: PairReport) -> str:
    """Format the report on both workers of a pair, and on the pair itself."""
    parts = [describe_report(model, report.prefill), describe_report(model, report.decode)]
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
    if report.unknown:
        yield f"not in config.json, so not checked: {', '.join(report.unknown)}"
    # J's information is in the line about memory
    shown = [
        found for found in report.findings if (found.rule, found.severity) != ("J", Severity.INFO) or not report.memory
    ]
    if shown:
        yield render(shown)
    if report.memory is not None:
        yield memory_line(report.memory)
    if report.nearest:
        yield "layouts that would work:"
        width = max(len(short_name(other)) for other in report.nearest)
        yield from (f"  {short_name(other):{width}}  on {other.cluster}" for other in report.nearest)
    yield summary(report.findings)


def memory_line(memory: MemoryEstimate) -> str:
    """Format the memory of the fullest rank in one line."""
    stage = memory.fullest
    parts = [f"weights {gib(stage.weights_bytes)}"]
    if stage.kv_bytes_per_token:
        parts.append(f"KV {stage.kv_bytes_per_token / 1024:.1f} KiB per token")
    if memory.tokens is not None and memory.fits:
        room = f"room for about {memory.tokens:,} tokens"
        if memory.full_length_requests is not None:
            room += f" ({memory.full_length_requests} requests of {memory.length})"
        parts.append(room + (f" on each of {memory.dp_size} ranks" if memory.dp_size > 1 else ""))
    where = f" on {memory.gpu}" if memory.gpu else ""
    return f"memory of a rank{where}, the fullest being rank {memory.fullest_rank}: {', '.join(parts)}"
