# SPDX-License-Identifier: Apache-2.0
"""What a process has started is found by its mark or its connection, whoever its parent is, and nothing else is ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from dynamo_mpi.supervisor.leftovers import MARK_VARIABLE, end_descendants


def test_marked_processes_end_wherever_they_stand() -> None:
    marked = {**os.environ, MARK_VARIABLE: "0123abcd"}
    words = [sys.executable, "-c", "import signal; signal.pause()"]
    with (
        subprocess.Popen(words, env=marked, start_new_session=True) as ours,
        subprocess.Popen(words, env={**marked, MARK_VARIABLE: "0123abcde"}) as other,
        subprocess.Popen(words, env=marked) as spared,
    ):
        try:
            assert end_descendants("0123abcd", 0, frozenset({spared.pid})) == [ours.pid]
            assert ours.wait(10) == -9
            assert other.poll() is None
            assert spared.poll() is None
        finally:
            for each in (ours, other, spared):
                each.kill()


def test_forked_processes_are_known_by_the_connection_that_they_hold() -> None:
    near, far = socket.socketpair()
    inode = os.fstat(near.fileno()).st_ino
    words = [sys.executable, "-c", "import signal; signal.pause()"]
    with subprocess.Popen(words, pass_fds=[near.fileno()]) as holder, subprocess.Popen(words) as other:
        try:
            near.close()
            assert end_descendants("", inode) == [holder.pid]
            assert holder.wait(10) == -9
            assert other.poll() is None
        finally:
            holder.kill()
            other.kill()
    far.close()


def test_a_helper_that_ends_by_itself_is_given_a_moment() -> None:
    marked = {**os.environ, MARK_VARIABLE: "89abcdef"}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.1)"], env=marked) as helper:
        assert end_descendants("89abcdef", 0) in ([], [helper.pid])
        assert helper.wait(10) == 0


def test_without_mark_and_connection_nothing_ends() -> None:
    assert end_descendants("", 0) == []
