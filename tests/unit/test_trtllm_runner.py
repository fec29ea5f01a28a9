# SPDX-License-Identifier: Apache-2.0
"""What rank 0 takes for the cause where the child of a TensorRT-LLM worker loses its lease."""

from __future__ import annotations

import queue
from types import SimpleNamespace

import pytest

from dynamo_mpi.common.errors import RetryableError
from dynamo_mpi.runtime.trtllm_runner import TrtllmRunner


@pytest.mark.parametrize(("closes_in", "reported"), [(3.0, []), (60.0, ["the lease is lost"])])
def test_a_lease_that_a_child_revokes_before_it_ends_is_no_cause(closes_in: float, reported: list[str]) -> None:
    runner = object.__new__(TrtllmRunner)
    runner._child = SimpleNamespace(wait=lambda seconds: closes_in <= seconds)  # type: ignore[assignment]
    runner._serving, runner._events = True, queue.SimpleQueue()
    runner._on_lease_lost(RetryableError("the lease is lost"))
    seen = []
    while not runner._events.empty():
        seen.append(runner._events.get_nowait().error.problem)  # type: ignore[union-attr]
    assert seen == reported
