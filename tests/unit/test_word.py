# SPDX-License-Identifier: Apache-2.0
"""Word of a failure reaches all, whatever one of them does, and nobody is waited for longer than agreed."""

from __future__ import annotations

import threading
import time

import pytest

from dynamo_mpi.supervision.failure import Cause, Failure
from dynamo_mpi.supervision.word import Word

FAILURE = Failure(1, 70, "it broke", Cause.DEATH, "serve")


def test_all_are_told_whatever_one_of_them_does() -> None:
    told: list[tuple[Failure, str, str]] = []
    released = threading.Event()

    def fail(*_: object) -> None:
        raise RuntimeError("no etcd")

    word = Word()
    word.goes_to(fail)
    word.goes_to(lambda *_: released.wait(20))
    word.goes_to(lambda *what: told.append(what))
    begin = time.monotonic()
    word.spread(FAILURE, "n1", "report")
    word.wait(time.monotonic() + 0.2)
    assert 0.1 < time.monotonic() - begin < 5
    released.set()
    assert told == [(FAILURE, "n1", "report")]


def test_a_user_that_may_have_no_more_threads_is_told_nothing_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    word = Word()
    word.goes_to(lambda *_: None)
    word.spread(FAILURE, "n1", "report")
    word.wait(time.monotonic() + 1)


def test_without_anybody_to_tell_nothing_is_waited_for() -> None:
    word = Word()
    word.spread(FAILURE, "n1", "report")
    begin = time.monotonic()
    word.wait(time.monotonic() + 10)
    assert time.monotonic() - begin < 1
