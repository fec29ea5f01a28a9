# SPDX-License-Identifier: Apache-2.0
"""Where and how the other ranks reach rank 0 from the verdict on: it travels with the verdict itself."""

from __future__ import annotations

import json
from typing import NamedTuple

SERVING_SECONDS = 60.0
"""How long a rank may be silent by default. Longer than anything that holds Python's lock while it serves."""
LOADING_SECONDS = 300.0
"""The same while it loads: importing a library of gigabytes from a cold shared file system holds Python's lock all the time."""
_LOADING = ("preflight", "hardware_check", "load")
_MOST_PERIOD_SECONDS = 5.0
_LENGTH_BYTES = 4


class Rendezvous(NamedTuple):
    """What every rank has to know of rank 0.

    Args:
        host: rank 0's node.
        address: where rank 0 listens; empty in a world of one rank.
        port: the same.
        token: hexadecimal; whoever knows it is a rank of this world.
        heartbeat_timeout: seconds of silence that are too long; 0 for none, None for the defaults.
        failure_dir: folder for failure files; empty for none.
        label: begins their names.
        has_agent: a process beside rank 0 reports its end.
        log_dir: folder for log files; empty for none.
        agent_port: where rank 0's node agent hears those of other nodes; 0 for nowhere.
        agent_token: hexadecimal; what the node agents of this world know.
        far_rank: the first rank of another node than rank 0's; 0 for none.
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
        """Return how many seconds of silence are too long in a phase; None where no silence is."""
        if self.heartbeat_timeout is not None:
            return self.heartbeat_timeout or None
        return LOADING_SECONDS if phase in _LOADING else SERVING_SECONDS

    @property
    def heartbeat_interval(self) -> float:
        """Seconds between two heartbeats: a few may be late."""
        return min(_MOST_PERIOD_SECONDS, (self.heartbeat_timeout or SERVING_SECONDS) / 4)

    def pack(self, rest: bytes) -> bytes:
        """Encode it together with what else rank 0 has to say."""
        data = json.dumps(self._asdict()).encode()
        return len(data).to_bytes(_LENGTH_BYTES, "little") + data + rest

    def as_json(self) -> str:
        """Encode it, in a line, for this rank's node agent."""
        return json.dumps({"meeting": self._asdict()})

    @classmethod
    def unpack(cls, data: bytes) -> tuple[Rendezvous, bytes]:
        """Decode what `pack` made."""
        end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        return cls(**json.loads(data[_LENGTH_BYTES:end])), data[end:]
