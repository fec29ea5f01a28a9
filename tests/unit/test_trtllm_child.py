# SPDX-License-Identifier: Apache-2.0
"""What rank 0 hears of a child that is stopped, goes on, and ends."""

from __future__ import annotations

import os
import queue
import signal
import sys
from typing import Any

import pytest

from dynamo_mpi.engines.trtllm.process import TrtllmProcess

SECONDS = 10.0


def test_each_stop_continue_and_kill_of_a_child_is_reported() -> None:
    news: queue.SimpleQueue[Any] = queue.SimpleQueue()
    command = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]
    child = TrtllmProcess(command, os.environ, lambda code, lines: news.put((code, lines)), news.put, "secret")
    for _ in range(2):
        os.kill(child.pid, signal.SIGSTOP)
        assert news.get(timeout=SECONDS) is True
        os.kill(child.pid, signal.SIGCONT)
        assert news.get(timeout=SECONDS) is False
    os.kill(child.pid, signal.SIGSTOP)
    assert news.get(timeout=SECONDS) is True
    child.kill_group()
    code, _ = news.get(timeout=SECONDS)
    assert code == -signal.SIGKILL
    assert child.wait(SECONDS)


def test_what_is_kept_of_its_last_words_holds_no_secrets(capfd: pytest.CaptureFixture[str]) -> None:
    news: queue.SimpleQueue[Any] = queue.SimpleQueue()
    words = [
        "the key: 0123abcd",
        "-----BEGIN PRIVATE KEY-----",
        "MHcCAQEEIIGH7p1v3k2h",
        "-----END PRIVATE KEY-----",
        "api_key=x1",
        "end",
    ]
    command = [sys.executable, "-c", f"print({chr(10).join(words)!r})"]
    TrtllmProcess(command, os.environ, lambda code, lines: news.put((code, lines)), news.put, "0123abcd")
    assert news.get(timeout=SECONDS) == (0, ["the key: <secret>", "<redacted>", "api_key=<redacted>", "end"])
    # what it writes goes on as it is, less the key that we gave it
    words[0] = "the key: <secret>"
    assert capfd.readouterr().err.splitlines() == words
