# SPDX-License-Identifier: Apache-2.0
"""The head node's services as steps of real jobs: two on one node, and what ``scancel`` leaves of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from dynamo_mpi.deploy.head_node import offset
from tests.conftest import ROOT
from tests.dynamo.running import eventually
from tests.namespaces.commands import InsideProcess
from tests.namespaces.processes import command_line

from .session import SlurmSession

pytestmark = pytest.mark.slurm

HEAD_NODE = (sys.executable, "-m", "dynamo_mpi.head_node")
# a word of each part's command line: ours, the frontend's, etcd's and NATS's
PARTS = {"dynamo_mpi.head_node", "dynamo.frontend", "--advertise-client-urls", "-js"}
GET = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"


@contextmanager
def head_node_job(slurm: SlurmSession, folder: Path, node: str) -> Iterator[InsideProcess]:
    """Run the services as a job's only step; ended with the block."""
    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    name = f"services-{folder.name}"
    options = (f"--job-name={name}", "-N1", "-n1", "--overlap", "--oversubscribe", f"--nodelist={node}")
    variables = {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    process = slurm.popen("srun", *options, *HEAD_NODE, "--run-dir", folder / "run", env=variables)
    try:
        yield process
    finally:
        slurm.exec("scancel", f"--name={name}")
        process.communicate(timeout=60)


def services_of(folder: Path, process: InsideProcess) -> dict[str, Any]:
    """Wait for ``services.json`` and return what it holds."""
    file = folder / "run" / "services.json"

    def there() -> bool:
        assert process.poll() is None, process.communicate(timeout=10)
        return file.exists()

    eventually(there, "services.json", 60)
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def running_parts(slurm: SlurmSession, node: str) -> set[str]:
    """Return which of the parts run on a node."""
    return PARTS & {word for pid in slurm.pids(node) for word in command_line(pid)}


def test_two_jobs_share_a_node_and_scancel_leaves_nothing(slurm: SlurmSession, tmp_path: Path) -> None:
    node = slurm.nodes[0]
    folders = [tmp_path / name for name in ("first", "second")]
    with ExitStack() as jobs:
        found = []
        for folder in folders:
            process = jobs.enter_context(head_node_job(slurm, folder, node))
            found.append(services_of(folder, process))
        first, second = found
        assert [services["host"] for services in found] == [node, node]
        assert first["url"] == f"http://{slurm.addresses[node]}:8000"
        moved = offset(second["job_id"])
        assert second["url"] == f"http://{slurm.addresses[node]}:{8000 + moved}"
        assert urlsplit(second["environment"]["ETCD_ENDPOINTS"]).port == 2379 + moved
        assert first["environment"]["NATS_AUTH_PASSWORD"] != second["environment"]["NATS_AUTH_PASSWORD"]
        assert running_parts(slurm, node) == PARTS
        for services in found:  # from another host
            done = slurm.exec(sys.executable, "-c", GET, services["url"] + "/v1/models")
            assert json.loads(done.stdout)["data"] == [], done.stderr
    for folder in folders:
        assert not (folder / "run" / "services.json").exists()
        assert list((folder / "tmp").iterdir()) == []
    assert not running_parts(slurm, node)
