# SPDX-License-Identifier: Apache-2.0
"""Chooses the port of the Dynamo runtime's own server on rank 0; the health server, at the user's port, forwards other requests to it.

The runtime writes it into the model card, and frontends fetch the tokenizer's files from it, so it must not listen on loopback only.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.host_address import host_address
from dynamo_mpi.common.ports import holder, in_url, is_free

if TYPE_CHECKING:
    from dynamo_mpi.telemetry.health_address import HealthAddress

# The runtime reads it as a signed 16-bit number. The system assigns dynamic ports from 32768 on, so a port below stays free until the
# runtime uses it, which may be minutes later.
_LEAST, _MOST = 20000, 32767
_TRIES = 200


def runtime_port(address: HealthAddress, choice: int | None) -> int:
    """Return a port for the runtime.

    Args:
        address: the health server's address.
        choice: the user's choice, if any.

    Raises:
        UsageError: the chosen port is in use, or none is free.
    """
    host = address.host.strip("[]")
    if choice is not None:
        if not is_free(choice, host):
            raise UsageError(
                f"the Dynamo runtime can't listen at its port {choice}: {holder(choice) or 'another program'} listens there",
                expected="a free port beside DYN_SYSTEM_PORT, from which frontends fetch the model's tokenizer",
                fix="free it, or choose another --runtime-system-port (DYN_MPI_RUNTIME_SYSTEM_PORT), or none",
            )
        return choice
    for _ in range(_TRIES):
        port = _LEAST + secrets.randbelow(_MOST - _LEAST + 1)
        if is_free(port, host):
            return port
    raise UsageError(
        f"no port between {_LEAST} and {_MOST} is free for the Dynamo runtime",
        expected="one beside DYN_SYSTEM_PORT",
        fix="name one by --runtime-system-port (DYN_MPI_RUNTIME_SYSTEM_PORT)",
    )


def url_of(address: HealthAddress) -> str:
    """Return the health server's URL for other hosts."""
    host = address.host.strip("[]")
    if address.is_everywhere:
        host = host_address(None, "")
    return f"http://{in_url(host)}:{address.port}"
