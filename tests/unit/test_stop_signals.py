# SPDX-License-Identifier: Apache-2.0
"""Real signals to a process of its own, whose main thread is wherever it is: in native code, in an event loop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.conftest import ROOT

LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
PROGRAM = """
import asyncio, ctypes, os, sys, time
from dynamo_mpi.supervisor.signals import ShutdownSignals
say = lambda *words: os.write(1, (" ".join(map(str, words)) + "\\n").encode())
from dynamo_mpi.mpi.launcher import detect_launcher
from dynamo_mpi.supervisor.signals import signals_of
signals = ShutdownSignals(lambda number: (say("hurry", number), os._exit(128 + number)), signals_of(detect_launcher(os.environ).launcher))
if sys.argv[1] == "native":
    say("there")
    while True:  # a signal ends it early
        ctypes.CDLL(None).sleep(60)
async def main():
    loop = asyncio.get_running_loop()
    stop = loop.create_future()
    signals.on_drain_request(lambda number: loop.call_soon_threadsafe(stop.set_result, number))
    say("there")
    say("drain", await stop)
    await asyncio.sleep(float(sys.argv[2]))
if sys.argv[1] == "uvloop":
    from uvloop import run
else:
    from asyncio import run
if "right_before" in sys.argv:
    # Python's handler runs in this thread before the loop does, the thread that wakes up for it only inside the loop
    sys.setswitchinterval(60)
    os.kill(os.getpid(), 15)
with signals.in_event_loop():
    run(main())
say("after")
signals.close()
say("closed")
sys.stdin.read()
"""


@contextmanager
def running(*words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    command, pipe = [sys.executable, "-c", PROGRAM, *words], subprocess.PIPE
    variables = {**os.environ, **environment}
    with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, cwd=ROOT, env=variables) as process:
        try:
            assert line(process) == "there"
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_arrives_although_the_main_thread_is_in_native_code(number: signal.Signals) -> None:
    with running("native") as process:
        process.send_signal(number)
        assert line(process) == f"hurry {number:d}"
        assert process.wait(10) == 128 + number


@LOOPS
def test_the_first_drains_and_the_next_hurries(loop: str) -> None:
    pytest.importorskip(loop)
    with running(loop, "60") as process:
        process.send_signal(signal.SIGTERM)
        assert line(process) == "drain 15"
        # its twin, as launchers deliver it, and one of the user's
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.3)
        process.send_signal(signal.SIGINT)
        assert line(process) == "hurry 2"
        assert process.wait(10) == 130


@LOOPS
def test_a_signal_right_before_the_loop_is_not_lost(loop: str) -> None:
    pytest.importorskip(loop)
    command = [sys.executable, "-c", PROGRAM, loop, "0", "right_before"]
    ended = subprocess.run(command, text=True, input="", capture_output=True, cwd=ROOT, timeout=20, check=False)
    said, code = ended.stdout, ended.returncode
    assert ("hurry 15\n" in said and code == 143) or (said.endswith("drain 15\nafter\nclosed\n") and code == 0), (
        said,
        code,
    )


@LOOPS
def test_under_mpichs_mpiexec_sigusr1_is_no_word_of_the_time(loop: str) -> None:
    pytest.importorskip(loop)
    # which sends it to the others when a rank has died; it gives each rank a number
    with running(loop, "0", PMI_RANK="0", PMI_SIZE="2", MPI_LOCALNRANKS="2") as process:
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        assert line(process) == "drain 15"


@LOOPS
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGUSR1])
def test_both_drain_signals_request_a_drain(loop: str, number: signal.Signals) -> None:
    pytest.importorskip(loop)
    with running(loop, "0") as process:
        process.send_signal(number)
        assert line(process) == f"drain {int(number)}"


@LOOPS
def test_one_after_the_loop_hurries_and_after_the_end_none_counts(loop: str) -> None:
    pytest.importorskip(loop)
    with running(loop, "0") as process:
        process.send_signal(signal.SIGTERM)
        assert [line(process) for _ in range(3)] == ["drain 15", "after", "closed"]
        for number in (signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
        process.communicate("")
        assert process.returncode == 0
