# SPDX-License-Identifier: Apache-2.0
"""What rank 0 knows of every rank's phases."""

from __future__ import annotations

import time

import pytest

from dynamo_mpi.common.codec import encode_strings
from dynamo_mpi.common.phases import PROCESS_START, PhaseProgress, PhaseTracker, RankTimings, Span
from dynamo_mpi.supervisor.heartbeat_protocol import WireError
from dynamo_mpi.supervisor.progress import ProgressTracker, pack_timings, progress_of


def rank(number: int, *spans: Span, began: float = 100.0) -> RankTimings:
    return RankTimings(number, f"n{number // 2}", began, spans)


def test_progress_names_one_that_has_not_begun() -> None:
    ranks = [
        rank(0, Span("load", 1.0, local=3.0)),
        rank(1, Span("load", 1.0)),
        rank(2, Span("load", 0.5)),
        rank(3, Span("preflight", 0.1, total=0.4)),
        rank(4),
    ]
    assert progress_of("load", ranks, 110.0) == PhaseProgress("load", 1, 5, 3, "n1", 9.5)


def test_of_ranks_at_it_the_one_that_has_been_at_it_for_longest_is_named() -> None:
    ranks = [rank(0, Span("load", 1.0, local=3.0)), rank(1, Span("load", 1.0)), rank(2, Span("load", 0.5))]
    assert progress_of("load", ranks, 110.0) == PhaseProgress("load", 1, 3, 2, "n1", 9.5)


def test_of_ranks_that_report_bytes_the_one_that_has_read_least_is_named() -> None:
    ranks = [
        rank(0, Span("load", 1.0, local=3.0))._replace(read=1),
        rank(1, Span("load", 1.0))._replace(read=5),
        rank(2, Span("load", 0.5))._replace(read=70),
    ]
    assert progress_of("load", ranks, 110.0) == PhaseProgress("load", 1, 3, 1, "n0", 9.0, 76, 5)
    silent = [*ranks[:2], ranks[2]._replace(read=None)]
    assert progress_of("load", silent, 110.0) == PhaseProgress("load", 1, 3, 2, "n1", 9.5)


def test_of_ranks_that_are_all_through_the_slowest_is_named() -> None:
    ranks = [rank(0, Span("load", 1.0, local=3.0)), rank(1, Span("load", 1.0, local=5.0, total=6.0))]
    assert progress_of("load", ranks, 110.0) == PhaseProgress("load", 2, 2, 1, "n0", 5.0)


def test_a_rank_that_is_in_a_later_phase_is_through() -> None:
    ranks = [rank(0, Span("warmup", 5.0)), rank(1, Span("load", 1.0, total=2.0), Span("serve", 3.0))]
    assert progress_of("warmup", ranks, 106.0) == PhaseProgress("warmup", 1, 2, 0, "n0", 1.0)


def test_ranks_that_have_reported_nothing_are_not_through() -> None:
    assert progress_of("load", [rank(0), rank(1)], 110.0) == PhaseProgress("load", 0, 2, None, None, 0.0)


def test_a_phase_that_runs_longer_never_makes_fewer_ranks_done() -> None:
    ranks = [rank(0, Span("load", 1.0)), rank(1, Span("load", 1.0, local=0.5))]
    counts = [progress_of("load", ranks, 100.0 + age).done for age in range(10)]
    assert counts == [1] * 10


def test_rank_reports_are_dated_by_rank_zeros_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = ProgressTracker(["n0", "n1"], PhaseTracker())
    phases = PhaseTracker()
    with phases.enter("mpi_init"):
        phases.mark_local_done()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 1000)
    early = pack_timings(phases)
    late = pack_timings(phases)
    monkeypatch.undo()
    began = time.time() - phases.age
    tracker.update(1, late)
    tracker.update(1, early)
    own, other = tracker.ranks()
    assert (own.rank, own.host, other.rank, other.host) == (0, "n0", 1, "n1")
    assert abs(other.began - began) < 0.5
    assert [span.phase for span in other.spans] == [PROCESS_START, "mpi_init"]
    start, world = other.spans
    assert start.began < 0
    assert other.read is not None
    assert other.read > 0
    assert start.total == -start.began
    assert world.local is not None
    assert world.total is not None
    assert 0 <= world.local <= world.total


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\1",
        encode_strings(["1.0"]),
        encode_strings(["1.0", "0.5"]),
        encode_strings(["1.0", "x", "9"]),
        encode_strings(["1.0", "0.5", "much"]),
        encode_strings(["1.0", "0.5", "9", "load", "1.0", ""]),
        encode_strings(["1.0", "0.5", "9", "lunch", "1.0", "", ""]),
        encode_strings(["1.0", "0.5", "9", "load", "soon", "", ""]),
        encode_strings(["1.0", "0.5", "9", *["load", "1.0", "", ""] * 65]),
    ],
)
def test_what_are_no_timings_is_refused(body: bytes) -> None:
    tracker = ProgressTracker(["n0", "n1"], PhaseTracker())
    with pytest.raises(WireError, match="invalid TIMINGS"):
        tracker.update(1, body)
    assert tracker.ranks()[1].spans == ()


def test_phases_keep_their_spans_and_report_every_change() -> None:
    phases = PhaseTracker()
    seen: list[list[Span]] = []
    phases.on_change(lambda: seen.append(list(phases.spans)))
    with phases.enter("mpi_init"):
        pass
    with phases.enter("load"):
        phases.mark_local_done()
        phases.mark_local_done()
        phases.begin("serve")
    names = [span.phase for span in phases.spans]
    assert names == ["mpi_init", "load", "serve"]
    world, load, serve = phases.spans
    assert world.local is None
    assert world.total is not None
    assert load.local is not None
    assert load.total is not None
    assert load.local <= load.total
    # what has begun inside of another phase's body goes on after it
    assert serve.total is None
    assert phases.current == "serve"
    assert len(seen) == 6


def test_a_phase_that_goes_on_is_not_begun_again() -> None:
    phases = PhaseTracker()
    heard: list[str] = []
    phases.on_phase(heard.append)
    phases.begin("preflight")
    with phases.enter("preflight"):
        assert len(phases.spans) == 1
    (span,) = phases.spans
    assert span.total is not None
    assert phases.durations["preflight"] <= span.total
    assert heard == ["preflight"]
