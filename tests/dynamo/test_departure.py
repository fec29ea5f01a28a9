# SPDX-License-Identifier: Apache-2.0
"""Leaving discovery at once, against a real etcd."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from dynamo_mpi.common.ports import free_port
from dynamo_mpi.deploy.programs import find_etcd
from dynamo_mpi.deploy.services import Etcd as EtcdService
from dynamo_mpi.discovery.etcd import EtcdAuth
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient
from dynamo_mpi.discovery.registration_monitor import InstanceLease
from tests.dynamo.running import EtcdServer, RunningWorker, eventually
from tests.etcd_users import PASSWORDS, add_users

pytestmark = pytest.mark.dynamo
PREFIX = "v1/instances/a/b/c"


def test_an_instance_that_is_written_a_little_later_leaves_all_the_same(etcd: EtcdServer) -> None:
    """Dynamo's runtime has said that a model is registered before its instance was there."""
    client = GrpcEtcdClient([etcd.url], EtcdAuth.from_env({}), 5.0)
    lease = client.grant(60).id
    departure = InstanceLease("dyn://a.b.c", {"ETCD_ENDPOINTS": etcd.url})
    preparing = threading.Thread(target=departure.resolve, args=(lease,))
    preparing.start()
    time.sleep(0.2)
    assert preparing.is_alive()
    client.put(f"{PREFIX}/{lease:x}", b"{}", lease)
    preparing.join(5)
    assert etcd.keys()
    assert departure.revoke()
    assert etcd.keys() == []


def test_an_instance_without_a_lease_of_its_own_is_left_alone(etcd: EtcdServer) -> None:
    client = GrpcEtcdClient([etcd.url], EtcdAuth.from_env({}), 5.0)
    other = client.grant(60).id
    client.put(f"{PREFIX}/2a", b"{}", other)
    departure = InstanceLease("dyn://a.b.c", {"ETCD_ENDPOINTS": etcd.url})
    departure.resolve(0x2A)
    assert not departure.revoke()
    assert etcd.keys() == [f"{PREFIX}/2a"]


def test_without_etcd_there_is_nothing_to_leave(etcd: EtcdServer) -> None:
    etcd.stop()
    departure = InstanceLease("dyn://a.b.c", {"ETCD_ENDPOINTS": etcd.url})
    departure.resolve(1)
    assert not departure.revoke()


class ForgetfulEtcd(EtcdService):
    """An etcd whose tokens end soon, as all do after five minutes by default."""

    def command(self) -> tuple[str, ...]:
        return (*super().command(), "--auth-token-ttl", "2")


def test_where_the_runtimes_token_has_ended_nothing_stays_behind_all_the_same(tmp_path: Path, model_dir: Path) -> None:
    who = {"ETCD_AUTH_USERNAME": "worker", "ETCD_AUTH_PASSWORD": PASSWORDS["worker"]}
    server = EtcdServer(tmp_path)
    server.service = ForgetfulEtcd(find_etcd(), free_port(), tmp_path / "etcd")
    server.start()
    worker: RunningWorker | None = None
    try:
        add_users(server.url, ["v1/", "dynamo_mpi/"])
        worker = RunningWorker(tmp_path, server, model_dir, 1, "--engine", "reference", **who)
        pid, begin = worker.rank_zero(), time.monotonic()
        eventually(lambda: time.monotonic() - begin > 7, "the token has ended")
        client = GrpcEtcdClient([server.url], EtcdAuth(username="root", password=PASSWORDS["root"]), 5)
        assert len(client.get_prefix("v1/instances/")) == 1
        os.kill(pid, signal.SIGTERM)
        assert worker.wait() == 0, worker.text()
        assert "drain: not deregistered" in worker.text(), "else this test shows nothing"
        assert client.get_prefix("v1/") == client.get_prefix("dynamo_mpi/") == []
        client.close()
    finally:
        if worker is not None:
            worker.stop()
        server.stop()
