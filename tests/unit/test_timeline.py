# SPDX-License-Identifier: Apache-2.0
"""A start as data, in words, as a page, as a trace and as text."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common.errors import ConfigFileError, UsageError
from dynamo_mpi.common.phases import PHASES, PROCESS_START, RankTimings, Span
from dynamo_mpi.telemetry.startup_summary import (
    Scale,
    describe_phases,
    describe_worker,
    format_seconds,
    headline,
    scale_for,
    summarize_phases,
)
from dynamo_mpi.telemetry.startup_trace import (
    FAILED,
    STOPPED,
    StartupTrace,
    align,
    decode_traces,
    encode_traces,
    printable,
    read_traces,
    rows_of,
)
from dynamo_mpi.telemetry.timeline_page import page
from dynamo_mpi.telemetry.timeline_text import perfetto_trace, text
from dynamo_mpi.telemetry.trace_writer import perfetto_path, write_timeline
from tests.unit.timelines import BEGAN, HOSTILE, failure_mark, services, skewed, start_of
from tests.unit.trace_format import check_trace

MOST_BYTES = 1_000_000
TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "section", "p", "ul", "li", "i", "div", "script"}
TAGS |= {"svg", "defs", "pattern", "g", "rect", "path", "text", "table", "caption", "thead", "tbody", "tr", "th", "td"}


def rounded(start: StartupTrace) -> StartupTrace:
    """Return a start as JSON keeps it."""
    (found,) = decode_traces(json.dumps(encode_traces([start])))
    return found


def words_of(start: StartupTrace) -> list[str]:
    rows = rows_of(start, start.origin)
    return describe_phases(start, summarize_phases(rows), rows)


@pytest.mark.parametrize("start", [start_of(16), start_of(16, failed=3), skewed(), services()], ids=str)
def test_a_start_is_read_back_from_page_and_trace(tmp_path: Path, start: StartupTrace) -> None:
    path = tmp_path / "deep" / "start.html"
    write_timeline(path, [start, start])
    assert read_traces(path) == read_traces(perfetto_path(path)) == (rounded(start), rounded(start))
    assert path.stat().st_mode & 0o077 == 0
    assert sorted(found.name for found in path.parent.iterdir()) == ["start.html", "start.trace.json"]


def content(**changes: Any) -> str:
    whole = encode_traces([start_of(1, 1)])
    whole["workers"][0] |= changes
    return json.dumps(whole)


@pytest.mark.parametrize(
    "data",
    [
        "",
        "[]",
        "{}",
        "<html></html>",
        '{"schema": 2, "workers": []}',
        '{"schema": true, "workers": []}',
        '{"schema": 1, "workers": []}',
        '{"schema": 1, "workers": [1]}',
        '{"traceEvents": []}',
        '{"traceEvents": [], "dynamo_mpi": 3}',
        content(ranks=None),
        content(ranks=[1]),
        content(ranks=[{"rank": 0, "host": "n", "began": 1e300, "spans": []}]),
        content(ranks=[{"rank": True, "host": "n", "began": 1.0, "spans": []}]),
        content(ranks=[{"rank": 0, "host": "n", "began": 1.0, "spans": [["load", float("nan"), None, None]]}]),
        content(ranks=[{"rank": 0, "host": "n", "began": 1.0, "spans": [["load"]]}]),
        content(ranks=[{"rank": 0, "host": "n\n", "began": 1.0, "spans": []}]),
        content(written="now"),
        content(written=float("inf")),
        content(written=10**400),
        content(model="a\x1b[2Jb"),
        content(layout=3),
        content(failure={}),
        "[" * 100_000,
        b"\xff\xfe".decode("latin-1"),
    ],
)
def test_what_is_no_timeline_is_refused(tmp_path: Path, data: str) -> None:
    path = tmp_path / "start.html"
    path.write_text(data, encoding="utf-8")
    with pytest.raises(ConfigFileError, match="is no timeline"):
        read_traces(path)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_traces(tmp_path / "start.html")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigFileError, match="is no timeline"):
        read_traces(tmp_path / "bytes")


def test_what_a_later_version_adds_is_left_out() -> None:
    whole = encode_traces([start_of(2)])
    whole["new"] = whole["workers"][0]["new"] = whole["workers"][0]["ranks"][0]["new"] = 1
    whole["workers"][0]["ranks"][0]["spans"][0].append("new")
    assert decode_traces(json.dumps(whole)) == (rounded(start_of(2)),)


@pytest.mark.parametrize("reported", [True, False])
def test_the_former_name_of_a_failure_s_member_is_written_and_read(reported: bool) -> None:
    start = replace(start_of(1), failure=replace(failure_mark(0, "n0"), reported=reported))
    plain = encode_traces([start])
    failure = plain["workers"][0]["failure"]
    assert (failure["reported"], failure["told"]) == (reported, reported)
    del failure["reported"]
    (read,) = decode_traces(json.dumps(plain))
    assert read.failure == start.failure


def test_the_slowest_is_named_with_how_late_it_was() -> None:
    start = start_of(16, slow=13)
    (load,) = words_of(start)
    found = re.fullmatch(r"load took 1\d\d s; rank 13 on n001 was the slowest, (\d+\.\d) s after the median", load)
    assert found, load
    own = sorted(span.local or 0.0 for rank in start.ranks for span in rank.spans if span.phase == "load")
    assert float(found[1]) == pytest.approx(own[-1] - (own[7] + own[8]) / 2, abs=0.1)


def test_of_what_ranks_do_together_the_last_to_come_is_named() -> None:
    spans = [(Span("mpi_init", late, None, 10.0 - late), Span("load", 10.0, 1.0, 1.0)) for late in (0.0, 0.1, 6.0)]
    ranks = tuple(RankTimings(rank, f"n{rank}", BEGAN, span) for rank, span in enumerate(spans))
    start = replace(start_of(3), ranks=ranks, written=BEGAN + 11, ready=BEGAN + 11)
    assert words_of(start)[0] == "mpi_init took 10.0 s; rank 2 on n2 came to it last, 5.90 s after the median"


def test_of_staging_nodes_are_compared_as_one_rank_of_each_copies() -> None:
    def staged(first: float, second: float) -> str:
        whole = max(first, second) + 0.1
        parts = (first, 0.0, 0.002, second, 0.0, 0.001)
        ranks = tuple(RankTimings(n, f"n{n // 3}", BEGAN, (Span("stage", 5.0, p, whole),)) for n, p in enumerate(parts))
        return words_of(replace(start_of(6, 3), ranks=ranks, written=BEGAN + 30, ready=BEGAN + 30))[0]

    assert staged(19.1, 19.0) == "stage took 19.2 s; the ranks were about equally fast"
    assert staged(19.0, 9.0) == "stage took 19.1 s; rank 0 on n0 was the slowest, 5.00 s after the median"


def test_ranks_that_are_alike_are_not_blamed() -> None:
    start = start_of(4, slow=99, load=1.0)
    even = tuple(rank._replace(spans=tuple(s._replace(local=None) for s in rank.spans)) for rank in start.ranks)
    assert not [line for line in words_of(replace(start, ranks=even)) if "slowest" in line]


def test_a_failure_and_an_end_are_reported() -> None:
    failed = start_of(16, failed=11)
    assert re.fullmatch(r"failed in load after \d\d\.\d s with exit code 70", headline(failed))
    assert "of 16 ranks, 0 had done their part of load" in words_of(failed)
    stopped = replace(failed, outcome=STOPPED, failure=replace(failure_mark(0, "n0", "stopped by SIGTERM"), rank=None))
    assert headline(stopped).startswith("stopped in load after")
    served = start_of(16, serving=7980.0)
    assert re.fullmatch(r"ready after 1\d\d s; ended in order after 2 h 16 min", headline(served))
    late = replace(served, outcome=FAILED, failure=failure_mark(3, "n0"))
    assert re.fullmatch(r"ready after 1\d\d s; failed in load after 2 h 16 min with exit code 70", headline(late))
    assert (
        describe_worker(served) == "prefill worker (trtllm), tp 16, ep 16, 16 ranks on 2 nodes, job 4711.2, attempt 1"
    )


def test_durations_are_written_as_people_read_them() -> None:
    values = (-1.0, 0.0, 0.0042, 0.9994, 0.9996, 2.414, 24.14, 142.0, 3599.0, 7980.0)
    written = ["0 ms", "0 ms", "4 ms", "999 ms", "1.00 s", "2.41 s", "24.1 s", "142 s", "3599 s", "2 h 13 min"]
    assert [format_seconds(value) for value in values] == written


def test_phases_over_each_other_are_cut_off_and_reported() -> None:
    start = skewed()
    rows = rows_of(start, start.origin)
    for row in rows:
        moments = [moment for bar in row.bars for moment in (bar.begin, bar.own_end, bar.end)]
        assert moments == sorted(moments)
        assert all(moment >= 0 for moment in moments)
    lines = words_of(start)
    assert any("is cut off" in line or "are cut off" in line for line in lines)
    assert "1 rank had reported nothing: 4" in lines
    assert not any("cut off" in line for line in words_of(start_of(16)))


@pytest.mark.parametrize("end", [0.003, 0.07, 0.9, 1.0, 2.6, 7.0, 42.0, 155.0, 700.0, 3600.0, 1e5, 1e7])
def test_ticks_are_round_and_neither_few_nor_many(end: float) -> None:
    ticks = Scale(0.0, 1000.0, end).ticks()
    labels = [label for _, label in ticks]
    assert 3 <= len(ticks) <= 10
    assert len(set(labels)) == len(labels)
    assert ticks[0][0] == 0
    assert ticks[-1][0] <= end
    assert all(float(label.removesuffix(" s").replace(",", "")) == pytest.approx(moment) for moment, label in ticks)


def test_hours_of_serving_leave_the_start_its_room() -> None:
    start = start_of(16, serving=7980.0)
    scale = scale_for([rows_of(start, start.origin)], 0.0, 1000.0)
    assert scale.calm is not None
    first, last = scale.calm
    assert scale.x(first) > 800
    assert scale.x(last) - scale.x(first) == pytest.approx(90)
    assert scale.x(scale.end) == pytest.approx(1000)
    places = [scale.x(scale.end * share / 500) for share in range(501)]
    assert places == sorted(places)
    assert not [moment for moment, _ in scale.ticks() if first < moment < last]
    alone = RankTimings(0, "n0", BEGAN, (Span("serve", 0.0, None, 9.0),))
    assert scale_for([rows_of(replace(start, ranks=(alone,), written=BEGAN + 9), BEGAN)], 0.0, 1.0).calm is None
    fresh = start_of(16)
    assert scale_for([rows_of(fresh, fresh.origin)], 0.0, 1000.0).calm is None


def test_workers_that_started_together_share_one_clock() -> None:
    near, far = start_of(4, name="decode-0", began=BEGAN + 30), start_of(4, name="decode-0", began=BEGAN + 90_000)
    first = start_of(4)
    (_, later), together = align([first, near])
    assert together
    assert min(bar.begin for row in later.rows for bar in row.bars) == pytest.approx(near.origin - first.origin)
    (_, apart), together = align([first, far])
    assert not together
    assert min(bar.begin for row in apart.rows for bar in row.bars) == 0
    assert "time axis of its own" in page([first, far])


class Tags(HTMLParser):
    """Collects what a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.scripts += tag == "script"


