# SPDX-License-Identifier: Apache-2.0
"""Rank 0's address and the supervision settings, which rank 0 sends with the preflight result."""

from __future__ import annotations

import json

from dynamo_mpi.common.light_typing import NamedTuple

SERVING_SECONDS = 60.0
"""The default heartbeat timeout: longer than anything that holds the GIL while serving."""
LOADING_SECONDS = 300.0
"""The default while loading: importing a library of gigabytes from a cold shared file system holds the GIL all the time."""
_LOADING_PHASES = ("preflight", "hardware_check", "stage", "load")
_MAX_INTERVAL_SECONDS = 5.0
# half of what TCP waits for an acknowledgement
_MAX_SILENCE_SECONDS = 10.0
_LENGTH_BYTES = 4


class SupervisorConfig(NamedTuple):
    """How a world is supervised; the fields are settings of the same names.

    Args:
        network: the network in which rank 0 listens.
        heartbeat_timeout: see `Rendezvous`.
        failure_dir: see `Rendezvous`.
        label: see `Rendezvous`.
        log_dir: see `Rendezvous`.
        address: the address of this host at which rank 0 listens; empty for the one in ``network``.
    """

    network: str | None = None
    heartbeat_timeout: float | None = None
    failure_dir: str = ""
    label: str = "worker"
    log_dir: str = ""
    address: str = ""


class Rendezvous(NamedTuple):
    """How the other ranks reach rank 0, and the settings of the supervision.

    Args:
        host: rank 0's host.
        address: the address at which rank 0 listens; empty in a world of one rank.
        port: the port at which rank 0 listens.
        token: hexadecimal secret of the ranks of this world.
        heartbeat_timeout: seconds without a heartbeat after which a rank counts as hung; 0 for never, None for the defaults.
        failure_dir: directory for failure files; empty for none.
        label: prefix of the files' names.
        has_agent: whether a node agent reports rank 0's exit.
        log_dir: directory for log files; empty for none.
        agent_port: the port at which rank 0's node agent accepts other agents; 0 for none.
        agent_token: hexadecimal secret of the node agents of this world.
        far_rank: the first rank on another host than rank 0's; 0 for none.
    """

    host: str
    address: str = ""
    port: int = 0
    token: str = ""
    heartbeat_timeout: float | None = None
    failure_dir: str = ""
    label: str = "worker"
    has_agent: bool = False
    log_dir: str = ""
    agent_port: int = 0
    agent_token: str = ""
    far_rank: int = 0

    def heartbeat_timeout_for(self, phase: str) -> float | None:
        """Return the heartbeat timeout in a phase, in seconds; None for no timeout."""
        if self.heartbeat_timeout is not None:
            return self.heartbeat_timeout or None
        return LOADING_SECONDS if phase in _LOADING_PHASES else SERVING_SECONDS

    @property
    def silence_seconds(self) -> float:
        """Seconds without an acknowledgement by a host after which rank 0 warns, a quarter of the timeout at most."""
        return min(_MAX_SILENCE_SECONDS, (self.heartbeat_timeout or SERVING_SECONDS) / 4)

    @property
    def heartbeat_interval(self) -> float:
        """Seconds between two heartbeats, a quarter of the timeout at most."""
        return min(_MAX_INTERVAL_SECONDS, (self.heartbeat_timeout or SERVING_SECONDS) / 4)

    def pack(self, rest: bytes) -> bytes:
        """Encode it, followed by the rest of rank 0's message."""
        data = json.dumps(self._asdict()).encode()
        return len(data).to_bytes(_LENGTH_BYTES, "little") + data + rest

    def as_json(self) -> str:
        """Encode it as one line for this rank's node agent."""
        return json.dumps({"rendezvous": self._asdict()})

    @classmethod
    def unpack(cls, data: bytes) -> tuple[Rendezvous, bytes]:
        """Decode the result of `pack`; return also the rest."""
        end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        return cls(**json.loads(data[_LENGTH_BYTES:end])), data[end:]
