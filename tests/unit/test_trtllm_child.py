# SPDX-License-Identifier: Apache-2.0
"""What rank 0 hears of a child that is stopped, goes on, and ends."""

from __future__ import annotations

import os
import queue
import signal
import sys

from dynamo_mpi.engines.trtllm.child import Child

SECONDS = 10.0


def test_a_child_that_is_stopped_goes_on_and_is_killed_is_told_step_by_step() -> None:
    news: queue.SimpleQueue[object] = queue.SimpleQueue()
    command = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]
    child = Child(command, os.environ, lambda code, _: news.put(code), news.put, "secret")
    for _ in range(2):
        os.kill(child.pid, signal.SIGSTOP)
        assert news.get(timeout=SECONDS) is True
        os.kill(child.pid, signal.SIGCONT)
        assert news.get(timeout=SECONDS) is False
    os.kill(child.pid, signal.SIGSTOP)
    assert news.get(timeout=SECONDS) is True
    child.kill()
    assert news.get(timeout=SECONDS) == -signal.SIGKILL
    assert child.wait(SECONDS)
