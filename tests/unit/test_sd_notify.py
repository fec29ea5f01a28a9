# SPDX-License-Identifier: Apache-2.0
"""systemd's notifications, over real datagram sockets."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_mpi.common.ports import free_port
from dynamo_mpi.common.subprocess import LoggedProcess
from dynamo_mpi.deploy.programs import find_etcd
from dynamo_mpi.deploy.services import Etcd
from dynamo_mpi.telemetry.sd_notify import SystemdNotifier
from tests.dynamo.running import eventually

SECONDS = {"load": 60.0}


@pytest.fixture(params=["path", "abstract"])
def supervisor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """What listens, and what names it."""
    path = f"{tmp_path}/s" if request.param == "path" else f"@notify-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(path.replace("@", "\0", 1))
        listening.settimeout(5)
        yield listening, path


def test_each_phase_is_one_datagram(supervisor: tuple[socket.socket, str]) -> None:
    listening, place = supervisor
    environ = {"NOTIFY_SOCKET": place, "PATH": "/bin"}
    notifier = SystemdNotifier.from_env(environ, SECONDS)
    assert notifier is not None
    # what this process starts has nothing to say there
    assert environ == {"PATH": "/bin"}
    notifier.on_phase("preflight")
    notifier.on_phase("load")
    notifier.worker = "M at dyn://a.b.c"
    notifier.on_ready()
    notifier.on_phase("drain")
    notifier.report_failure("error in serve: rank 2\n  expected: it")
    got = [listening.recv(4096).decode() for _ in range(5)]
    assert got == [
        "STATUS=preflight",
        "STATUS=load\nEXTEND_TIMEOUT_USEC=90000000",
        "READY=1\nSTATUS=serving M at dyn://a.b.c",
        "STATUS=drain\nSTOPPING=1",
        "STATUS=failed: error in serve: rank 2\nSTOPPING=1",
    ]


def test_a_supervisor_that_has_gone_or_reads_nothing_is_no_error(tmp_path: Path) -> None:
    gone = SystemdNotifier(f"{tmp_path}/none", {})
    gone.on_phase("load")
    SystemdNotifier("@" + "x" * 200, {}).on_phase("load")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(f"{tmp_path}/deaf")
        begin = time.monotonic()
        for _ in range(5000):
            SystemdNotifier(f"{tmp_path}/deaf", {}).on_phase("load")
        assert time.monotonic() - begin < 5


def test_the_etcd_that_we_start_does_not_notify_in_our_name(
    supervisor: tuple[socket.socket, str], tmp_path: Path
) -> None:
    listening, place = supervisor
    etcd = Etcd(find_etcd(), free_port(), tmp_path / "etcd")
    environment = {**os.environ, "NOTIFY_SOCKET": place, **etcd.environment()}
    child = LoggedProcess("etcd", etcd.command(), environment=environment, log=tmp_path / "etcd.log")
    try:
        eventually(etcd.answers, "etcd answers")
    finally:
        child.kill()
    listening.setblocking(False)
    with pytest.raises(BlockingIOError):
        listening.recv(4096)


@pytest.mark.parametrize("place", ["", "relative", "@", "vsock:2:1234"])
def test_what_names_no_unix_socket_is_left_alone(place: str) -> None:
    environ = {"NOTIFY_SOCKET": place}
    assert SystemdNotifier.from_env(environ, {}) is None
    assert environ == {}
