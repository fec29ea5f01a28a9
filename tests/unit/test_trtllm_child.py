# SPDX-License-Identifier: Apache-2.0
"""What rank 0 hears of a child that is stopped, goes on, and ends."""

from __future__ import annotations

import os
import queue
import signal
import sys
from typing import Any

from dynamo_mpi.engines.trtllm.child import Child

SECONDS = 10.0


def test_a_child_that_is_stopped_goes_on_and_is_killed_is_told_step_by_step() -> None:
    news: queue.SimpleQueue[Any] = queue.SimpleQueue()
    command = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]
    child = Child(command, os.environ, lambda code, lines: news.put((code, lines)), news.put, "secret")
    for _ in range(2):
        os.kill(child.pid, signal.SIGSTOP)
        assert news.get(timeout=SECONDS) is True
        os.kill(child.pid, signal.SIGCONT)
        assert news.get(timeout=SECONDS) is False
    os.kill(child.pid, signal.SIGSTOP)
    assert news.get(timeout=SECONDS) is True
    child.kill()
    code, _ = news.get(timeout=SECONDS)
    assert code == -signal.SIGKILL
    assert child.wait(SECONDS)
