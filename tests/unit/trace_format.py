# SPDX-License-Identifier: Apache-2.0
"""What Chrome's trace event format asks for, as far as complete events, instants and names go."""

from __future__ import annotations

import json
from typing import Any


def check_trace(found: dict[str, Any]) -> None:
    """Check what Chrome's trace event format asks for."""
    events = found["traceEvents"]
    named: dict[str, set[Any]] = {"process_name": set(), "thread_name": set()}
    used: set[tuple[int, int]] = set()
    before = 0
    for event in events:
        assert isinstance(event["name"], str)
        assert all(type(event[name]) is int and event[name] >= 0 for name in ("pid", "tid", "ts"))
        assert isinstance(event["args"], dict)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name", "thread_sort_index")
            where = event["pid"] if event["name"].startswith("process") else (event["pid"], event["tid"])
            if event["name"] in named:
                assert event["args"]["name"]
                assert where not in named[event["name"]]
                named[event["name"]].add(where)
            continue
        assert event["ts"] >= before
        before = event["ts"]
        used.add((event["pid"], event["tid"]))
        if event["ph"] == "X":
            assert type(event["dur"]) is int
            assert event["dur"] >= 0
        else:
            assert (event["ph"], event["s"] in ("g", "p", "t")) == ("i", True)
    assert used <= named["thread_name"]
    assert {process for process, _ in used} <= named["process_name"]
    # what lies within another ends within it
    open_until: dict[tuple[int, int], list[int]] = {}
    for event in events:
        if event["ph"] == "X":
            stack = open_until.setdefault((event["pid"], event["tid"]), [])
            while stack and stack[-1] <= event["ts"]:
                stack.pop()
            assert not stack or event["ts"] + event["dur"] <= stack[-1]
            stack.append(event["ts"] + event["dur"])
    json.dumps(found, allow_nan=False)
