# SPDX-License-Identifier: Apache-2.0
"""Failures as node agents hand them to each other: what travels, which came first, and the report."""

from __future__ import annotations

import time

import pytest

from dynamo_mpi.common.failure import DetectedBy, Failure
from dynamo_mpi.supervisor.agent_failures import (
    Report,
    Seen,
    describe_seen,
    pack_report,
    pack_seen,
    read_report,
    read_seen,
    sorted_seen,
)


def seen(rank: int, at: float, text: str = "died: its process ended without a word", **more: object) -> Seen:
    fields = {"cause": DetectedBy.DISCONNECT, "phase": "serve", **more}
    return Seen(Failure(rank, 70, text, at=time.monotonic() + at, **fields), f"n{rank}")  # type: ignore[arg-type]


def test_a_failure_travels_in_a_line_with_its_age() -> None:
    one = seen(3, -5.0, "is lost\n  do:     look", cause=DetectedBy.HOST_UNREACHABLE)
    line = pack_seen(one)
    assert "\n" not in line
    again = read_seen(line)
    assert again is not None
    assert again.failure._replace(at=0.0) == one.failure._replace(at=0.0)
    assert again.host == "n3"
    assert abs(again.failure.at - one.failure.at) < 1


@pytest.mark.parametrize("text", ["", "[1]", "{}", "3", '{"rank": "x"}'])
def test_what_is_no_failure_is_none(text: str) -> None:
    assert read_seen(text) is None
    assert read_report(text) is None


def test_a_report_travels_whole() -> None:
    report = Report(seen(1, -1).failure, "n1", "error in serve: died\n  needed: all", (seen(0, -0.5),), 0, "n0")
    line = pack_report(report)
    assert "\n" not in line
    again = read_report(line)
    assert again is not None
    assert (again.text, again.host, again.speaker, again.speaker_host) == (report.text, "n1", 0, "n0")
    assert [each.failure.rank for each in again.later] == [0]


def test_the_death_that_happened_first_is_the_cause_whichever_was_heard_of_first() -> None:
    # Open MPI ends rank 0 because the connection to rank 1 has closed, and its own agent sees that before it hears of rank 1
    heard = [seen(0, -0.01), seen(1, -0.02), seen(1, -0.001)]
    report = describe_seen(sorted_seen(heard), "drain")
    assert (report.failure.rank, report.host, report.speaker) == (1, "n1", 1)
    assert report.text.startswith("error in drain: died: ")
    assert "what followed from it:\n    rank 0 on n0, 0.01 s later: died" in report.text
    assert [each.failure.rank for each in report.later] == [0]


def test_what_a_rank_says_of_itself_counts_before_its_end() -> None:
    heard = [seen(2, -0.02, "Traceback\nValueError: no", cause=DetectedBy.REPORT), seen(2, -0.01)]
    report = describe_seen(sorted_seen(heard), "")
    assert report.text == "error in serve: Traceback\nValueError: no"
    assert report.later == ()
