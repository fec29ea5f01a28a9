# SPDX-License-Identifier: Apache-2.0
"""W3C's traceparent, as the specification has it."""

from __future__ import annotations

import pytest

from dynamo_mpi.common.trace_context import invalid_reason, trace_of

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"


def test_a_trace_is_read() -> None:
    trace = trace_of({"TRACEPARENT": GOOD, "TRACESTATE": "a=1,b=2"})
    assert trace == (GOOD, TRACE, SPAN, 1, "a=1,b=2")
    assert invalid_reason({"TRACEPARENT": GOOD}) == ""


@pytest.mark.parametrize("text", ["", "  "])
def test_none_is_no_error(text: str) -> None:
    assert trace_of({"TRACEPARENT": text, "TRACESTATE": "a=1"}) is None
    assert invalid_reason({"TRACEPARENT": text}) == ""
    assert invalid_reason({}) == ""


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    trace = trace_of({"TRACEPARENT": f"01-{TRACE}-{SPAN}-03-what-comes"})
    assert trace is not None
    assert (trace.trace_id, trace.flags) == (TRACE, 3)


@pytest.mark.parametrize(
    "text",
    [
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"01-{TRACE}-{SPAN}-01more",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"0-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"00_{TRACE}-{SPAN}-01",
        "nonsense",
    ],
)
def test_what_is_none_is_ignored_with_a_word(text: str) -> None:
    assert trace_of({"TRACEPARENT": text}) is None
    assert invalid_reason({"TRACEPARENT": text}).startswith(f"TRACEPARENT is '{text}', which names no trace")
