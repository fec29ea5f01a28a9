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

from dynamo_mpi.config.sources import EarlySettings
from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo
from dynamo_mpi.supervisor import agent_writer
from dynamo_mpi.supervisor.local_rank import LocalRank
from dynamo_mpi.supervisor.node_agent import NodeAgent

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
