# SPDX-License-Identifier: Apache-2.0
"""What a worker says of an end that comes from its own engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.dynamo.running import EtcdServer, RunningWorker, eventually, running_frontend
from tests.dynamo.test_worker_life import Stream

pytestmark = pytest.mark.dynamo
SHIMS = Path(__file__).parent / "programs" / "shims"
STEPS = 40
"""More than the proof takes, fewer than the request."""


@pytest.fixture
def worker(tmp_path: Path, etcd: EtcdServer, model_dir: Path) -> Iterator[RunningWorker]:
    """A worker whose rank 0 breaks while it serves."""
    shimmed = {"PYTHONPATH": f"{SHIMS}{os.pathsep}{ROOT}", "SHIM_BREAKER": str(STEPS)}
    running = RunningWorker(tmp_path, etcd, model_dir, 3, **shimmed)
    running.ready()
    yield running
    running.stop()


def test_an_engine_that_breaks_while_it_serves_is_reported(
    worker: RunningWorker, etcd: EtcdServer, tmp_path: Path, model_dir: Path
) -> None:
    with running_frontend(tmp_path, etcd) as frontend:
        eventually(lambda: model_dir.name in frontend.models(), "the model is listed")
        assert list(Stream(frontend.port, model_dir.name, 1500).events()), "the client hears of the end"
        assert worker.wait() == 70, worker.text()
    assert "error in serve: the engine failed while serving: no memory for this step" in worker.text()
    assert worker.text().count(": error in ") == 1, worker.text()
    assert etcd.keys() == []
