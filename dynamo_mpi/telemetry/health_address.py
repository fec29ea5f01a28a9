# SPDX-License-Identifier: Apache-2.0
"""The address of a node's health server, from Dynamo's own variables. Pure. Imported before the preflight if ``DYN_SYSTEM_PORT`` is set."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

PORT_VARIABLE, HOST_VARIABLE = "DYN_SYSTEM_PORT", "DYN_SYSTEM_HOST"
_HEALTH_VARIABLE, _LIVE_VARIABLE = "DYN_SYSTEM_HEALTH_PATH", "DYN_SYSTEM_LIVE_PATH"
_EVERYWHERE = ("", "0.0.0.0", "::", "[::]")  # noqa: S104 - what a user may choose, and Dynamo's default
_MOST_PORT = 65535


class HealthAddress(NamedTuple):
    """Address and paths of the health server.

    Args:
        host: the host to listen at.
        port: the port; 0 for any.
        health_path: path of the readiness answer.
        live_path: path of the liveness answer.
    """

    host: str
    port: int
    health_path: str = "/health"
    live_path: str = "/live"

    @property
    def is_everywhere(self) -> bool:
        """Whether it listens at all interfaces."""
        return self.host in _EVERYWHERE

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> HealthAddress | None:
        """Read the address; None if it is off, as by default or with a negative port.

        Raises:
            UsageError: the port is invalid.
        """
        text = environ.get(PORT_VARIABLE, "").strip()
        if not text:
            return None
        try:
            port = int(text)
        except ValueError:
            port = _MOST_PORT + 1
        if port > _MOST_PORT:
            raise UsageError(
                f"{PORT_VARIABLE} is {text!r}",
                needed=f"a TCP port, at most {_MOST_PORT}; 0 for any that is free; unset or negative for none",
                fix=f"correct {PORT_VARIABLE}",
            )
        if port < 0:
            return None
        return cls(
            environ.get(HOST_VARIABLE, "").strip() or "0.0.0.0",  # noqa: S104 - Dynamo's default
            port,
            environ.get(_HEALTH_VARIABLE) or "/health",
            environ.get(_LIVE_VARIABLE) or "/live",
        )
