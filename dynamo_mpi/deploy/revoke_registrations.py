# SPDX-License-Identifier: Apache-2.0
"""Deregisters a worker of which all processes were killed: by Slurm, by the kernel's out-of-memory killer, or with its nodes.

If one of its node agents survives, that does it, see `supervisor.lease_revoker`. The worker's record names its entries in etcd.
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
    """Revoke the leases of a worker that no longer runs. Takes at most `SECONDS`.

    Args:
        launch: the launch name that its ranks got.
        environ: has etcd's endpoints and credentials, as for the worker.

    Returns:
        Whether it was still registered.

    Raises:
        DiscoveryError: no endpoint has answered in time.
        AuthorizationError: they reject our credentials.
        UsageError: the settings for etcd can't be used.
    """
    return query_etcd(environ, SECONDS, lambda etcd: _clear(launch, etcd))


def _clear(launch: str, etcd: EtcdClient) -> bool:
    registered = False
    for worker in list_workers(etcd)[0]:
        if worker.record.launch != launch:
            continue
        with contextlib.suppress(ValueError):  # its instance is not a number
            instance = int(worker.record.instance or "0", 16)
            # the instance first, so that it gets no more requests
            registered |= 0 < instance < 2**63 and etcd.revoke(instance)
            if worker.lease:
                etcd.revoke(worker.lease)
    return registered
