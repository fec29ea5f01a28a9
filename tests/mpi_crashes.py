# SPDX-License-Identifier: Apache-2.0
"""Crashes of an MPI library or its launcher in MPI's start, where no line of ours can help: the test runs again, for them alone, and says so.

A ``conftest.py`` whose tests may meet them imports `pytest_runtest_protocol`.
"""

from __future__ import annotations

import pytest
from _pytest.runner import runtestprotocol

from dynamo_mpi.supervisor.failure_reports import rank_died

MOST_RUNS = 3
CRASHES = (
    # About one start in 240 of Debian's Open MPI 4.1.4 under its Slurm ends so on a busy machine: in MPI_Init_thread the TCP transport calls
    # what isn't there yet (core: mca_btl_tcp under opal_progress under ompi_mpi_init), as a rank of the other node is ahead. PMIx 4.2.2
    # releases one rank from the fence that is to keep them together. No line of ours has run between.
    ("Signal: Segmentation fault (11)", "Failing at address: (nil)"),
    # Debian 13's Open MPI 5.0.7, whose ob1 meets a message of a rank that is ahead
    ("mca_pml_ob1_recv_frag_callback_match", "ompi_mpi_init", ": Segmentation fault"),
    # where the crashed rank's own words haven't come through: srun's, and those of its node agent
    (": Segmentation fault", f"error in mpi_init: {rank_died('', 'mpi_init').problem}"),
    # Open MPI 5.0.11's mpirun aborts or hangs, a third of the time on a busy machine, if a rank connects to it in MPI_Init just when it ends
    # all ranks because another has left (core: its PMIx thread locks memory that is freed; strace: the connection's descriptor is closed
    # by another thread while that one answers it). It prints no more of what ranks and node agents write.
    (" in mpi_init\n", "PMIX ERROR: PMIX_ERR_UNREACH in file", "ptl_base_connection_hdlr.c"),
    # MPICH 5.0.2, a third of the time on a busy machine: the first message to a rank of another host that has just died crashes the sender
    # (core: PMPI_Ibarrier)
    (" fault: ", " in preflight\n", "APPLICATION TERMINATED WITH THE EXIT STRING: Segmentation fault (signal 11)"),
)


def is_mpi_crash(text: str) -> bool:
    """Return whether a failed test's text has all words of one of the crashes."""
    return any(all(words in text for words in crash) for crash in CRASHES)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Run a test again whose MPI has crashed, and for nothing else; log it."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for run in range(MOST_RUNS):
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        if run + 1 == MOST_RUNS or not any(report.failed and is_mpi_crash(report.longreprtext) for report in reports):
            break
        item.config.issue_config_time_warning(UserWarning(f"{item.name} runs again: MPI has crashed"), stacklevel=1)
        item._initrequest()  # type: ignore[attr-defined] # as for a first run: its fixtures are made anew
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
