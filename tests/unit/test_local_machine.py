# SPDX-License-Identifier: Apache-2.0
"""Ports, private folders, signals, logs and children: what ``dynamo-mpi local`` takes from this machine and gives back."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dynamo_mpi.common import files as folders
from dynamo_mpi.common.log_tail import Follower, last_lines
from dynamo_mpi.common.ports import free_port, holds_port, is_free, listeners
from dynamo_mpi.common.signals import Interrupted, Interrupts
from dynamo_mpi.common.subprocess import LoggedProcess, session_members, with_pdeathsig
from tests.dynamo.running import eventually

PROC_NET_TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1 0 100 0 0 10 0
   1: 0100007F:1F90 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 222 1 0 20 4 0 10 -1
   2: 00000000:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 333 1 0 100 0 0 10 0
"""


def test_only_listening_sockets_of_the_port_count() -> None:
    assert listeners(PROC_NET_TCP, 8080) == [("111", 0)]
    assert listeners(PROC_NET_TCP, 8081) == [("333", 0)]
    assert listeners(PROC_NET_TCP, 80) == []


def test_a_port_belongs_to_the_process_that_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert holds_port(os.getpid(), port)
        assert not holds_port(os.getppid(), port)
        assert not is_free(port)
    assert not holds_port(os.getpid(), port)
    assert is_free(port)


def test_free_port_is_free() -> None:
    assert is_free(free_port())


