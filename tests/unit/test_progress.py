# SPDX-License-Identifier: Apache-2.0
"""How far the ranks are: in words, as facts, as a table, and when."""

from __future__ import annotations

import itertools
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common.log_writer import LogFormat, LogWriter
from dynamo_mpi.common.phases import PhaseProgress, PhaseTracker, RankTimings, Span
from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.config.worker import load_settings
from dynamo_mpi.supervisor.progress import ProgressTracker
from dynamo_mpi.telemetry.progress import (
    ProgressReporter,
    Terminal,
    describe,
    facts,
    intervals,
    select_mode,
    size,
    table,
)
from tests.contexts import rank_context

LOAD = PhaseProgress("load", 11, 16, 13, "n03", 142.4)


def test_the_line() -> None:
    assert describe(LOAD, parts_seen=True) == "load 11/16 ranks, slowest n03 (rank 13) 142 s"
    loading = LOAD._replace(read=310_000_000_000, slowest_read=4_100_000_000)
    assert describe(loading, parts_seen=True) == (
        "load 11/16 ranks, slowest n03 (rank 13) 142 s, 4.1 GB of 310.0 GB read"
    )
    assert describe(loading._replace(done=16), parts_seen=True) == "load 16/16 ranks, slowest n03 (rank 13) 142 s"


def test_what_is_not_seen_is_not_claimed() -> None:
    loading = LOAD._replace(done=0, read=310_000_000_000, slowest_read=4_100_000_000)
    assert describe(loading, parts_seen=False) == (
        "load 142 s, 16 ranks have read 310.0 GB, the least n03 (rank 13): 4.1 GB"
    )
    assert "/16" not in describe(LOAD, parts_seen=False)
    assert describe(PhaseProgress("load", 0, 2, None, None, 0.0), parts_seen=True) == "load: no rank has reported yet"


def test_facts_are_what_is_known() -> None:
    assert facts(LOAD) == {
        "phase": "load",
        "done": 11,
        "ranks": 16,
        "slowest_rank": 13,
        "slowest_host": "n03",
        "seconds": 142.4,
    }
    assert facts(LOAD._replace(read=0, slowest_read=0))["read_bytes"] == 0


@pytest.mark.parametrize(
    ("first", "most", "gaps"),
    [(10.0, 300.0, [10, 20, 40, 80, 160, 300, 300]), (0.0, 300.0, [0.1, 0.2, 0.4]), (600.0, 300.0, [300, 300])],
)
def test_intervals_grow(first: float, most: float, gaps: list[float]) -> None:
    assert list(itertools.islice(intervals(first, most), len(gaps))) == gaps


def test_sizes_are_readable() -> None:
    assert [size(0), size(1_234_567), size(123_456_789), size(10**12)] == ["0.0 MB", "1.2 MB", "0.1 GB", "1000.0 GB"]


def rank(number: int, seconds: float | None, *, each: int = 4, read: int | None = None) -> RankTimings:
    """Return a rank that has loaded for ``seconds``, or still does, for 50."""
    return RankTimings(number, f"n{number // each:02}", 100.0, (Span("load", 0.0, local=seconds),), read)


def test_the_table_has_a_line_for_each_node() -> None:
    ranks = [rank(number, None if number in (5, 7) else 9.0 + number, read=10**9 * (number + 1)) for number in range(8)]
    assert table("load", ranks, 150.0, Terminal(80, 24), parts_seen=True) == [
        "load  ranks  slowest  seconds     read",
        "n00     4/4   rank 3     12 s  10.0 GB",
        "n01     2/4   rank 5     50 s  26.0 GB",
    ]
    assert table("load", ranks, 150.0, Terminal(80, 24), parts_seen=False)[1].split()[:2] == ["n00", "4"]


def test_a_small_terminal_has_those_that_are_behind() -> None:
    ranks = [rank(number, None if number == 31 else 5.0) for number in range(40)]
    lines = table("load", ranks, 150.0, Terminal(30, 6), parts_seen=True)
    assert [line.split()[0] for line in lines] == ["load", "n07", "n00", "and"]
    assert lines[-1] == "and 8 more nodes, 32/32 ranks"


@given(
    st.lists(st.none() | st.floats(0, 1e6), min_size=1, max_size=60),
    st.integers(1, 200),
    st.integers(1, 60),
    st.integers(1, 8),
    st.booleans(),
)
def test_a_table_keeps_to_the_terminal(
    loads: list[float | None], width: int, height: int, each: int, parts_seen: bool
) -> None:
    ranks = [rank(number, seconds, each=each) for number, seconds in enumerate(loads)]
    lines = table("load", ranks, 150.0, Terminal(width, height), parts_seen=parts_seen)
    assert all(len(line) <= max(1, width - 1) for line in lines)
    assert 2 <= len(lines) <= max(3, height - 2)


