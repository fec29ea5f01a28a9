# SPDX-License-Identifier: Apache-2.0
"""How a node agent ends its ranks where its report can't be written, and what it removes after them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dynamo_mpi.common.failure import Failure
from dynamo_mpi.config.sources import EarlySettings
from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo
from dynamo_mpi.supervisor import agent_writer, local_rank, node_agent
from dynamo_mpi.supervisor.agent_failures import ObservedFailure, compose_report
from dynamo_mpi.supervisor.leases import LeaseRevoker
from dynamo_mpi.supervisor.local_rank import LocalRank
from dynamo_mpi.supervisor.node_agent import NodeAgent
from dynamo_mpi.supervisor.rendezvous import Rendezvous
from tests.dynamo.running import eventually

pytestmark = pytest.mark.slow


def test_a_file_system_that_hangs_does_not_keep_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(agent_writer, "write_failure", lambda *_, **__: release.wait(30))
    # the rank is this very process
    monkeypatch.setattr(LocalRank, "kill", lambda _: None)
    ours, its = socket.socketpair()
    launch = LaunchInfo(Launcher.OPEN_MPI, size=2, local_rank=0)
    agent = NodeAgent(None, its, launch, "n1", EarlySettings(world_timeout=0.1))
    watching = threading.Thread(target=agent.run, args=(time.time(),), daemon=True)
    try:
        watching.start()
        ours.settimeout(10)
        heard = b""
        while b"end " not in heard:
            data = ours.recv(4096)
            assert data
            heard += data
        assert heard.splitlines()[-1] == b"end 124"
    finally:
        release.set()
        ours.close()
        watching.join(10)


def test_ranks_end_when_the_failure_file_is_written_and_the_leases_are_revoked(monkeypatch: pytest.MonkeyPatch) -> None:
    written, revoked = threading.Event(), threading.Event()

    def after_a_while(event: threading.Event) -> None:
        time.sleep(0.1)  # a busy node
        event.set()

    monkeypatch.setattr(agent_writer, "_FILE_SECONDS", 10.0)
    monkeypatch.setattr(agent_writer, "_ETCD_SECONDS", 10.0)
    monkeypatch.setattr(agent_writer, "write_failure", lambda *_, **__: after_a_while(written))
    monkeypatch.setattr(LeaseRevoker, "revoke", lambda _: after_a_while(revoked))
    failure = Failure(1, 70, "died", phase="load", at=time.monotonic())
    before: list[tuple[bool, bool]] = []
    writer = agent_writer.ReportWriter("")
    writer.set_leases("{}")
    writer.revoke()
    report = compose_report([ObservedFailure(failure, "n1")], "load")
    pending = writer.publish(
        report, Rendezvous("n1"), None, lambda: before.append((written.is_set(), revoked.is_set()))
    )
    eventually(lambda: pending.is_done, "the report is out", 30)
    assert (pending.is_done, before) == (True, [(True, True)])


@pytest.mark.parametrize(
    ("status", "is_reported"), [(3 << 8, True), (0, True), (9, False), (15, False), (143 << 8, False), (None, False)]
)
def test_a_busy_agent_takes_no_exit_for_the_launchers_doing(
    status: int | None, is_reported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks: list[int] = []
    monkeypatch.setattr(agent_writer, "write_failure", lambda _, failure, *__, **___: ranks.append(failure.rank))
    monkeypatch.setattr(node_agent, "exit_status", lambda _: status)
    # the ranks are this very process, which goes on
    monkeypatch.setattr(LocalRank, "kill", lambda _: None)
    monkeypatch.setattr(local_rank, "_open_pidfd", lambda _: None)
    first, its_first = socket.socketpair()
    second, its_second = socket.socketpair()
    launch = LaunchInfo(Launcher.SLURM_PMIX, size=2, local_rank=0)
    agent = NodeAgent(None, its_first, launch, "n1", EarlySettings(world_timeout=20))
    agent._add_rank(its_second)
    first.sendall(b"rank 0\nphase mpi_init\n")
    second.sendall(b"rank 1\nphase mpi_init\n")
    watching = threading.Thread(target=agent.run, args=(time.time(),), daemon=True)
    # seen in one round: rank 1 has left, and rank 0, which the launcher ends because of it, has got SIGTERM and leaves
    second.close()
    first.sendall(b"reported\n")
    first.close()
    watching.start()
    watching.join(15)
    assert not watching.is_alive()
    assert ranks == ([1] if is_reported else [])


# a rank in MPICH's MPI_Init: it has made its shared memory, and is killed before it has reported that
RANK = """
import os, socket, sys
rank = socket.socket(socket.AF_UNIX)
rank.connect(sys.argv[1])
open(sys.argv[2], "x").close()
os.kill(os.getpid(), 9)
"""


def test_what_a_rank_made_before_its_agent_ran_is_removed_after_its_death(tmp_path: Path) -> None:
    earlier, own = (f"/dev/shm/mpich_shm_{name}{os.getpid()}" for name in ("earlier", "own"))
    try:
        Path(earlier).touch()
        time.sleep(0.05)  # the kernel's clock for files is a tick behind
        began = time.time()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "agent"))
            listener.listen()
            subprocess.run([sys.executable, "-c", RANK, str(tmp_path / "agent"), own], check=False, timeout=30)
            connection, _ = listener.accept()
        time.sleep(0.05)
        assert Path(own).exists()
        launch = LaunchInfo(Launcher.HYDRA, rank=0, size=2, local_rank=0)
        NodeAgent(None, connection, launch, "n1", EarlySettings()).run(began)
        assert (Path(earlier).exists(), Path(own).exists()) == (True, False)
    finally:
        for name in (earlier, own):
            Path(name).unlink(missing_ok=True)
