# SPDX-License-Identifier: Apache-2.0
"""Failures as node agents hand them to each other: what travels, which came first, and the report."""

from __future__ import annotations

import time

import pytest

from dynamo_mpi.common.failure import OPEN_MPI_ABORT, DetectedBy, Failure
from dynamo_mpi.mpi.launcher import MPICH_LAUNCHERS, Launcher
from dynamo_mpi.supervisor.agent_failures import (
    ObservedFailure,
    Report,
    compose_report,
    decode_observed,
    decode_report,
    encode_observed,
    encode_report,
    first_of_each_rank,
)
from dynamo_mpi.supervisor.failure_reports import rank_died, rank_ended


def seen(
    rank: int, at: float, text: str = "died: its process exited without reporting an error", **more: object
) -> ObservedFailure:
    fields = {"cause": DetectedBy.DISCONNECT, "phase": "serve", **more}
    return ObservedFailure(Failure(rank, 70, text, at=time.monotonic() + at, **fields), f"n{rank}")  # type: ignore[arg-type]


def test_a_failure_travels_in_a_line_with_its_age() -> None:
    one = seen(3, -5.0, "is lost\n  fix:      look", cause=DetectedBy.HOST_UNREACHABLE)
    line = encode_observed(one)
    assert "\n" not in line
    again = decode_observed(line)
    assert again is not None
    assert again.failure._replace(at=0.0) == one.failure._replace(at=0.0)
    assert again.host == "n3"
    assert abs(again.failure.at - one.failure.at) < 1


@pytest.mark.parametrize("text", ["", "[1]", "{}", "3", '{"rank": "x"}'])
def test_what_is_no_failure_is_none(text: str) -> None:
    assert decode_observed(text) is None
    assert decode_report(text) is None


def test_a_report_travels_whole() -> None:
    report = Report(seen(1, -1).failure, "n1", "error in serve: died\n  expected: all", (seen(0, -0.5),), 0, "n0")
    line = encode_report(report)
    assert "\n" not in line
    again = decode_report(line)
    assert again is not None
    assert (again.text, again.host, again.reporter, again.reporter_host) == (report.text, "n1", 0, "n0")
    assert [each.failure.rank for each in again.consequences] == [0]


def test_the_death_that_happened_first_is_the_cause_whichever_was_heard_of_first() -> None:
    # Open MPI ends rank 0 because the connection to rank 1 has closed, and its own agent sees that before it hears of rank 1
    heard = [seen(0, -0.01), seen(1, -0.02), seen(1, -0.001)]
    report = compose_report(first_of_each_rank(heard), "drain")
    assert (report.failure.rank, report.host, report.reporter) == (1, "n1", 1)
    assert report.text.startswith("error in drain: died: ")
    assert "what followed from it:\n    rank 0 on n0, 0.01 s later: died" in report.text
    assert [each.failure.rank for each in report.consequences] == [0]


@pytest.mark.parametrize(
    ("world", "own", "named"),
    [
        ("preflight", "load", "load"),
        ("preflight", "mpi_init", "preflight"),
        ("drain", "serve", "drain"),
        ("load", "serve", "load"),
        ("", "mpi_init", "mpi_init"),
    ],
)
def test_a_report_names_rank_0s_phase_but_no_preflight_after_its_result(world: str, own: str, named: str) -> None:
    assert compose_report([seen(1, -0.01, phase=own)], world).text.startswith(f"error in {named}: died")


def test_a_rank_that_open_mpi_ended_is_a_consequence_of_a_death_that_was_heard_of_later() -> None:
    text = str(rank_ended("n0", "serve", OPEN_MPI_ABORT, Launcher.SLURM_PMIX))
    heard = [seen(0, -0.02, text), seen(1, -0.01)]
    report = compose_report(first_of_each_rank(heard), "serve")
    assert (report.failure.rank, [each.failure.rank for each in report.consequences]) == (1, [0])
    # where nothing else is known, it is what there is to report
    alone = compose_report(first_of_each_rank(heard[:1]), "serve")
    assert (alone.failure.rank, "Open MPI ended it" in alone.text) == (0, True)


@pytest.mark.parametrize(
    ("phase", "status", "launcher"),
    [
        ("serve", None, Launcher.OPEN_MPI),
        ("serve", 9, Launcher.OPEN_MPI),
        ("serve", 0, Launcher.OPEN_MPI),
        ("mpi_init", OPEN_MPI_ABORT, Launcher.OPEN_MPI),
        # a rank's own exit code: MPICH has no such code
        *(("serve", OPEN_MPI_ABORT, launcher) for launcher in MPICH_LAUNCHERS),
    ],
)
def test_other_ends_are_deaths_without_a_report(phase: str, status: int | None, launcher: Launcher) -> None:
    assert str(rank_ended("n0", phase, status, launcher)) == str(rank_died("n0", phase))


def test_under_mpich_a_rank_that_exits_with_open_mpis_code_is_the_cause() -> None:
    text = str(rank_ended("n0", "serve", OPEN_MPI_ABORT, Launcher.HYDRA))
    report = compose_report(first_of_each_rank([seen(0, -0.02, text), seen(1, -0.01)]), "serve")
    assert (report.failure.rank, [each.failure.rank for each in report.consequences]) == (0, [1])


def test_a_death_may_be_for_lack_of_memory_or_of_tensorrt_llms_making() -> None:
    fix = rank_died("n0").fix
    assert "may mean out of memory: check dmesg on n0. TensorRT-LLM also kills all ranks" in fix


def test_what_a_rank_says_of_itself_counts_before_its_end() -> None:
    heard = [seen(2, -0.02, "Traceback\nValueError: no", cause=DetectedBy.REPORT), seen(2, -0.01)]
    report = compose_report(first_of_each_rank(heard), "")
    assert report.text == "error in serve: Traceback\nValueError: no"
    assert report.consequences == ()
