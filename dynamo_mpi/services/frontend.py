# SPDX-License-Identifier: Apache-2.0
"""Dynamo's OpenAI-compatible HTTP server as a child process."""

from __future__ import annotations

import site
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_mpi.services.asking import get_json
from dynamo_mpi.services.ports import ANY_ADDRESS, LOOPBACK, in_url

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Frontend:
    """Dynamo's OpenAI-compatible HTTP server.

    It copies every model's tokenizer to ``~/.cache/dynamo``; ``home`` is where that goes, None the user's own.

    Args:
        port: of HTTP.
        discovery: variables by which it finds etcd and NATS.
        home: what it takes for the user's home.
        host: the address to listen at.
        reach: the address that it is asked at, where ``host`` stands for all of them.
        arguments: further words for its command line.
    """

    port: int
    discovery: Mapping[str, str]
    home: Path | None = None
    name: str = "frontend"
    host: str = LOOPBACK
    reach: str = LOOPBACK
    arguments: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"http://{in_url(self._reached_at)}:{self.port}"

    def command(self) -> tuple[str, ...]:
        own = (sys.executable, "-m", "dynamo.frontend", "--http-host", in_url(self.host), "--http-port", str(self.port))
        return (*own, *self.arguments)

    def environment(self) -> dict[str, str]:
        if self.home is None:
            return dict(self.discovery)
        # Packages installed with pip's --user are found by way of HOME as well.
        return {**self.discovery, "HOME": str(self.home), "PYTHONUSERBASE": site.getuserbase()}

    def answers(self) -> bool:
        return get_json(self.port, "/live", host=self._reached_at)[0] == 200

    def models(self) -> list[str]:
        """Return the names of the models it serves now."""
        status, body = get_json(self.port, "/v1/models", host=self._reached_at)
        return [str(entry.get("id")) for entry in body.get("data") or []] if status == 200 else []

    @property
    def _reached_at(self) -> str:
        return self.reach if self.host in ANY_ADDRESS else self.host
