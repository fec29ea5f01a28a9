# SPDX-License-Identifier: Apache-2.0
"""What monitoring reads: metrics, log lines, notifications to systemd, and the report of a failure."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.contexts import rank_context
from tests.contracts import sources
from tests.contracts.commands import fixed_environment
from tests.contracts.shapes import members_of

_PROGRESS = sources.Progress("load", 3, 8, 7, "n2", 40.25, 37_600_000_000, 4_096)
_HOSTS = ("n1", "n1", "n2", "n2")


def phases_of(*names: str) -> sources.PhaseTracker:
    """Return phases of which these have passed."""
    phases = sources.PhaseTracker()
    for name in names:
        with phases.enter(name):
            pass
    return phases


def metrics() -> str:
    """All metrics of rank 0's node, as Prometheus gets them."""
    facts = {"role": "agg", "engine": "trtllm", "model": "M", "namespace": "dynamo", "component": "backend"}
    state = sources.HealthState(0, "n1", 7, 1000.5, 10.0, 2, "load", "load", 1002.25, facts=tuple(facts.items()))
    spans = [
        (sources.Span("start", -0.5, None, 0.5), sources.Span("load", 0.0, 1.5 + rank, 9.0), sources.Span("serve", 9.0))
        for rank in range(3)
    ]
    ranks = [sources.RankTimings(rank, f"n{rank}", 1000.0, own) for rank, own in enumerate(spans)]
    failures = [sources.Failure(1, 70, "it broke", sources.DetectedBy.DISCONNECT)]
    severities = [sources.Severity.WARNING]
    numbers = sources.WorldNumbers(
        ranks,
        _PROGRESS,
        severities,
        failures,
        exit_code=70,
        in_flight=3,
        hardware=severities,
        staged={"bytes": 9, "read_bytes": 9},
        caches={"files": 9, "new_files": 9, "seconds": 9.0},
    )
    of_ranks = sources.render_metrics(sources.metrics_of_world(numbers))
    text = sources.metrics_of(state._replace(metrics=of_ranks), ready=False)
    return text.replace(sources.VERSION, "VERSION")


def metrics_file() -> str:
    """The names and labels in a file for node_exporter; its values are those of `metrics`."""
    with tempfile.TemporaryDirectory() as folder, fixed_environment(SLURM_JOB_ID="12", SLURM_STEP_ID="3"):
        path = Path(folder, "w.prom")
        settings = sources.load_settings(
            sources.WorkerSources(["--model", "/models/M", "--metrics-file", str(path)], {})
        )
        hooks = sources.LeaderHooks(rank_context(phases_of("load"), host="n1"), None, None)
        hooks.add_status_hooks(settings)
        hooks.on_exit(0)
        lines = path.read_text(encoding="utf-8").replace(sources.VERSION, "VERSION").splitlines()
    return "".join(f"{line.rpartition(' ')[0]}\n" for line in lines if not line.startswith("#"))


def log() -> str:
    """Lines of a log in each format, and the fields that they have as JSON."""
    facts = sources.progress_facts(_PROGRESS)
    lines = [
        sources.Line(1_700_000_000.25, sources.Level.WARN, 3, "n1", "two\nlines", {}),
        sources.Line(1_700_000_000.25, sources.Level.INFO, None, "n1", "of the node", {}),
        sources.Line(1_700_000_000.25, sources.Level.INFO, 0, "n1", "load 3/8 ranks", facts),
    ]
    return (
        "# stderr\n"
        + "".join(line.as_text() for line in lines)
        + "\n# file of --log-dir\n"
        + "".join(line.as_logged() for line in lines)
        + "\n# DYN_LOGGING_JSONL\n"
        + members_of([json.loads(line.as_json()) for line in lines])
    )


def notifications() -> str:
    """What systemd gets at NOTIFY_SOCKET, one datagram on a line."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        path = str(Path(folder, "notify"))
        supervisor.bind(path)
        supervisor.settimeout(5)
        notifier = sources.SystemdNotifier.from_env({"NOTIFY_SOCKET": path}, {"load": 3600.0})
        assert notifier is not None
        notifier.worker = "M at dyn://a.b.c"
        notifier.on_phase("load")
        notifier.on_ready()
        notifier.on_phase("drain")
        notifier.report_failure("error in load: it broke\nmore")
        return "".join(f"{supervisor.recv(4096).decode()!r}\n" for _ in range(4))


class Reported(NamedTuple):
    """A failure as it was reported.

    Args:
        text: on stderr.
        files: in the folder for failure files.
    """

    text: str
    files: list[Any]


def failure_report() -> Reported:
    """Have a node agent report that a rank was killed, of which two others failed in their own ways."""
    now = time.monotonic()
    traceback = 'Traceback (most recent call last):\n  File "engine.py", line 1\nRuntimeError: connection reset by peer'
    cause = sources.DetectedBy
    kinds = [
        sources.Failure(2, 70, traceback, cause.REPORT, "load", now - 2.0, 1),
        sources.Failure(3, 70, "died: its process ended", cause.DISCONNECT, "load", now - 1.75),
        sources.Failure(1, 124, "is stopped", cause.HEARTBEAT, "load", now - 1.5),
        sources.Failure(0, 143, "stopped by SIGTERM", cause.SIGNAL, "load", now - 1.25),
    ]
    report = sources.compose_report(
        [sources.ObservedFailure(failure, _HOSTS[failure.rank]) for failure in kinds], "load"
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        fixed_environment(DYN_MPI_ATTEMPT="2"),
        _stderr_in(Path(folder, "stderr")) as stderr,
    ):
        failures = Path(folder, "failures")
        rendezvous = sources.Rendezvous("n1", failure_dir=str(failures), label="backend")
        writer = sources.ReportWriter("")
        writer.publish(report, rendezvous, 0)
        writer.finish()
        os.environ["TRACEPARENT"] = f"00-{'1' * 32}-{'2' * 16}-01"
        writer.publish(report, rendezvous, 3)
        writer.finish()
        text = stderr.read_text(encoding="utf-8")
        files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(failures.iterdir(), reverse=True)]
    (first, second) = [f"dynamo_mpi: {part}" for part in text.split("dynamo_mpi: ")[1:]]
    assert first == second
    return Reported(first, files)


@contextlib.contextmanager
def _stderr_in(path: Path) -> Iterator[Path]:
    """Have the block's stderr, also what goes to its descriptor, in a file."""
    kept = os.dup(2)
    try:
        with path.open("wb") as file:
            os.dup2(file.fileno(), 2)
        yield path
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def failure_text() -> str:
    return re.sub(r"\d+\.\d\d s later", "SECONDS s later", failure_report().text)


CONTRACTS: dict[str, Callable[[], str]] = {
    "metrics": metrics,
    "metrics-file": metrics_file,
    "log": log,
    "sd-notify": notifications,
    "failure-report": failure_text,
}
