# SPDX-License-Identifier: Apache-2.0
"""The end of the job's time, and how often a worker was started: what launchers say in variables."""

from __future__ import annotations

import queue
import time

import pytest

from dynamo_mpi.mpi.job_time_limit import JobTimeLimit, schedule_drain
from dynamo_mpi.mpi.launcher import restart_count

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("text", ["", "0", "tomorrow", "-5", "12.5", "UNLIMITED", "9" * 30, "١٢٣"])
def test_what_slurm_would_not_say_is_no_limit(text: str) -> None:
    assert JobTimeLimit.of({"SLURM_JOB_END_TIME": text}) is None
    assert JobTimeLimit.of({}) is None


def test_an_end_begins_so_early_that_it_is_over_in_time() -> None:
    limit = JobTimeLimit.of({"SLURM_JOB_END_TIME": "1800000000"})
    assert limit is not None
    assert limit.pause(60, 1799999900) == 40
    assert limit.pause(100, 1799999900) is None
    assert "in 60 s: ending in order" in limit.due(1799999940)
    text = limit.too_late(60, 1799999990)
    assert "SLURM_JOB_END_TIME), in 10 s" in text
    assert "may take 60 s" in text


def test_it_is_called_in_time_once_and_not_when_it_was_called_off() -> None:
    said: list[str] = []
    calls: queue.SimpleQueue[str] = queue.SimpleQueue()
    environ = {"SLURM_JOB_END_TIME": str(int(time.time()) + 63)}
    schedule_drain(environ, 60, lambda _: calls.put("called off"), said.append)()
    schedule_drain(environ, 60, calls.put, said.append)
    assert "the job's time ends at " in calls.get(timeout=20)
    assert time.time() <= int(environ["SLURM_JOB_END_TIME"]) - 58
    with pytest.raises(queue.Empty):
        calls.get(timeout=0.5)
    assert said == []


def test_where_it_is_too_late_there_is_a_warning_and_no_end() -> None:
    said: list[str] = []
    calls: list[str] = []
    schedule_drain({"SLURM_JOB_END_TIME": str(int(time.time()) + 10)}, 60, calls.append, said.append)()
    schedule_drain({}, 60, calls.append, said.append)()
    (line,) = said
    assert line.startswith("the job's time ends at ")
    assert calls == []


@pytest.mark.parametrize(
    ("environ", "attempt"),
    [
        ({}, 1),
        ({"DYN_MPI_ATTEMPT": "3"}, 3),
        ({"SLURM_RESTART_COUNT": "2"}, 3),
        ({"DYN_MPI_ATTEMPT": "2", "SLURM_RESTART_COUNT": "1"}, 3),
        ({"DYN_MPI_ATTEMPT": "0", "SLURM_RESTART_COUNT": "-1"}, 1),
        ({"DYN_MPI_ATTEMPT": "often", "SLURM_RESTART_COUNT": "9" * 40}, 1),
    ],
)
def test_every_start_counts(environ: dict[str, str], attempt: int) -> None:
    assert restart_count(environ) == attempt
