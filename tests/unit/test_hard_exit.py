# SPDX-License-Identifier: Apache-2.0
"""The exit that nothing in the process can hold up."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

# PyDLL keeps Python's lock, as mpi4py's Abort does
STUCK = """
import ctypes, sys
from dynamo_mpi.common import process
{prepare}
process.hard_exit_after(float(sys.argv[1]), int(sys.argv[2]))
ctypes.PyDLL(None).pthread_mutex_lock(lock := ctypes.create_string_buffer(64))
ctypes.PyDLL(None).pthread_mutex_lock(lock)
"""


def run(prepare: str = "", seconds: str = "0.5", code: str = "75") -> tuple[int, float]:
    begin = time.monotonic()
    command = [sys.executable, "-c", STUCK.format(prepare=prepare), seconds, code]
    done = subprocess.run(command, timeout=30, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return done.returncode, time.monotonic() - begin


@pytest.mark.parametrize("code", ["1", "75", "143", "255"])
def test_it_ends_with_the_code_although_python_can_not_run(code: str) -> None:
    ended, seconds = run(code=code)
    assert ended == int(code)
    assert 0.5 < seconds < 10


def test_no_time_at_all_is_soon() -> None:
    assert run(seconds="0")[0] == 75


def test_without_timers_in_the_c_library_an_alarm_ends_it() -> None:
    prepare = "def refuse(*_): raise AttributeError\nprocess._exit_by_timer = refuse"
    assert run(prepare)[0] == -14
