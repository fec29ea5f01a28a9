# SPDX-License-Identifier: Apache-2.0
"""Hooks are called as one, whatever one of them does, and none is waited for longer than agreed."""

from __future__ import annotations

import inspect
import threading
import time
from typing import Any

import pytest

from dynamo_mpi.common.failure import DetectedBy, Failure
from dynamo_mpi.common.hooks import WorkerHook, WorkerHooks, WorldFailure

FAILURE = WorldFailure((Failure(1, 70, "it broke", DetectedBy.DISCONNECT, "serve"),), "n1", "report")
METHODS = [name for name, _ in inspect.getmembers(WorkerHook, inspect.isfunction)]


class Recorder(WorkerHook):
    """Notes what is called; its class is made anew for each test, as `WorkerHooks` asks it which methods it overrides."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __init_subclass__(cls) -> None:
        for name in METHODS:
            setattr(cls, name, lambda self, *arguments, name=name: self.calls.append((name, *arguments)))


def recorder() -> Recorder:
    class All(Recorder):
        pass

    return All()


@pytest.mark.parametrize("method", METHODS)
def test_each_method_reaches_every_hook(method: str) -> None:
    hooks, both = WorkerHooks(), (recorder(), recorder())
    hooks.add(*both)
    arguments = list(range(len(inspect.signature(getattr(WorkerHook, method)).parameters) - 1))
    getattr(hooks, method)(*arguments)
    hooks.wait(time.monotonic() + 5)
    assert [hook.calls for hook in both] == [[(method, *arguments)]] * 2


def test_one_that_fails_is_said_once_and_the_others_go_on() -> None:
    warnings: list[str] = []

    class Broken(WorkerHook):
        def on_phase(self, phase: str) -> None:
            raise OSError("no etcd")

    hooks, other = WorkerHooks(warnings.append), recorder()
    hooks.add(Broken(), other)
    hooks.on_phase("load")
    hooks.on_phase("serve")
    assert other.calls == [("on_phase", "load"), ("on_phase", "serve")]
    assert warnings == ["Broken.on_phase failed: OSError: no etcd"]


def test_a_failure_is_not_held_up_by_a_hook_that_hangs() -> None:
    released = threading.Event()

    class Hanging(WorkerHook):
        def on_failure(self, failure: WorldFailure) -> None:
            released.wait(20)

    hooks, other = WorkerHooks(), recorder()
    hooks.add(Hanging(), other)
    begin = time.monotonic()
    hooks.on_failure(FAILURE)
    hooks.wait(time.monotonic() + 0.2)
    assert 0.1 < time.monotonic() - begin < 5
    released.set()
    assert other.calls == [("on_failure", FAILURE)]


def test_without_threads_a_failure_still_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    hooks = WorkerHooks()
    hooks.add(recorder())
    hooks.on_failure(FAILURE)
    hooks.wait(time.monotonic() + 1)


def test_only_hooks_that_want_it_get_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", started.append)
    hooks = WorkerHooks()
    hooks.add(WorkerHook())
    hooks.on_failure(FAILURE)
    assert started == []


def test_exit_is_called_once() -> None:
    hooks, hook = WorkerHooks(), recorder()
    hooks.add(hook)
    hooks.on_exit(70)
    hooks.on_exit(0)
    assert hook.calls == [("on_exit", 70)]
