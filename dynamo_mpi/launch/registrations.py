# SPDX-License-Identifier: Apache-2.0
"""Takes a worker out of discovery that was killed whole: by Slurm, by the kernel for its memory, or with its nodes.

As long as one of its companions lives, a worker does that itself; see `supervision.heir`. What it has in etcd stands in its world record.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from dynamo_mpi.control_plane.etcd_auth import EtcdAuth
from dynamo_mpi.control_plane.probe import etcd_endpoints
from dynamo_mpi.control_plane.record import WorldRecord, worlds_of
from dynamo_mpi.errors import BootstrapError, DiscoveryError
from dynamo_mpi.launch.etcd_gateway import EtcdGateway, gateway_error

if TYPE_CHECKING:
    from collections.abc import Mapping

SECONDS = 2.0


def take_out(launch: str, environ: Mapping[str, str]) -> bool:
    """Revoke what a worker has left in etcd that doesn't run any more. Takes no longer than `SECONDS`.

    Args:
        launch: what its ranks were told that they are launched as.
        environ: where etcd and our credentials stand, as the worker has it.

    Returns:
        Whether it was still registered.

    Raises:
        DiscoveryError: no endpoint has answered in time, or they refuse us.
        UsageError: what is set for etcd can't be used.
    """
    end = time.monotonic() + SECONDS
    outcome: list[bool | BootstrapError] = []

    def ask() -> None:
        try:
            outcome.append(_take_out(launch, environ, end))
        except BootstrapError as error:
            outcome.append(error)

    # a look-up of a name knows no timeout, and an answer that comes byte by byte none as a whole
    thread = threading.Thread(target=ask, name="registrations", daemon=True)
    thread.start()
    thread.join(SECONDS)
    result = outcome[0] if outcome else gateway_error("etcd: no answer in time")
    if isinstance(result, BootstrapError):
        raise result
    return result


def _take_out(launch: str, environ: Mapping[str, str], end: float) -> bool:
    auth, endpoints = EtcdAuth.of(environ), etcd_endpoints(environ)
    troubles = []
    for index, endpoint in enumerate(endpoints):
        now = time.monotonic()
        # one that is lost leaves time for the others
        share = (end - now) / (len(endpoints) - index)
        try:
            with EtcdGateway(endpoint, auth, now + share) as gateway:
                return _clear(launch, gateway)
        except DiscoveryError as error:
            troubles.append(error.found)
    raise gateway_error("; ".join(troubles) or "ETCD_ENDPOINTS names no endpoint")


def _clear(launch: str, gateway: EtcdGateway) -> bool:
    gateway.log_in()
    registered = False
    for value in gateway.values(worlds_of("")):
        try:
            record = WorldRecord.unpack(value.data)
            instance = int(record.instance or "0", 16)
        except ValueError:
            continue  # nobody that was launched from here
        if record.launch == launch:
            # the instance first: requests go there
            registered |= 0 < instance < 2**63 and gateway.revoke(instance)
            if value.lease:
                gateway.revoke(value.lease)
    return registered
