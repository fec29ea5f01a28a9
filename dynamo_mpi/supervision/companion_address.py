# SPDX-License-Identifier: Apache-2.0
"""Where the ranks of one world on one node meet their companion. Imported by every rank before the verdict."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.launchers.launch import Launch


def address_of(launch: Launch, environ: Mapping[str, str]) -> str:
    """Return a name in Linux's abstract name space, which leaves no file behind; empty where there is none.

    It differs between users and between worlds, so that several on a node don't meet.
    """
    if not sys.platform.startswith("linux"):
        return ""
    world = environ.get("PMIX_NAMESPACE") or (
        f"step {launch.job_id}.{launch.step_id}" if launch.job_id and launch.step_id else ""
    )
    # without a name for the world there is no telling its ranks on a node from another's, but for one that is alone
    if not world and launch.size == 1:
        world = f"process {os.getpid()}"
    return f"\0dynamo_mpi {os.getuid()} {world}" if world else ""
