# SPDX-License-Identifier: Apache-2.0
"""A command line of a deployment, and its display."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# The variables that services.json provides for every worker. They are known in advance: Pyxis needs names, and a dry run shows them.
SERVICE_VARIABLES = (
    "ETCD_ENDPOINTS",
    "ETCD_AUTH_CA",
    "ETCD_AUTH_CLIENT_CERT",
    "ETCD_AUTH_CLIENT_KEY",
    "NATS_SERVER",
    "NATS_AUTH_USERNAME",
    "NATS_AUTH_PASSWORD",
)


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        name: the step's name in dynamo_mpi: ``services``, ``prefill-0``.
        step: the step's name in Slurm, unique in the job.
        lines: the command line, split into lines for the display; it contains no secret.
        environment: variables added to our own; they contain no secret, as a dry run shows them.
    """

    name: str
    step: str
    lines: tuple[tuple[str, ...], ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def words(self) -> tuple[str, ...]:
        """The command line."""
        return tuple(word for line in self.lines for word in line)

    def shown(self) -> str:
        """Return it in shell syntax, preceded by the variables."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " \\\n    ".join([*variables, *map(shlex.join, self.lines)])
