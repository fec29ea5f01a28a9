# SPDX-License-Identifier: Apache-2.0
"""What probes answer, by what a rank has reported."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common.phases import PHASES
from dynamo_mpi.telemetry.health_state import HealthState, escape, health, live, note, unescape

FRESH = HealthState(0, "n1", 7, 1000.0, 50.0, since=1000.0, last_seen=50.0)


def after(*lines: str, at: float = 60.0) -> HealthState:
    state = FRESH
    for line in lines:
        state = note(state, line, at, 1010.0)
    return state


@given(st.text())
def test_any_text_goes_on_one_line(text: str) -> None:
    assert "\n" not in escape(text)
    assert unescape(escape(text)) == text


@given(st.text(), st.sampled_from(["", "phase ", "runtime ", "ending ", "rank ", "metrics ", "world "]))
def test_nonsense_is_a_sign_of_life_and_no_more(text: str, word: str) -> None:
    state = note(FRESH, word + text, 61.0, 1.0)
    assert state.last_seen == 61.0
    assert health(state, 61.0).status in (200, 503)


@pytest.mark.parametrize("phase", PHASES)
def test_only_a_world_that_serves_is_healthy_and_every_one_lives(phase: str) -> None:
    state = after(f"phase {phase}")
    assert health(state, 60.0).status == (200 if phase == "serve" else 503)
    assert live(state, 60.0).status == 200
    assert ("waits_for" in health(state, 60.0).body) == (phase != "serve")


def test_what_rank_0_says_of_the_world_counts_for_more_than_this_rank() -> None:
    state = after("phase serve", "world load")
    answer = health(state, 60.0)
    assert (answer.status, answer.body["phase"], answer.body["rank_phase"]) == (503, "load", "serve")
    assert answer.body["error"] == "the world is in load"


def test_a_phase_has_a_beginning_and_progress_of_its_own() -> None:
    state = note(after("phase load", f"progress {escape('1 of 2')}"), "beat", 70.0, 1020.0)
    assert (state.since, health(state, 70.0).body["waits_for"]) == (1010.0, "all ranks to load the model: 1 of 2")
    state = note(state, "phase warmup", 71.0, 1021.0)
    assert (state.since, state.progress) == (1021.0, "")


def test_the_first_reason_for_the_end_stays() -> None:
    assert live(after("phase serve", "ending"), 60.0).body["error"] == "the world ends"
    # what ends it is known a little later than that it ends
    state = after("phase serve", "ending", f"ending {escape('rank 2 died: 1')}", "ending", "ending so are others")
    assert (live(state, 60.0).status, health(state, 60.0).body["error"]) == (503, "rank 2 died: 1")


@pytest.mark.parametrize(
    ("phase", "timeout", "silent", "status"),
    [
        ("load", None, 299.0, 200),
        ("load", None, 301.0, 503),
        ("serve", None, 59.0, 200),
        ("serve", None, 61.0, 503),
        ("load", 5.0, 6.0, 503),
        ("load", 0.0, 1e6, 200),
    ],
)
def test_a_rank_may_be_silent_for_as_long_as_the_others_would_bear(
    phase: str, timeout: float | None, silent: float, status: int
) -> None:
    state = after(f"phase {phase}")._replace(heartbeat_timeout=timeout)
    assert live(state, 60.0 + silent).status == status


def test_the_body_has_dynamos_shape() -> None:
    body = health(after("phase serve"), 61.25, (200, {"endpoints": {"generate": "ready"}})).body
    assert (body["status"], body["endpoints"]) == ("ready", {"generate": "ready"})
    assert body["uptime"] == {"secs": 11, "nanos": 250_000_000}
    refused = health(after("phase serve", "runtime 21000"), 61.0, (0, {}))
    assert refused.body["error"] == "the Dynamo runtime does not answer at its port 21000"
