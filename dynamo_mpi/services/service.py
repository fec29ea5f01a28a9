# SPDX-License-Identifier: Apache-2.0
"""What etcd, NATS and the frontend have in common while they come up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from dynamo_mpi.services.failures import LOG_LINES
from dynamo_mpi.services.ports import holds_port

if TYPE_CHECKING:
    from dynamo_mpi.services.processes import LoggedProcess


class Service(Protocol):
    """A part with one port."""

    @property
    def name(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def url(self) -> str: ...
    def command(self) -> tuple[str, ...]: ...
    def environment(self) -> dict[str, str]: ...
    def answers(self) -> bool: ...


ServiceT = TypeVar("ServiceT", bound=Service)


def is_up(service: Service, child: LoggedProcess) -> bool:
    """Tell whether a service answers, and it is this child that does: somebody else may have taken its port."""
    return holds_port(child.pid, service.port) and service.answers()


def lost_its_port(child: LoggedProcess) -> bool:
    """Tell whether a service that ended had found its port taken, after all."""
    return any("already in use" in line for line in child.last_lines(LOG_LINES))
