# SPDX-License-Identifier: Apache-2.0
"""Where threads are, and how many ranks' answers become one report."""

from __future__ import annotations

import threading

import pytest

from dynamo_mpi.supervisor import stacks as stacks_module
from dynamo_mpi.supervisor.stacks import describe_stacks, dump_stacks


def test_the_innermost_frames_of_every_thread_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    # earlier tests of this process may have left some
    monkeypatch.setattr(stacks_module, "_THREADS", 1000)
    monkeypatch.setattr(stacks_module, "activity", str)
    release = threading.Event()

    def stuck_in_a_collective(started: threading.Event) -> None:
        started.set()
        release.wait()

    for name in ("engine", "watch"):
        started = threading.Event()
        threading.Thread(target=stuck_in_a_collective, args=(started,), name=name, daemon=True).start()
        started.wait()
    text = dump_stacks()
    release.set()
    assert text.startswith("thread MainThread:")
    assert "thread engine:" in text
    assert "in stuck_in_a_collective" in text
    assert "thread watch" not in text


def test_ranks_at_the_same_place_are_reported_together_and_the_odd_ones_first() -> None:
    stacks = dict.fromkeys(range(8), "in barrier")
    stacks[5] = "in open"
    del stacks[6]
    text = describe_stacks(stacks, [6], lambda ranks: "ranks " + ",".join(map(str, ranks)))
    assert text.splitlines() == [
        "ranks 6: no answer; Python is blocked there in native code, or the process is stopped or gone",
        "ranks 5:",
        "  in open",
        "ranks 0,1,2,3,4,7:",
        "  in barrier",
    ]
