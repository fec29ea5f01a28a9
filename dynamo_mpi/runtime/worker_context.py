# SPDX-License-Identifier: Apache-2.0
"""The objects that rank 0's modules share from preflight on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.checks.rank_report import RankReport
    from dynamo_mpi.common.hooks import WorkerHooks
    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.discovery.registration_monitor import InstanceLease
    from dynamo_mpi.supervisor.context import RankContext
    from dynamo_mpi.supervisor.supervisor import WorldSupervisor


@dataclass(frozen=True)
class WorkerContext:
    """The context of one worker on rank 0.

    Args:
        rank: rank 0's context.
        settings: the worker's settings.
        supervisor: supervises and ends the world.
        hooks: the observers of the worker's lifecycle.
        reports: the ranks' preflight reports, in rank order.
        instance_lease: the lease of Dynamo's instance, for deregistration.
    """

    rank: RankContext
    settings: Settings
    supervisor: WorldSupervisor
    hooks: WorkerHooks
    reports: Sequence[RankReport]
    instance_lease: InstanceLease
