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
    """One worker's.

    Args:
        rank: what each part of rank 0 shares.
        settings: the worker's.
        guard: ends the world.
        hooks: follow the worker's life.
        cards: the ranks', in rank order.
        departure: the way out of discovery.
    """

    rank: RankContext
    settings: Settings
    guard: WorldSupervisor
    hooks: WorkerHooks
    cards: Sequence[RankReport]
    departure: InstanceLease
