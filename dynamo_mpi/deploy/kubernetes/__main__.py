# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo_mpi.pods lead`` or ``join``: see the package."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import TYPE_CHECKING

from dynamo_mpi.common.display import without_controls
from dynamo_mpi.common.errors import DynamoMpiError, UsageError
from dynamo_mpi.common.files import private_dir
from dynamo_mpi.deploy.kubernetes.leader_pod import LeaderPod
from dynamo_mpi.deploy.kubernetes.settings import PROGRAM, JoinSettings, LeadSettings, load_join, load_lead
from dynamo_mpi.deploy.kubernetes.worker_pod import WorkerPod

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


PREFIX = "dynamo-mpi-pods-"


def main(argv: Sequence[str]) -> int:
    """Run a pod of a group; return the exit code, which in all pods is that of the world."""
    try:
        if argv[:1] == ["lead"]:
            settings = load_lead(argv[1:], os.environ)
            with private_dir(prefix=PREFIX) as folder:
                return asyncio.run(_lead(settings, folder))
        if argv[:1] == ["join"]:
            host = socket.gethostname()
            joining = load_join(argv[1:], os.environ, host)
            with private_dir(prefix=PREFIX) as folder:
                return asyncio.run(_join(joining, host, folder))
        raise UsageError(
            f"{argv[0]!r} was asked for" if argv else "nothing was asked for",
            expected="lead or join",
            fix=f"{PROGRAM} lead --help, {PROGRAM} join --help",
        )
    except DynamoMpiError as error:
        _say(str(error))
        return error.exit_code


async def _lead(settings: LeadSettings, folder: Path) -> int:
    return await LeaderPod(settings, folder, _say).run()


async def _join(settings: JoinSettings, host: str, folder: Path) -> int:
    return await WorkerPod(settings, host, folder, _say).run()


def _say(text: str) -> None:
    print(without_controls(f"dynamo_mpi.pods: {text}"), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
