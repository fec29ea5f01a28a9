# SPDX-License-Identifier: Apache-2.0
"""Leaving discovery at once, against a real etcd."""

from __future__ import annotations

import threading
import time

import pytest

from dynamo_mpi.control_plane.departure import Departure
from dynamo_mpi.control_plane.etcd import Etcd
from dynamo_mpi.control_plane.etcd_auth import EtcdAuth
from tests.dynamo.running import EtcdServer

pytestmark = pytest.mark.dynamo
PREFIX = "v1/instances/a/b/c"


def test_an_instance_that_is_written_a_little_later_leaves_all_the_same(etcd: EtcdServer) -> None:
    """Dynamo's runtime has said that a model is registered before its instance was there."""
    client = Etcd([etcd.url], EtcdAuth.of({}), 5.0)
    lease = client.grant(60).id
    departure = Departure("dyn://a.b.c", {"ETCD_ENDPOINTS": etcd.url})
    preparing = threading.Thread(target=departure.prepare, args=(lease,))
    preparing.start()
    time.sleep(0.2)
    assert preparing.is_alive()
    client.put(f"{PREFIX}/{lease:x}", b"{}", lease)
    preparing.join(5)
    assert etcd.keys()
    assert departure.leave()
    assert etcd.keys() == []


def test_an_instance_without_a_lease_of_its_own_is_left_alone(etcd: EtcdServer) -> None:
    client = Etcd([etcd.url], EtcdAuth.of({}), 5.0)
    other = client.grant(60).id
    client.put(f"{PREFIX}/2a", b"{}", other)
    departure = Departure("dyn://a.b.c", {"ETCD_ENDPOINTS": etcd.url})
    departure.prepare(0x2A)
    assert not departure.leave()
    assert etcd.keys() == [f"{PREFIX}/2a"]


def test_without_etcd_there_is_nothing_to_leave(etcd: EtcdServer) -> None:
    etcd.stop()
    departure = Departure("dyn://a.b.c", {"ETCD_ENDPOINTS": etcd.url})
    departure.prepare(1)
    assert not departure.leave()
