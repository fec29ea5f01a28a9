# SPDX-License-Identifier: Apache-2.0
"""Chooses a service's port if another job uses the default one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import DiscoveryError, UsageError
from dynamo_mpi.common.ports import holder, is_free
from dynamo_mpi.deploy.head_node.settings import MAX_PORT

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from dynamo_mpi.deploy.head_node.settings import Port

SPREAD, FURTHER = 500, 10


def offset(job_id: str | None) -> int:
    """Return the offset for a port in use: 1 to 500, from the job's id, so that jobs on one node rarely collide."""
    digits = job_id if job_id is not None and job_id.isdecimal() else "0"
    return 1 + int(digits) % SPREAD


def candidates(port: Port, job_id: str | None) -> list[int]:
    """Return the ports to try, in order: the requested one; unless the user named it, that + offset; then in steps of 500."""
    if port.fixed:
        return [port.number]
    further = [port.number + offset(job_id) + SPREAD * step for step in range(FURTHER)]
    return [port.number, *(number for number in further if number <= MAX_PORT)]


class Ports:
    """The ports of one address that a service may still try.

    Args:
        port: the requested one.
        host: the address.
        job_id: Slurm's job id.
        others: ports of the job's other services, which this one must not use.
    """

    def __init__(self, port: Port, host: str, job_id: str | None, others: Collection[int] = ()) -> None:
        self._port, self._host = port, host
        self._all = [number for number in candidates(port, job_id) if number not in others]
        self._left: Iterator[int] = iter(self._all)

    def next(self) -> int:
        """Return the next free port.

        Raises:
            UsageError: the port that the user named is in use.
            DiscoveryError: all are in use.
        """
        for number in self._left:
            if is_free(number, self._host):
                return number
        wanted, setting = self._port.number, self._port.setting
        by = holder(wanted)
        taken = f"port {wanted} of {self._host} is taken" + (f" by {by}" if by else ", or this user may not have it")
        if self._port.fixed:
            raise UsageError(taken, fix=f"another {setting}, or none: then a free one is taken")
        raise DiscoveryError(
            f"{taken}, and so are the {len(self._all) - 1} others that this job tries, up to {self._all[-1]}",
            fix=f"name a free one by {setting}, or look for what earlier jobs have left on this node",
        )
