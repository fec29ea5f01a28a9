# SPDX-License-Identifier: Apache-2.0
"""Fixtures with a real Slurm cluster. Where none can be built the tests are skipped, with the reason; with
DYN_MPI_REQUIRE_SLURM=1, as in CI, that is an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from tests.mpi_crashes import pytest_runtest_protocol as pytest_runtest_protocol
from tests.namespaces.anchor import remove_leftovers

from .cluster.cluster import Cluster, why_unavailable
from .session import SlurmSession, skip_or_fail
from .stack import Stack, running_stack


class MakeSlurm(Protocol):
    """Builds another cluster; keyword arguments as in ClusterSettings."""

    def __call__(self, **values: int) -> SlurmSession: ...


@pytest.fixture(scope="session")
def make_slurm(mpich_cache: Path) -> Iterator[MakeSlurm]:
    """Clusters for tests that break theirs; all are taken down at the end of the session, also if it is killed."""
    if reason := why_unavailable():
        skip_or_fail(f"no Slurm cluster: {reason}")
    remove_leftovers()
    with ExitStack() as clusters:

        def make(**values: int) -> SlurmSession:
            cluster = Cluster.temporary(**values)
            clusters.callback(cluster.down)
            cluster.up(die_with_parent=True)
            return SlurmSession(cluster, mpich_cache)

        yield make


@pytest.fixture(scope="session")
def slurm(make_slurm: MakeSlurm) -> SlurmSession:
    """The cluster that tests share: 4 nodes with 4 CPUs and 4 GPUs each, as far as Slurm knows."""
    return make_slurm()


@pytest.fixture(scope="module")
def stack(slurm: SlurmSession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """etcd and the frontend, for all workers of a module."""
    with running_stack(slurm, tmp_path_factory.mktemp("stack")) as running:
        yield running
