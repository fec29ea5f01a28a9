# SPDX-License-Identifier: Apache-2.0
"""Takes a worker out of discovery that was killed whole: by Slurm, by the kernel for its memory, or with its nodes.

As long as one of its node agents lives, a worker does that itself, see `supervisor.lease_revoker`. What it has in etcd stands in its record.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from dynamo_mpi.discovery.etcd_http import query_etcd
from dynamo_mpi.discovery.records import list_workers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.discovery.etcd import EtcdClient

SECONDS = 2.0


def revoke_registrations(launch: str, environ: Mapping[str, str]) -> bool:
    """Revoke what a worker has left in etcd that doesn't run any more. Takes no longer than `SECONDS`.

    Args:
        launch: what its ranks were told that they are launched as.
        environ: where etcd and our credentials stand, as the worker has it.

    Returns:
        Whether it was still registered.

    Raises:
        DiscoveryError: no endpoint has answered in time.
        AuthorizationError: they refuse us.
        UsageError: what is set for etcd can't be used.
    """
    return query_etcd(environ, SECONDS, lambda etcd: _clear(launch, etcd))


def _clear(launch: str, etcd: EtcdClient) -> bool:
    registered = False
    for worker in list_workers(etcd)[0]:
        if worker.record.launch != launch:
            continue
        with contextlib.suppress(ValueError):  # its instance is no number
            instance = int(worker.record.instance or "0", 16)
            # the instance first: requests go there
            registered |= 0 < instance < 2**63 and etcd.revoke(instance)
            if worker.lease:
                etcd.revoke(worker.lease)
    return registered
