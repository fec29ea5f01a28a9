# SPDX-License-Identifier: Apache-2.0
"""What a worker's record is told of its ranks' progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.control_plane.publicity import Publicity
from dynamo_mpi.launchers.launch import Launch, Launcher
from dynamo_mpi.settings import load_settings
from dynamo_mpi.supervision.agent_client import NodeAgentClient
from dynamo_mpi.supervision.owned_leases import OwnedLeases
from dynamo_mpi.supervision.phases import Phases
from dynamo_mpi.supervision.roll import Progress
from dynamo_mpi.talk import RankLogger
from tests.unit.worlds import world


@pytest.mark.parametrize(("engine", "done"), [("reference", 1), ("trtllm", None)])
def test_progress_of_a_phase_that_is_over_is_not_told(
    engine: str, done: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NATS_SERVER", raising=False)
    phases = Phases()
    phases.begin("load")
    settings = load_settings(["--model", str(tmp_path)], {})
    leases = OwnedLeases(NodeAgentClient(Launch(Launcher.ALONE), {}, None))
    ours = Publicity(settings, world("agg", engine=engine), phases, RankLogger(0, "n1"), leases)
    told: list[Any] = []
    monkeypatch.setattr(ours.presence, "tell_progress", told.append)
    late = Progress("load", 1, 2, 1, "n2", 3.0)
    ours.tell_progress(late)
    phases.begin("serve")
    ours.tell_progress(late)
    assert [(one.done, one.slowest_host) for one in told] == [(done, "n2")]
