# SPDX-License-Identifier: Apache-2.0
"""A rank that could not load, and others that don't come to hear of it."""

from __future__ import annotations

import threading

import pytest

from dynamo_mpi.runtime import follower
from dynamo_mpi.runtime.follower import abort_if_late


def test_a_failure_without_a_reader_ends_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "_AGREEMENT_SECONDS", 0.01)
    ended: list[Exception] = []
    done = threading.Event()

    def fail(error: Exception) -> None:
        ended.append(error)
        done.set()

    error = MemoryError("no room")
    with abort_if_late(error, fail):
        assert done.wait(10)
    assert ended == [error]


def test_what_is_agreed_on_in_time_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[threading.Timer] = []

    class Watched(threading.Timer):
        def start(self) -> None:
            timers.append(self)
            super().start()

    monkeypatch.setattr(threading, "Timer", Watched)
    ended: list[Exception] = []
    with abort_if_late(None, ended.append):
        assert timers == []
    with abort_if_late(MemoryError("no room"), ended.append):
        (timer,) = timers
        assert timer.is_alive()
    timer.join(10)
    assert not timer.is_alive()
    assert ended == []