def test_no_text_becomes_a_part_of_the_page() -> None:
    start = start_of(4, 2, model=HOSTILE, name=HOSTILE, host="n{}" + HOSTILE, failed=1)
    assert start.failure is not None
    start = replace(start, endpoint=HOSTILE, job=HOSTILE, failure=replace(start.failure, error=HOSTILE, phase=HOSTILE))
    written = page([start, replace(start, role=HOSTILE)])
    seen = Tags()
    seen.feed(written)
    assert seen.tags <= TAGS
    assert not [name for name in seen.attributes if name.startswith("on") or name in ("src", "href")]
    assert seen.scripts == 1
    assert "<script>alert" not in written
    assert html.escape(HOSTILE) in written
    assert "default-src 'none'" in written


def test_a_phase_of_milliseconds_can_be_seen() -> None:
    """16 ms of register in a start of minutes: less than a tenth of a pixel, and the next phase's bar is drawn over it."""
    spans = (Span("load", 0.0, None, 300.0), Span("register", 300.0, None, 0.016), Span("serve", 300.016, None, None))
    start = replace(
        start_of(1), ranks=(RankTimings(0, "n1", BEGAN, spans),), ready=BEGAN + 300.1, written=BEGAN + 301.0
    )
    written = page([start])
    bars = re.findall(r'<rect class="b [^"]*" x="([\d.]+)" width="([\d.]+)"><title>0 n1: (\w+)', written)
    assert [(name, float(width) >= 2) for _, width, name in bars] == [
        ("load", True),
        ("serve", True),
        ("register", True),
    ]


