# SPDX-License-Identifier: Apache-2.0
"""Metrics as Prometheus reads them, and as a file for node_exporter."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from dynamo_mpi.common.failure import DetectedBy, Failure
from dynamo_mpi.common.phases import PHASES, PhaseProgress, RankTimings, Span
from dynamo_mpi.layout.finding import Severity
from dynamo_mpi.telemetry.health_state import HealthState, metrics_of, world_metrics
from dynamo_mpi.telemetry.metrics import (
    Metric,
    MetricsFile,
    Sample,
    WorldNumbers,
    describe_progress,
    metrics_of_world,
    render,
)
from tests.conftest import ROOT

# all that UTF-8 can write
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
STATE = HealthState(3, "n1", 7, 1000.5, 10.0, attempt=2, phase="load", since=1002.0)


def read(text: str) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    return {
        family.name: {frozenset(sample.labels.items()): sample.value for sample in family.samples}
        for family in text_string_to_metric_families(text)
    }


@given(TEXT, TEXT, st.floats(allow_nan=False))
def test_prometheus_reads_what_was_written(label: str, help_text: str, value: float) -> None:
    text = render([Metric("a_seconds", "gauge", help_text, (Sample(value, {"name": label}),))], {"more": 'x"\\\n'})
    (family,) = text_string_to_metric_families(text)
    (sample,) = family.samples
    assert (sample.labels, sample.value) == ({"name": label, "more": 'x"\\\n'}, value)
    assert family.type == "gauge"
    assert len(text.split("\n")) == 4


@pytest.mark.parametrize(
    "metric",
    [
        Metric("a-b", "gauge", "", (Sample(1),)),
        Metric("a", "histogram", "", (Sample(1),)),
        Metric("a", "gauge", "", (Sample(1, {"0": "x"}),)),
    ],
)
def test_what_prometheus_would_refuse_is_refused(metric: Metric) -> None:
    with pytest.raises(ValueError, match="is no"):
        render([metric])


def test_a_metric_without_values_and_a_label_without_text_are_left_out() -> None:
    assert render([Metric("a", "gauge", "A.", ())]) == ""
    assert render([Metric("a", "gauge", "A.", (Sample(1, {"b": ""}),))]).endswith("\na 1\n")
    assert render([Metric("a", "gauge", "A.", (Sample(float("nan")),))]).endswith("\na NaN\n")


def test_every_node_publishes_the_worlds_phase() -> None:
    found = read(metrics_of(STATE._replace(world="warmup", metrics="more 1\n"), ready=False))
    assert found["dynamo_mpi_phase"] == {frozenset({("phase", name)}): float(name == "warmup") for name in PHASES}
    assert found["dynamo_mpi_ready"] == {frozenset(): 0.0}
    assert found["dynamo_mpi_attempt"] == {frozenset(): 2.0}
    assert found["more"] == {frozenset(): 1.0}


def rank(number: int, seconds: float) -> RankTimings:
    spans = (Span("start", -0.5, None, 0.5), Span("load", 0.0, seconds, 9.0), Span("serve", 9.0))
    return RankTimings(number, f"n{number // 8}", 1000.0, spans)


def test_a_thousand_ranks_are_no_more_metrics_than_two() -> None:
    def of(size: int) -> str:
        ranks = [rank(number, 1.0 + number) for number in range(size)]
        return render(metrics_of_world(WorldNumbers(ranks, PhaseProgress("serve", 0, size, None, None, 0.0))))

    begin = time.monotonic()
    large, small = of(1024), of(2)
    assert time.monotonic() - begin < 0.5
    assert large.count("\n") == small.count("\n")
    found = read(large)["dynamo_mpi_phase_duration_seconds"]
    spent = {dict(labels)["statistic"]: value for labels, value in found.items() if ("phase", "load") in labels}
    assert spent == {"rank0": 1.0, "min": 1.0, "median": 512.5, "max": 1024.0}
    assert not [labels for labels in found if ("phase", "serve") in labels], "it has not ended"


def test_findings_and_failures_are_counted_and_zero_is_a_count() -> None:
    failures = [
        Failure(1, 70, "x", DetectedBy.DISCONNECT),
        Failure(2, 70, "y", DetectedBy.REPORT),
        Failure(3, 70, "z", DetectedBy.REPORT),
    ]
    none_done = PhaseProgress("load", 1, 4, None, None, 0.0)
    severities = (Severity.WARNING, Severity.WARNING, Severity.INFO)
    text = render(metrics_of_world(WorldNumbers([rank(0, 1.0)], none_done, severities, failures, 70)))
    found = read(text)
    # the parser leaves _total off, as it names the family
    assert {dict(labels)["severity"]: value for labels, value in found["dynamo_mpi_preflight_findings"].items()} == {
        "error": 0,
        "warning": 2,
        "info": 1,
    }
    counted = {dict(labels)["cause"]: value for labels, value in found["dynamo_mpi_failures"].items()}
    assert counted == {"report": 2, "disconnect": 1, "host_unreachable": 0, "heartbeat": 0, "signal": 0}
    assert "# TYPE dynamo_mpi_failures_total counter\n" in text
    assert found["dynamo_mpi_exit_code"] == {frozenset(): 70.0}


def test_progress_names_the_ranks_that_differ() -> None:
    at_it = PhaseProgress("load", 1, 4, 3, "n1", 12.4)
    assert describe_progress(at_it) == "1 of 4 ranks have finished, rank 3 on n1 has been loading for 12 s"
    assert describe_progress(at_it._replace(done=4)) == "4 of 4 ranks have finished, rank 3 on n1 took 12 s"
    assert describe_progress(at_it._replace(phase="serve")) == ""


def test_the_file_is_renewed_and_whole_whenever_it_is_read(tmp_path: Path) -> None:
    path, said = tmp_path / "w.prom", list[str]()
    written = threading.Event()
    texts = iter([f"a {number}\n" * 5000 for number in range(4)])

    def text() -> str:
        written.set()
        return next(texts)

    file = MetricsFile(path, text, said.append)
    for _ in range(2):
        assert written.wait(5)
        written.clear()
        file.on_phase("load")
    assert written.wait(5)
    file.on_exit(0)
    lines = set(path.read_text().splitlines())
    assert lines == {"a 3"}
    assert (path.stat().st_mode & 0o777, os.listdir(tmp_path), said) == (0o644, ["w.prom"], [])
    # the last word is the last
    file.on_phase("load")
    assert path.read_text().startswith("a 3\n")


def test_a_file_that_cannot_be_written_is_reported_once(tmp_path: Path) -> None:
    said: list[str] = []
    file = MetricsFile(tmp_path / "none" / "w.txt", lambda: "a 1\n", said.append)
    file.on_phase("load")
    file.on_exit(0)
    ending, missing = said
    assert "does not" in ending
    assert "can't be written: No such file or directory" in missing


def test_a_file_system_that_hangs_delays_nothing(tmp_path: Path) -> None:
    # to open it waits for a reader
    os.mkfifo(tmp_path / ".w.prom.partial")
    file = MetricsFile(tmp_path / "w.prom", lambda: "a 1\n", list[str]().append)
    began = time.monotonic()
    file.on_exit(0)
    assert time.monotonic() - began < 5
    os.close(os.open(tmp_path / ".w.prom.partial", os.O_RDONLY | os.O_NONBLOCK))


def test_the_page_names_every_metric_and_no_other() -> None:
    numbers = WorldNumbers((RankTimings(0, "n0", 0.0, ()),), PhaseProgress("serve", 1, 1, None, None, 0.0))
    metrics = (*metrics_of_world(numbers), *world_metrics(STATE, ready=True))
    page = (ROOT / "docs" / "guides" / "observing.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(dynamo_mpi_[a-z_]+)[`{]", page)) == {metric.name for metric in metrics}
