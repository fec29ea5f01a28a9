# SPDX-License-Identifier: Apache-2.0
"""Rank 0's metrics of all ranks. Pure."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.failure import DetectedBy
from dynamo_mpi.layout.finding import Severity
from dynamo_mpi.telemetry.metrics import Metric, Sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.common.failure import Failure
    from dynamo_mpi.common.phases import PhaseProgress, RankTimings


class WorldNumbers(NamedTuple):
    """The input of the metrics.

    Args:
        ranks: all ranks, with their phases.
        progress: their progress.
        severities: severities of the preflight's findings.
        failures: failures of this world.
        exit_code: its exit code; None if it has not ended.
        in_flight: number of requests in flight; None if it isn't known.
    """

    ranks: Sequence[RankTimings]
    progress: PhaseProgress
    severities: Sequence[Severity] = ()
    failures: Sequence[Failure] = ()
    exit_code: int | None = None
    in_flight: int | None = None


def metrics_of_world(numbers: WorldNumbers) -> tuple[Metric, ...]:
    """Return the metrics. Their number doesn't depend on the number of ranks."""
    found = Counter(numbers.severities)
    failed = Counter(failure.cause for failure in numbers.failures)
    ended = () if numbers.exit_code is None else (Sample(numbers.exit_code),)
    return (
        Metric("dynamo_mpi_ranks", "gauge", "Ranks of the world.", (Sample(len(numbers.ranks)),)),
        Metric(
            "dynamo_mpi_ranks_done",
            "gauge",
            "Ranks that have finished their own part of the world's phase.",
            (Sample(numbers.progress.done),),
        ),
        Metric(
            "dynamo_mpi_phase_duration_seconds",
            "gauge",
            "How long phases that have ended took on rank 0, and on the fastest, the median and the slowest rank of all, "
            "each rank's own part if it reports that.",
            tuple(_durations(numbers.ranks)),
        ),
        Metric(
            "dynamo_mpi_preflight_findings_total",
            "counter",
            "Findings of the preflight.",
            tuple(Sample(found[severity], {"severity": severity.value}) for severity in Severity),
        ),
        Metric(
            "dynamo_mpi_failures_total",
            "counter",
            "Failures of ranks by how they were detected.",
            tuple(Sample(failed[cause], {"cause": cause.name.lower()}) for cause in DetectedBy),
        ),
        Metric(
            "dynamo_mpi_requests_in_flight",
            "gauge",
            "Requests in flight; absent if that isn't known, as with dynamo.trtllm.",
            () if numbers.in_flight is None else (Sample(numbers.in_flight),),
        ),
        Metric("dynamo_mpi_exit_code", "gauge", "The world's exit code; absent until it has ended.", ended),
    )


def describe_progress(progress: PhaseProgress) -> str:
    """Describe the ranks' progress; empty if only the phase is known: the phases after the load depend on rank 0."""
    if progress.ranks < 2 or progress.slowest_rank is None or progress.phase != "load":
        return ""
    return (
        f"{progress.done} of {progress.ranks} ranks have finished, rank {progress.slowest_rank} on {progress.slowest_host} "
        f"{'took' if progress.done == progress.ranks else 'has been loading for'} {progress.seconds:.0f} s"
    )


def _durations(ranks: Sequence[RankTimings]) -> list[Sample]:
    by_phase: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    for rank in ranks:
        for span in rank.spans:
            seconds = span.total if span.local is None else span.local
            if seconds is not None:
                by_phase.setdefault(span.phase, []).append(seconds)
                if rank.rank == 0:
                    first[span.phase] = seconds
    samples = []
    for phase, all_seconds in by_phase.items():
        statistics = {"rank0": first.get(phase), "min": min(all_seconds), "median": median(all_seconds)}
        statistics["max"] = max(all_seconds)
        samples += [
            Sample(round(seconds, 6), {"phase": phase, "statistic": statistic})
            for statistic, seconds in statistics.items()
            if seconds is not None
        ]
    return samples
