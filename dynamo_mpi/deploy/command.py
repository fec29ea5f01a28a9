# SPDX-License-Identifier: Apache-2.0
"""One command line that a deployment runs, and how it is shown."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# What the services' file gives to every worker. Named beforehand: Pyxis takes names, and a dry run shows them.
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
    """What is run.

    Args:
        name: of the step, in our words: ``services``, ``prefill-0``.
        step: of the step in Slurm's: unique in the job.
        lines: the command line, as it is laid out when shown; nothing secret is in it.
        environment: laid over our own; nothing secret either, as a dry run shows it.
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
        """Return it as a shell takes it, the variables before it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " \\\n    ".join([*variables, *map(shlex.join, self.lines)])
