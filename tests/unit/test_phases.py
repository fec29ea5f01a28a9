# SPDX-License-Identifier: Apache-2.0
"""Phases, and how a rank logs."""

from __future__ import annotations

import os
import threading
import time

import pytest

from dynamo_mpi.common.log import RankLogger
from dynamo_mpi.common.phases import PHASES, PhaseTracker


def test_phases_stand_in_the_order_of_a_life() -> None:
    assert PHASES == (
        "environment",
        "mpi_init",
        "preflight",
        "hardware_check",
        "stage",
        "load",
        "warmup",
        "register",
        "serve",
        "drain",
        "exit",
    )


def test_a_phase_is_current_until_the_next_begins_and_its_duration_is_kept() -> None:
    phases = PhaseTracker()
    assert phases.current == "environment"
    start = time.monotonic()
    with phases.enter("load"):
        assert phases.current == "load"
        assert phases.durations == {}
        threading.Event().wait(0.01)
    spent = time.monotonic() - start
    assert phases.current == "load"
    assert 0.01 <= phases.durations["load"] <= spent
    assert phases.age >= spent


def test_a_phase_that_fails_stays_current_and_is_timed() -> None:
    phases = PhaseTracker()
    with pytest.raises(KeyError), phases.enter("warmup"):
        raise KeyError
    assert phases.current == "warmup"
    assert list(phases.durations) == ["warmup"]


def test_an_unknown_phase_is_refused() -> None:
    phases = PhaseTracker()
    with pytest.raises(ValueError, match="'lunch'"), phases.enter("lunch"):
        pytest.fail("entered")
    assert phases.current == "environment"


def test_a_log_line_names_rank_and_host_once(capfd: pytest.CaptureFixture[str]) -> None:
    RankLogger(3, "n1").info("two\nlines")
    assert capfd.readouterr().err == "dynamo_mpi: rank 3 on n1: two\nlines\n"


def test_what_is_no_utf_8_can_be_logged(capfd: pytest.CaptureFixture[str]) -> None:
    RankLogger(0, "n1").info("file \udcff …")
    assert capfd.readouterr().err == "dynamo_mpi: rank 0 on n1: file ? …\n"


def test_a_log_writer_without_a_reader_does_not_fail() -> None:
    reading, writing = os.pipe()
    saved = os.dup(2)
    try:
        os.dup2(writing, 2)
        os.close(reading)
        RankLogger(0, "n1").info("into the void")
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(writing)