@pytest.mark.parametrize(
    "start", [start_of(3, 3, load=2.5), start_of(512), start_of(512, 1)], ids=["3", "512", "1 a node"]
)
def test_a_page_is_small_and_has_it_all_in_numbers_too(start: StartupTrace) -> None:
    written = page([start])
    assert len(written.encode()) < MOST_BYTES
    table = re.findall(r'<th scope="row">(\w+)</th>', written)
    # this start stages nothing
    assert table == [PROCESS_START, *(phase for phase in PHASES[: PHASES.index("drain")] if phase != "stage")]
    assert not re.findall(r"(?:https?:)?//|@import|url\((?!#h)", re.sub(r"dyn://", "", written))


def test_a_page_of_every_phase_of_512_ranks_is_small() -> None:
    """All of them wide enough to be seen, each with a part that waits."""
    spans = (
        Span(PROCESS_START, -10.0, None, 10.0),
        *(Span(phase, 10.0 * at, 5.123, 10.0) for at, phase in enumerate(PHASES)),
    )
    ranks = tuple(RankTimings(rank, f"node-{rank // 8:04}", BEGAN + rank / 977, spans) for rank in range(512))
    start = replace(start_of(512), ranks=ranks, written=BEGAN + 100, ready=BEGAN + 70)
    written = page([start])
    assert written.count('<rect class="b ') == 512 * (len(PHASES) + 1)
    assert written.count('<rect class="o ') == 512 * len(PHASES)
    # as a megabyte is for the ten phases that a life has without a probe and without staging
    assert len(written.encode()) < MOST_BYTES * 1.2


