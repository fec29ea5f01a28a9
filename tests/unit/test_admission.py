# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common.admission import REQUEST_SECONDS, Admission, Throttle


def test_the_oldest_silent_connection_is_displaced() -> None:
    admission: Admission[str] = Admission(2, seconds=5)
    assert admission.enter("a", "10.0.0.1", 0.0) == []
    assert admission.enter("b", "10.0.0.1", 0.1) == []
    assert admission.enter("c", "10.0.0.1", 0.2) == ["a"]
    assert "a" not in admission
    assert len(admission) == 2


def test_a_request_that_has_begun_is_kept_for_a_while() -> None:
    admission: Admission[str] = Admission(2, seconds=5)
    for key in "ab":
        admission.enter(key, "10.0.0.1", 0.0)
    admission.begin_request("a", 0.0)
    assert admission.enter("c", "10.0.0.1", 0.1) == ["b"]
    admission.begin_request("c", 0.1)
    # all others are at work: the newest waits outside
    assert admission.enter("d", "10.0.0.1", 0.2) == ["d"]
    assert admission.enter("e", "10.0.0.1", REQUEST_SECONDS) == ["a"]


def test_a_flood_displaces_itself_and_no_other_address() -> None:
    admission: Admission[int] = Admission(8, seconds=5)
    admission.enter(-1, "10.0.0.2", 0.0)
    for number in range(1000):
        assert -1 not in admission.enter(number, "10.0.0.1", 0.001 * number)
    assert -1 in admission


def test_connections_that_took_too_long_expire() -> None:
    admission: Admission[str] = Admission(8, seconds=5)
    admission.enter("a", "10.0.0.1", 0.0)
    admission.enter("b", "10.0.0.1", 1.0)
    admission.begin_request("a", 0.0)
    assert admission.expired(5.5) == ["a"]
    assert "b" in admission


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("xyz"), st.booleans()), max_size=120), st.integers(1, 6))
def test_no_sequence_exceeds_the_places_or_loses_count(steps: list[tuple[int, str, bool]], places: int) -> None:
    admission: Admission[int] = Admission(places, seconds=10)
    alive: set[int] = set()
    for now, (key, address, begins) in enumerate(steps):
        if key in alive:
            admission.leave(key)
            alive.discard(key)
            continue
        alive.add(key)
        alive -= set(admission.enter(key, address, now / 4))
        if begins:
            admission.begin_request(key, now / 4)
        alive -= set(admission.expired(now / 4))
        assert len(admission) == len(alive) <= places
        assert all(key in admission for key in alive)


def test_a_message_is_logged_once_in_a_while_with_a_count() -> None:
    throttle = Throttle(seconds=10)
    assert throttle.permit(0.0) == 0
    assert throttle.permit(1.0) is None
    assert throttle.permit(2.0) is None
    assert throttle.permit(10.0) == 2
