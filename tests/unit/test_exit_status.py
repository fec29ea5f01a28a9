# SPDX-License-Identifier: Apache-2.0
"""The exit status of a process that is no child of ours, from when its connection closes until its parent reaps it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from dynamo_mpi.common.process import exit_status

# a launcher that doesn't reap its rank until its stdin closes
LAUNCHER = """
import os, sys
pid = os.fork()
if pid == 0:
    os.write(int(sys.argv[1]), str(os.getpid()).encode())
    os.read(int(sys.argv[1]), 1)
    os._exit(14) if sys.argv[2] == "exit" else os.kill(os.getpid(), 9)
os.close(int(sys.argv[1]))
sys.stdin.read()
"""


@pytest.mark.parametrize(("how", "status"), [("exit", 14 << 8), ("kill", int(signal.SIGKILL))])
def test_the_status_is_there_when_the_connection_closes(how: str, status: int) -> None:
    ours, theirs = socket.socketpair()
    words = [sys.executable, "-c", LAUNCHER, str(theirs.fileno()), how]
    with ours, subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()]) as launcher:
        theirs.close()
        pid = int(ours.recv(16))
        assert exit_status(pid) is None
        ours.send(b"x")
        assert ours.recv(1) == b""
        assert exit_status(pid) == status
        assert launcher.stdin is not None
        launcher.stdin.close()


def test_a_process_that_lives_has_none() -> None:
    assert exit_status(os.getpid()) is None
    assert exit_status(0) is None
