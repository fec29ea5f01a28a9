# SPDX-License-Identifier: Apache-2.0
"""Takes a worker out of discovery that was killed whole: by Slurm, by the kernel for its memory, or with its nodes.

As long as one of its node agents lives, a worker does that itself, see `supervision.lease_revoker`. What it has in etcd stands in its record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.control_plane.ask_etcd import ask_etcd
from dynamo_mpi.control_plane.record import WorldRecord, worlds_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.control_plane.etcd_gateway import EtcdGateway

SECONDS = 2.0


def take_out(launch: str, environ: Mapping[str, str]) -> bool:
    """Revoke what a worker has left in etcd that doesn't run any more. Takes no longer than `SECONDS`.

    Args:
        launch: what its ranks were told that they are launched as.
        environ: where etcd and our credentials stand, as the worker has it.

    Returns:
        Whether it was still registered.

    Raises:
        DiscoveryError: no endpoint has answered in time.
        AuthorisationError: they refuse us.
        UsageError: what is set for etcd can't be used.
    """
    return ask_etcd(environ, SECONDS, lambda gateway: _clear(launch, gateway))


def _clear(launch: str, gateway: EtcdGateway) -> bool:
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
