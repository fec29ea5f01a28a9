# SPDX-License-Identifier: Apache-2.0
"""How a node agent ends its ranks where its report can't be written."""

from __future__ import annotations

import socket
import threading

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
    watching = threading.Thread(
        target=NodeAgent(None, its, launch, "n1", EarlySettings(world_timeout=0.1)).run, daemon=True
    )
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
