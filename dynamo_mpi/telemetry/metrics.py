# SPDX-License-Identifier: Apache-2.0
"""Metrics in Prometheus' text exposition format 0.0.4, rank 0's metrics of all ranks, and their file for node_exporter's
textfile collector."""

from __future__ import annotations

import re
import threading
from collections import Counter

from dynamo_mpi.common.failure import DetectedBy
from dynamo_mpi.common.folder_walk import reason
from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple
from dynamo_mpi.common.own_files import write_own
from dynamo_mpi.common.waiting import start_thread
from dynamo_mpi.layout.finding import Severity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from dynamo_mpi.common.failure import Failure
    from dynamo_mpi.common.hooks import WorldFailure
    from dynamo_mpi.common.phases import PhaseProgress, RankTimings

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_KINDS = ("counter", "gauge")
_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


class Sample(NamedTuple):
    """One value of a metric.

    Args:
        value: in base units: seconds, or a number of things.
        labels: distinguish it from the metric's other values.
    """

    value: float
    labels: Mapping[str, str] = {}


class Metric(NamedTuple):
    """One metric with all its values.

    Args:
        name: with its unit, and ``_total`` if it is a counter.
        kind: ``"counter"`` or ``"gauge"``.
        help: one sentence.
        samples: its values.
    """

    name: str
    kind: str
    help: str
    samples: tuple[Sample, ...]


def render(metrics: Iterable[Metric], common: Mapping[str, str] | None = None) -> str:
    """Format metrics. Those without a value are left out.

    Args:
        metrics: each name once.
        common: labels of every sample; a sample's own labels override them.

    Raises:
        ValueError: a name, a label's name or a kind is invalid in Prometheus.
    """
    lines = []
    for metric in metrics:
        if not _NAME.fullmatch(metric.name) or metric.kind not in _KINDS:
            raise ValueError(f"{metric.kind} {metric.name!r} is no metric")
        if metric.samples:
            lines += [
                f"# HELP {metric.name} {_escaped(metric.help)}",
                f"# TYPE {metric.name} {metric.kind}",
                *(_line(metric.name, sample, common or {}) for sample in metric.samples),
            ]
    return "".join(line + "\n" for line in lines)


def _line(name: str, sample: Sample, common: Mapping[str, str]) -> str:
    labels = {**common, **sample.labels}
    if bad := [label for label in labels if not _NAME.fullmatch(label)]:
        raise ValueError(f"{bad[0]!r} is no label")
    # an empty label means the same as none
    text = ",".join(f'{label}="{_quoted(value)}"' for label, value in labels.items() if value)
    return f"{name}{{{text}}} {_number(sample.value)}" if text else f"{name} {_number(sample.value)}"


def _number(value: float) -> str:
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', r"\"")


class WorldNumbers(NamedTuple):
    """The input of the metrics.

    Args:
        ranks: all ranks, with their phases.
        progress: their progress.
        severities: severities of the preflight's findings.
        failures: failures of this world.
        exit_code: its exit code; None if it has not ended.
        in_flight: number of requests in flight; None if it isn't known.
        hardware: severities of the hardware checks' findings.
        staged: what staging the model took, as in the worker record; None if it wasn't staged.
        caches: how the compile caches were seeded and written back, as in the worker record; None if they were left alone.
    """

    ranks: Sequence[RankTimings]
    progress: PhaseProgress
    severities: Sequence[Severity] = ()
    failures: Sequence[Failure] = ()
    exit_code: int | None = None
    in_flight: int | None = None
    hardware: Sequence[Severity] = ()
    staged: Mapping[str, Any] | None = None
    caches: Mapping[str, Any] | None = None


def metrics_of_world(numbers: WorldNumbers) -> tuple[Metric, ...]:
    """Return the metrics. Their number doesn't depend on the number of ranks."""
    found, of_hardware = Counter(numbers.severities), Counter(numbers.hardware)
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
            "dynamo_mpi_hardware_findings_total",
            "counter",
            "Findings of the hardware checks.",
            tuple(Sample(of_hardware[severity], {"severity": severity.value}) for severity in Severity),
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
        Metric(
            "dynamo_mpi_stage_bytes",
            "gauge",
            "The model that was staged: its size, and what all nodes together have read of it; absent if it wasn't.",
            tuple(
                Sample(numbers.staged[member], {"what": what})
                for what, member in (("model", "bytes"), ("read", "read_bytes"))
                if numbers.staged is not None
            ),
        ),
        Metric(
            "dynamo_mpi_compile_cache_files",
            "gauge",
            "Files of the ranks' compile caches: seeded from the archive (on the rank that has the most), and new ones that were written "
            "back (of all ranks); absent without --cache.",
            tuple(
                Sample(numbers.caches[member], {"what": what})
                for what, member in (("seeded", "files"), ("written", "new_files"))
                if numbers.caches is not None
            ),
        ),
        Metric(
            "dynamo_mpi_compile_cache_seconds",
            "gauge",
            "How long seeding the compile caches took on the slowest rank; absent without --cache.",
            () if numbers.caches is None else (Sample(numbers.caches["seconds"]),),
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
    from statistics import median  # it imports as much as the preflight's rules

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


# if the file is older than a few of these (node_textfile_mtime_seconds), it is no longer written
_PERIOD_SECONDS = 15.0
_END_SECONDS = 1.0
# the collector may run as another user, and the file contains no secret
_MODE = 0o644


class MetricsFile(WorkerHook):
    """Writes the file. It remains after the worker's end, as that collector's users expect, and contains the exit code.

    Args:
        path: path of the file; the collector reads only files that end in ``.prom``.
        render: returns its content.
        warn: logs a warning, once.
    """

    def __init__(self, path: Path, render: Callable[[], str], warn: Callable[[str], object]) -> None:
        self._path, self._render, self._warn = path, render, warn
        self._changed = threading.Event()
        self._ended = False
        # the last write may come from another thread
        self._lock = threading.Lock()
        if path.suffix != ".prom":
            warn(f"node_exporter reads only files that end in .prom, and {path} does not")
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def on_phase(self, phase: str) -> None:
        """Write the file again soon."""
        self._changed.set()

    def on_failure(self, failure: WorldFailure) -> None:
        """Write the file again soon."""
        self._changed.set()

    def on_exit(self, code: int) -> None:
        """Write the file for the last time, in at most a second: a file system that hangs must not block the ranks."""
        if (thread := start_thread(self._finish)) is not None:
            thread.join(_END_SECONDS)

    def _finish(self) -> None:
        with self._lock:
            self._ended = True
            self._write()

    def _run(self) -> None:
        while not self._ended:
            with self._lock:
                if not self._ended:
                    self._write()
            self._changed.wait(_PERIOD_SECONDS)
            self._changed.clear()

    def _write(self) -> None:
        try:
            write_own(self._path, self._render().encode(), _MODE, exact=True)
        except OSError as error:
            self._warn(f"the metrics file {self._path} can't be written: {reason(error)}")
            self._warn = _nothing


def _nothing(_: str) -> None:
    return
