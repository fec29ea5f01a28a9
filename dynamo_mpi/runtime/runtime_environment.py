# SPDX-License-Identifier: Apache-2.0
"""Prepares the environment of Dynamo's runtime on rank 0, before any of its modules is imported."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dynamo_mpi.common.credentials import clients_environ
from dynamo_mpi.discovery.connectivity import check_connectivity
from dynamo_mpi.discovery.etcd import EtcdAuth, lease_seconds
from dynamo_mpi.discovery.runtime_compat import check_runtime_can_use, remove_empty_credentials
from dynamo_mpi.runtime.reach import set_runtime_address

if TYPE_CHECKING:
    from dynamo_mpi.common.networks import Choice
    from dynamo_mpi.config.worker import Settings


def prepare_runtime(settings: Settings, rank0_address: Choice | None) -> list[str]:
    """Check that etcd and NATS answer, and set the variables of Dynamo's runtime; return warnings.

    Raises:
        DynamoMpiError: a service doesn't answer, refuses the credentials, or can't be used by the runtime.
    """
    endpoints = check_connectivity(clients_environ(), settings.request_plane, settings.probe_timeout)
    warnings = check_runtime_can_use(endpoints, EtcdAuth.from_env(clients_environ()))
    export_runtime_env(endpoints)
    set_runtime_address(rank0_address, endpoints, os.environ)
    return warnings


def export_runtime_env(etcd: list[str]) -> None:
    """Set the environment variables that the Dynamo runtime reads: the etcd endpoints, reachable ones first, NATS, and its lease's lifetime,
    whose default differs between releases (10 s in 1.4.2, 30 s in 1.6.1) and must be that of our own leases."""
    os.environ["ETCD_ENDPOINTS"] = ",".join(etcd)
    os.environ["ETCD_LEASE_TTL"] = str(lease_seconds(os.environ))
    server = os.environ.pop("NATS_SERVER", "")
    # a batch script may set it empty for "none", which the runtime takes for an address; it also requires a scheme
    if server:
        os.environ["NATS_SERVER"] = server if "://" in server else f"nats://{server}"
    remove_empty_credentials(os.environ)