def test_folder_is_private_and_goes(tmp_path: Path) -> None:
    with folders.private_dir(tmp_path) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "deep").mkdir()
        (folder / "deep" / "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_sweep_takes_dead_runs_only(tmp_path: Path) -> None:
    dead, foreign = tmp_path / f"{folders.PREFIX}dead", tmp_path / f"{folders.PREFIX}without-lock"
    for folder in (dead, foreign):
        folder.mkdir()
    (dead / folders.LOCK).touch()
    with folders.private_dir(tmp_path) as alive:
        assert not dead.exists()
        folders.sweep(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([alive, foreign])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_and_raised_where_we_wait(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        interrupts.check()
        os.kill(os.getpid(), number)
        interrupts.sleep(60)  # ends at once
        with pytest.raises(Interrupted) as caught:
            interrupts.pause(60)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) == before


def test_the_exit_of_a_child_ends_a_sleep_where_that_is_asked_for() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    with Interrupts(wakes_on_exit=True) as interrupts:
        child = subprocess.Popen(["sleep", "0.2"])
        began = time.monotonic()
        interrupts.pause(60)  # raises nothing
        assert time.monotonic() - began < 30
        assert child.wait(10) == 0
    assert signal.getsignal(signal.SIGCHLD) == before
    with Interrupts() as interrupts, subprocess.Popen(["true"]) as child:
        began = time.monotonic()
        interrupts.pause(0.3)
        assert time.monotonic() - began >= 0.3


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            interrupts.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_a_blocking_read() -> None:
    ours, theirs = socket.socketpair()
    sender = subprocess.Popen([sys.executable, "-c", f"import os; os.kill({os.getpid()}, {int(signal.SIGTERM)})"])
    with ours, theirs, Interrupts() as interrupts, interrupts.closing(ours):
        assert ours.recv(1) == b""
        assert interrupts.first == signal.SIGTERM
    sender.wait()


def test_last_lines_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert last_lines(log, 3) == []
    log.write_bytes(b"1\n\n2\n\xff\n4")
    assert last_lines(log, 3) == ["2", "\N{REPLACEMENT CHARACTER}", "4"]


def test_a_folder_that_a_sweep_took_before_it_was_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = fcntl.flock, list[Path]()

    def sweep_first(descriptor: int, operation: int) -> None:
        if not taken:
            taken.extend(tmp_path.iterdir())
            folders.sweep(tmp_path)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    with folders.private_dir(tmp_path) as folder:
        assert not taken[0].exists()
        assert folder.is_dir()


def test_follower_copies_every_line_once(tmp_path: Path) -> None:
    stream = io.StringIO()
    follower = Follower(tmp_path, "rank-*.log", stream, period_seconds=0.001)
    follower.start()
    (tmp_path / "other.log").write_text("no\n")
    with (tmp_path / "rank-0.log").open("w", buffering=1) as log:
        for number in range(100):
            log.write(f"{number}\n")
        log.write("cut off")
    follower.close()
    follower.close()
    assert stream.getvalue().splitlines() == [f"[rank-0] {number}" for number in [*range(100), "cut off"]]


def test_follower_leaves_out_what_an_earlier_run_has_written(tmp_path: Path) -> None:
    log, stream = tmp_path / "a.log", io.StringIO()
    log.write_text("earlier\n")
    follower = Follower(tmp_path, "*.log", stream)
    with log.open("a") as file:
        file.write("now\n")
    follower.start()
    follower.close()
    assert stream.getvalue() == "[a] now\n"


def test_the_nul_of_mpiruns_texts_is_left_out(tmp_path: Path) -> None:
    log, stream = tmp_path / "a.log", io.StringIO()
    follower = Follower(tmp_path, "*.log", stream)
    log.write_bytes(b"one\n\0dynamo_mpi: two\n")
    follower.start()
    follower.close()
    assert stream.getvalue() == "[a] one\n[a] dynamo_mpi: two\n"
    assert last_lines(log, 1) == ["dynamo_mpi: two"]


def test_follower_ends_when_its_reader_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        follower = Follower(tmp_path, "*.log", stream, period_seconds=0.001)
        (tmp_path / "a.log").write_text("one\n")
        follower.start()
        follower.close()
        with contextlib.suppress(BrokenPipeError):
            stream.close()
    assert failed == []


def test_the_last_words_of_a_child_are_its_own(tmp_path: Path) -> None:
    for word in ("first", "second"):
        child = LoggedProcess("x", ["/bin/echo", word], environment={}, log=tmp_path / "x.log")
        assert child.popen.wait() == 0
        assert child.last_lines(10) == [word]
    assert last_lines(tmp_path / "x.log", 10) == ["first", "second"]


def test_a_child_leads_a_session_and_is_killed_with_all_of_it(tmp_path: Path) -> None:
    child = LoggedProcess("x", ["/bin/sh", "-c", "sleep 600; :"], environment=os.environ, log=tmp_path / "x.log")
    try:
        with Interrupts() as interrupts:
            while len(child.members()) < 2:  # the shell and its sleep
                assert child.exit_code() is None
                interrupts.sleep(0.01)
        assert os.getsid(child.pid) == child.pid != os.getsid(0)
        assert child.exit_code() is None
    finally:
        child.kill()
    assert child.exit_code() == 128 + signal.SIGKILL
    assert session_members(child.pid) == []


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_child_that_is_stopped_takes_its_signal(tmp_path: Path) -> None:
    child = LoggedProcess("x", ["/bin/sleep", "600"], environment=os.environ, log=tmp_path / "x.log")
    try:
        child.resume()  # of one that runs, nothing
        os.kill(child.pid, signal.SIGSTOP)
        eventually(lambda: is_stopped(child.pid), "it is stopped", 10)
        child.send(signal.SIGTERM)
        assert child.popen.wait(10) == -signal.SIGTERM
        child.send(signal.SIGTERM)  # of one that has ended, nothing
    finally:
        child.kill()


def test_a_missing_program_is_reported(tmp_path: Path) -> None:
    child = LoggedProcess("x", ["/no/such/program"], environment={}, log=tmp_path / "x.log")
    assert child.popen.wait() == 127
    assert child.last_lines(1) == ["cannot start /no/such/program: No such file or directory"]


def test_a_command_is_killed_when_its_parent_is_killed(tmp_path: Path) -> None:
    """The parent is a shell that starts a ``sleep`` that ends with it, and is then killed with SIGKILL."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # closed by its last writer's death, so reading it waits for exactly that
    command = " ".join(with_pdeathsig(["sleep", "600"]))
    shell = subprocess.Popen(["/bin/sh", "-c", f"{command} >{fifo} & echo $!; wait"], stdout=subprocess.PIPE)
    assert shell.stdout is not None
    with fifo.open("rb") as pipe, shell.stdout:
        assert shell.stdout.readline().strip().isdigit()
        shell.kill()
        shell.wait()
        assert pipe.read() == b""


@pytest.mark.parametrize("variable", ["PMIX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"])
def test_a_rank_writes_to_its_own_log(tmp_path: Path, variable: str) -> None:
    command = with_pdeathsig(["/bin/sh", "-c", "echo out; echo err >&2"], rank_logs=tmp_path)
    result = subprocess.run(command, env={variable: "2"}, capture_output=True, check=True)
    assert result.stdout == result.stderr == b""
    assert (tmp_path / "rank-2.log").read_text() == "out\nerr\n"


def test_without_a_rank_the_output_stays_where_it_was(tmp_path: Path) -> None:
    result = subprocess.run(
        with_pdeathsig(["echo", "out"], rank_logs=tmp_path),
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        check=True,
    )
    assert result.stdout == b"out\n"
    assert list(tmp_path.iterdir()) == []
