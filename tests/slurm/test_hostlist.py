# SPDX-License-Identifier: Apache-2.0
"""Our reading of Slurm's lists of hosts against Slurm's own."""

from __future__ import annotations

import pytest

from dynamo_mpi.deploy.hostlist import expand
from tests.unit.test_hostlist import LISTS

from .session import SlurmSession

pytestmark = pytest.mark.slurm


def test_slurm_reads_the_lists_as_we_do(slurm: SlurmSession) -> None:
    for written in LISTS:
        done = slurm.exec("scontrol", "show", "hostnames", written)
        assert tuple(done.stdout.split()) == expand(written, "--nodes")
