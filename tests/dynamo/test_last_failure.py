# SPDX-License-Identifier: Apache-2.0
"""What real workers leave in etcd when they fail, whichever process is left to write it; and nothing where they end in order."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo_mpi.discovery.etcd import EtcdAuth
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient
from dynamo_mpi.discovery.failure_records import FailureRecord
from tests.dynamo.running import EtcdServer, RunningWorker, eventually

pytestmark = pytest.mark.dynamo
FAILURES = "dynamo_mpi/v1/failures/"
Start = Callable[..., RunningWorker]


@pytest.fixture
def start(tmp_path: Path, etcd: EtcdServer, small_model_dir: Path) -> Iterator[Start]:
    workers: list[RunningWorker] = []

    def begin(**variables: str) -> RunningWorker:
        usual = {"OMP_NUM_THREADS": "1", "PRTE_MCA_hwloc_default_binding_policy": "none", "DYN_MPI_LAUNCH": "x-0"}
        workers.append(
            RunningWorker(
                tmp_path,
                etcd,
                small_model_dir,
                3,
                "--engine",
                "reference",
                name=f"w{len(workers)}",
                **usual,
                **variables,
            )
        )
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


def failures(etcd: EtcdServer) -> list[FailureRecord]:
    client = GrpcEtcdClient([etcd.url], EtcdAuth(), 5)
    try:
        return [FailureRecord.unpack(entry.value) for entry in client.get_prefix(FAILURES)]
    finally:
        client.close()


def serving(etcd: EtcdServer, worker: RunningWorker) -> RunningWorker:
    """Wait until it serves, which follows its ready file by milliseconds."""
    worker.ready()
    eventually(lambda: [world.phase for world in etcd.worlds()] == ["serve"], "it serves")
    return worker


def test_a_rank_that_is_killed_is_named_until_the_next_start_serves(etcd: EtcdServer, start: Start) -> None:
    worker = serving(etcd, start())
    victim = worker.ranks()[1]
    (record,) = etcd.keys("dynamo_mpi/v1/worlds/")
    os.kill(victim, signal.SIGKILL)
    assert worker.wait() != 0
    (failure,) = failures(etcd)
    assert failure.rank in (1, 2)
    assert (failure.cause, failure.phase, failure.exit_code) == ("disconnect", "serve", 70)
    assert (failure.launch, failure.role, failure.host) == ("x-0", "agg", os.uname().nodename)
    assert failure.error == "died: its process exited without reporting an error"
    assert f"error in serve: rank {failure.rank} on " in failure.report
    assert etcd.keys(FAILURES) == [record.replace("/worlds/", "/failures/")]

    again = start(DYN_MPI_ATTEMPT="2")
    again.ready()
    eventually(lambda: etcd.keys(FAILURES) == [], "what the first start has left is gone")
    os.kill(again.rank_zero(), signal.SIGTERM)
    assert again.wait() == 0, again.text()
    assert etcd.keys(FAILURES) == [], "an orderly end leaves none"


def test_of_a_rank_0_that_is_killed_its_node_agent_writes_one(etcd: EtcdServer, start: Start) -> None:
    worker = serving(etcd, start())
    os.kill(worker.rank_zero(), signal.SIGKILL)
    assert worker.wait() != 0
    (failure,) = eventually(lambda: failures(etcd), "it is written", 10)
    assert (failure.rank, failure.cause, failure.phase) == (0, "disconnect", "serve")
    assert "died: its process exited without reporting an error" in failure.report
    assert etcd.worlds() == []


@pytest.mark.full
def test_of_a_lost_lease_too(etcd: EtcdServer, start: Start) -> None:
    worker = start(ETCD_LEASE_TTL="3")
    worker.ready()
    etcd.revoke_leases()
    assert worker.wait() == 75, worker.text()
    (failure,) = failures(etcd)
    assert (failure.rank, failure.cause, failure.exit_code) == (0, "report", 75)
    assert "lease" in failure.error