def test_a_trace_has_a_process_for_each_node_and_a_thread_for_each_rank() -> None:
    found = perfetto_trace(
        [start_of(16, failed=11), start_of(8, name="decode-0", began=BEGAN + 5), skewed(), services()]
    )
    check_trace(found)
    names = {event["args"]["name"] for event in found["traceEvents"] if event["name"] == "process_name"}
    assert {"prefill-0 on n000", "prefill-0 on n001", "decode-0 on n000"} <= names
    loads = [event for event in found["traceEvents"] if event["name"] == "load" and event["args"]["rank"] == 11]
    assert [load["args"].get("goes_on") for load in loads] == [True]
    (failed,) = [event for event in found["traceEvents"] if event["name"] == "failed"]
    assert (failed["tid"], "CUDA out of memory" in failed["args"]["error"]) == (11, True)
    waits = [event for event in found["traceEvents"] if event["name"] == "waits for others" and event["pid"] == 3]
    assert len(waits) >= 7


def test_text_has_a_line_for_each_rank_and_points_at_the_slowest() -> None:
    lines = text([start_of(16, slow=13)], 120).splitlines()
    assert lines[0].startswith("DeepSeek-R1: ready after")
    assert all(len(line) <= 120 for line in lines)
    (line,) = [line for line in lines if "slowest in load" in line]
    assert re.match(r" +13 ", line)
    assert "L" * 60 in line
    assert sum("LLLLL" in line for line in lines) == 16
    failed = text([start_of(16, failed=11)], 80).splitlines()
    assert any(re.match(r" +11 .*< failed", line) for line in failed)
    assert "failed: rank 11 on n001: RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB" in failed


def test_text_that_cannot_be_shown_is_replaced() -> None:
    assert printable("a\tb\n\x1b[31mc\udcff") == "a b \ufffd[31mc\ufffd"
    assert len(printable("x" * 10_000)) == 500


numbers = st.none() | st.floats(-1e7, 1e7)
spans = st.builds(Span, st.sampled_from((PROCESS_START, *PHASES)), st.floats(-1e7, 1e7), numbers, numbers)
ranks = st.lists(st.lists(spans, max_size=6), min_size=1, max_size=4)


@given(spans_of_ranks=ranks, written=st.floats(-1e7, 1e7), ready=numbers)
def test_any_rank_report_can_be_drawn(spans_of_ranks: list[list[Span]], written: float, ready: float | None) -> None:
    start = replace(
        start_of(1),
        ranks=tuple(RankTimings(rank, f"n{rank // 2}", BEGAN, tuple(of)) for rank, of in enumerate(spans_of_ranks)),
        written=BEGAN + written,
        ready=None if ready is None else BEGAN + ready,
    )
    drawn = page([start])
    places = [float(value) for value in re.findall(r' (?:x|width)="(-?[\d.e+-]+)"', drawn)]
    assert all(0 <= value <= 1200 for value in places)
    assert drawn.count('<rect class="b ') == sum(map(len, spans_of_ranks))
    check_trace(perfetto_trace([start]))
    assert text([start], 100)
    assert decode_traces(json.dumps(encode_traces([start])))
