# SPDX-License-Identifier: Apache-2.0
"""Assigns nodes to workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import UsageError

if TYPE_CHECKING:
    from dynamo_mpi.deploy.nodes import Nodes
    from dynamo_mpi.deploy.settings import LaunchSettings


@dataclass(frozen=True)
class Worker:
    """One worker of a deployment.

    Args:
        name: unique, such as ``prefill-0``.
        role: ``agg``, ``prefill`` or ``decode``.
        engine_config: its path for the ranks.
        nodes: its nodes.
        ranks_per_node: one for each GPU.
    """

    name: str
    role: str
    engine_config: str
    nodes: tuple[str, ...]
    ranks_per_node: int

    @property
    def ranks(self) -> int:
        return len(self.nodes) * self.ranks_per_node


def nodes_wanted(settings: LaunchSettings) -> int:
    """Return the number of nodes for all workers; the head node is one of them."""
    return sum(nodes * workers for _, nodes, workers in map(settings.of, settings.worker_roles))


def assign(settings: LaunchSettings, nodes: Nodes) -> tuple[Worker, ...]:
    """Assign nodes to each worker: neighbours in Slurm's order, prefill first.

    Raises:
        UsageError: there are too few nodes.
    """
    wanted, parts = nodes_wanted(settings), []
    if wanted > len(nodes.names):
        listed = ", ".join(
            f"{workers} {role} worker{'s' if workers > 1 else ''} x {count} node{'s' if count > 1 else ''}"
            for role in settings.worker_roles
            for _, count, workers in [settings.of(role)]
        )
        where = f"job {nodes.job_id}" if nodes.job_id else f"the hostfile {settings.hostfile}"
        raise UsageError(
            f"{listed}: that takes {wanted} nodes, and {where} has {len(nodes.names)} ({', '.join(nodes.names)})",
            needed=f"at least {wanted} nodes",
            fix="a larger allocation, or fewer nodes or workers: NUM_PREFILL_NODES, NUM_DECODE_NODES, NUM_NODES and their _WORKERS",
        )
    free = iter(nodes.names)
    for role in settings.worker_roles:
        config, count, workers = settings.of(role)
        assert config is not None  # noqa: S101 - read_settings has seen to it
        for number in range(workers):
            own = tuple(next(free) for _ in range(count))
            parts.append(Worker(f"{role}-{number}", role, config, own, settings.gpus_per_node))
    return tuple(parts)