def test_auto_draws_on_terminals_only() -> None:
    assert select_mode("auto", is_terminal=True, jsonl=False) == "live"
    assert select_mode("auto", is_terminal=False, jsonl=False) == "plain"
    assert select_mode("auto", is_terminal=True, jsonl=True) == "plain"
    assert select_mode("live", is_terminal=False, jsonl=False) == "plain"
    assert select_mode("plain", is_terminal=True, jsonl=False) == "plain"
    assert select_mode("off", is_terminal=True, jsonl=False) == "off"


def ticker_of(
    tracker: ProgressTracker,
    phases: PhaseTracker,
    on_progress: Callable[[PhaseProgress], object],
    mode: str,
    first: float,
) -> ProgressReporter:
    settings = load_settings(
        WorkerSources(
            ["--model", ".", "--engine", "reference", "--progress", mode, "--progress-interval", f"{first}"], {}
        )
    )
    ticker = ProgressReporter(rank_context(phases), tracker, settings, on_progress)
    phases.on_phase(ticker.on_phase)
    return ticker


def _wait_for(condition: object, seconds: float = 10.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_lines_come_while_it_loads_and_none_once_it_serves(capfd: pytest.CaptureFixture[str]) -> None:
    phases = PhaseTracker()
    phases.begin("preflight")
    heard: list[PhaseProgress] = []
    ticker = ticker_of(ProgressTracker(["n0", "n1"], phases), phases, heard.append, "plain", 0.1)
    ticker.start()
    phases.begin("load")
    _wait_for(lambda: len(heard) >= 2)
    phases.begin("serve")
    ticker._thread.join(5)
    assert not ticker._thread.is_alive()
    said = capfd.readouterr().err.splitlines()
    assert len(said) == len(heard)
    # rank 1 has reported nothing, so it is the one that is waited for
    assert all(
        re.fullmatch(r"dynamo_mpi: rank 0 on n0: load 0/2 ranks, slowest n1 \(rank 1\) \d+ s", line) for line in said
    )


def test_a_quick_phase_says_nothing_and_off_is_off(capfd: pytest.CaptureFixture[str]) -> None:
    phases = PhaseTracker()
    heard: list[PhaseProgress] = []
    ticker = ticker_of(ProgressTracker(["n0"], phases), phases, heard.append, "off", 0.1)
    ticker.start()
    phases.begin("load")
    _wait_for(lambda: heard)
    ticker.close()
    ticker._thread.join(5)
    quick = ticker_of(ProgressTracker(["n0"], phases), phases, heard.append, "plain", 300.0)
    quick.start()
    phases.begin("serve")
    quick._thread.join(5)
    assert not quick._thread.is_alive()
    assert capfd.readouterr().err == ""


PROGRAM = """
from dynamo_mpi.common.log_record import Level
from dynamo_mpi.common.log_writer import log_writer
log_writer.set_status_lines(["a table", "of two lines"])
log_writer.emit(0, "n1", "in between", Level.INFO)
log_writer.write_raw(b"somebody else\\n")
log_writer.set_status_lines(["one line"])
log_writer.write_raw(b"half ")
log_writer.write_raw(b"a line\\n")
log_writer.set_status_lines([])
log_writer.emit(0, "n1", "end", Level.INFO)
"""


class Screen:
    """A terminal of the few sequences that we use."""

    def __init__(self, width: int) -> None:
        self.lines, self.row, self.column, self.width = [""], 0, 0, width

    def feed(self, text: str) -> None:
        for part in re.findall(r"\x1b\[\d*[A-Z]|[^\x1b]", text):
            if part.startswith("\x1b"):
                self._handle_sequence(part)
            elif part == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif part == "\r":
                self.column = 0
            else:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + part + line[self.column + 1 :]
                self.column += 1

    def _handle_sequence(self, part: str) -> None:
        if part.endswith("A"):
            self.row -= int(part[2:-1])
            assert self.row >= 0
        else:
            assert part == "\x1b[J"
            self.lines = [*self.lines[: self.row], self.lines[self.row][: self.column]]


def test_lines_and_what_is_drawn_do_not_mix() -> None:
    ours, its = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=its, cwd=Path(__file__).parents[2]) as process:
        os.close(its)
        data = b""
        while True:
            try:
                data += os.read(ours, 65536)
            except OSError:
                break
        assert process.wait(20) == 0
    os.close(ours)
    screen = Screen(80)
    screen.feed(data.decode())
    assert [line for line in screen.lines if line] == [
        "dynamo_mpi: rank 0 on n1: in between",
        "somebody else",
        "half a line",
        "dynamo_mpi: rank 0 on n1: end",
    ]


def test_nothing_is_drawn_where_nothing_was_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    log_writer = LogWriter(LogFormat())
    log_writer.set_status_lines(())
    log_writer.write_raw(b"x\n")
    assert capfd.readouterr().err == "x\n"
