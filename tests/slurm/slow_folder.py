# SPDX-License-Identifier: Apache-2.0
"""A slow shared folder on the nodes of the cluster: each mounts one folder of this machine by FUSE, with one rate for all."""

from __future__ import annotations

import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.slow_share import SlowShare

from .session import SlurmSession
from .stack import OUR_MODULES


@contextmanager
def slow_folder(slurm: SlurmSession, folder: Path, mountpoint: Path, rate: float = 0) -> Iterator[SlowShare]:
    """Mount a folder on each node, until the block ends.

    Args:
        slurm: the cluster.
        folder: what the nodes see.
        mountpoint: where; it is made.
        rate: bytes a second for all nodes together; 0 for no limit.
    """
    mountpoint.mkdir()
    share = SlowShare(folder, rate)
    # short: a unix socket's name holds 107 bytes
    with tempfile.TemporaryDirectory(prefix="share-") as place, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{place}/s")
        listener.listen()
        share.serve(listener)
        try:
            for node in slurm.nodes:
                mount = (sys.executable, "-m", "tests.bench.slow_share", f"{place}/s", mountpoint)
                done = slurm.exec(*mount, env=OUR_MODULES, host=node)
                assert done.returncode == 0, done.stderr
            yield share
        finally:
            for node in slurm.nodes:
                slurm.exec("umount", "--lazy", mountpoint, host=node)
