# SPDX-License-Identifier: Apache-2.0
"""Fixtures with a real Slurm cluster. Where none can be built the tests are skipped, with the reason; with
DYN_MPI_REQUIRE_SLURM=1, as in CI, that is an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest
from _pytest.runner import runtestprotocol

from dynamo_mpi.supervisor.failure_reports import rank_died
from tests.namespaces.anchor import remove_leftovers

from .cluster.cluster import Cluster, why_unavailable
from .session import SlurmSession, skip_or_fail

# About one start in 240 of Debian's Open MPI 4.1.4 under its Slurm ends so on a busy machine: in MPI_Init_thread the TCP transport calls what
# isn't there yet (core: mca_btl_tcp under opal_progress under ompi_mpi_init), as a rank of the other node is ahead. PMIx 4.2.2 releases
# one rank from the fence that is to keep them together. No line of ours has run between.
MPI_START_CRASHES = (
    ("Signal: Segmentation fault (11)", "Failing at address: (nil)"),
    # Debian 13's Open MPI 5.0.7, whose ob1 meets a message of a rank that is ahead
    ("mca_pml_ob1_recv_frag_callback_match", "ompi_mpi_init", ": Segmentation fault"),
    # where the crashed rank's own words haven't come through: srun's, and those of its node agent
    (": Segmentation fault", f"error in mpi_init: {rank_died('', 'mpi_init').problem}"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Run a test once more whose MPI crashed in its own start, and for nothing else; log it."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    if any(report.failed and has_crashed_in_mpis_start(report.longreprtext) for report in reports):
        item.config.issue_config_time_warning(
            UserWarning(f"{item.name} ran once more: Open MPI crashed in MPI_Init_thread"), stacklevel=1
        )
        item._initrequest()  # type: ignore[attr-defined] # as for a first run: its fixtures are made anew
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def has_crashed_in_mpis_start(text: str) -> bool:
    return any(all(words in text for words in crash) for crash in MPI_START_CRASHES)


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
