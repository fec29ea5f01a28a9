# SPDX-License-Identifier: Apache-2.0
"""Whether a process is the one that a ready file or a record names, also after the clock was set."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_mpi.common.worker_process import ProcessStart, is_worker, process_start

RANK = "import signal; print('up', flush=True); signal.pause()"


@pytest.fixture
def rank() -> Iterator[int]:
    words = [sys.executable, "-c", RANK, "dynamo_mpi.worker"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process.pid
        process.kill()


@pytest.mark.parametrize("seconds", [-7200, 0, 7200])
def test_a_clock_set_since_changes_nothing(rank: int, seconds: float) -> None:
    assert is_worker(rank, ProcessStart(time.time() - seconds, process_start(rank)))
    assert is_worker(rank, ProcessStart(0.0, process_start(rank)))


def test_an_older_writer_has_the_time_alone(rank: int) -> None:
    assert is_worker(rank, ProcessStart(time.time()))
    assert not is_worker(rank, ProcessStart(time.time() - 7200))
    assert not is_worker(rank, ProcessStart(0.0))


def test_another_start_or_boot_is_another_process(rank: int) -> None:
    own = process_start(rank)
    assert own is not None
    boot, _, ticks = own.partition(":")
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    for other in (f"{boot}:{int(ticks) + 1}", f"{'0' * 8}{boot[8:]}:{ticks}", boot, "x", f"{own} "):
        assert not is_worker(rank, ProcessStart(time.time(), other)), other


def test_a_process_that_is_no_worker_is_left_alone() -> None:
    assert not is_worker(os.getpid(), ProcessStart(time.time(), process_start(os.getpid())))
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert process_start(gone.pid) is None
    assert not is_worker(gone.pid, ProcessStart(time.time()))
