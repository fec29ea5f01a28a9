# SPDX-License-Identifier: Apache-2.0
"""Two hosts for the tests. Where none can be built the tests are skipped, with the reason; with DYN_MPI_REQUIRE_SLURM=1 that is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.mpi_crashes import pytest_runtest_protocol as pytest_runtest_protocol
from tests.mpi_flavours import Unavailable
from tests.namespaces.anchor import remove_leftovers
from tests.slurm.session import skip_or_fail

from .hosts import Hosts, why_unavailable
from .launchers import Launcher, find_launcher

FindLauncher = Callable[[str], Launcher]
MakeHosts = Callable[..., Hosts]


@pytest.fixture(scope="session")
def make_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeHosts]:
    """Hosts that see the tests' folders; arguments as for `Hosts`. All are taken down at the end of the session, also if it is killed."""
    if reason := why_unavailable():
        skip_or_fail(f"no hosts: {reason}")
    remove_leftovers()
    with ExitStack() as running:

        def make(count: int, *, resolvable: bool = True, second_rate: str = "") -> Hosts:
            base = tmp_path_factory.getbasetemp().resolve()
            return running.enter_context(Hosts(count, [base], resolvable=resolvable, second_rate=second_rate))

        yield make


@pytest.fixture(scope="session")
def hosts(make_hosts: MakeHosts) -> Hosts:
    """The two hosts that tests share."""
    return make_hosts(2)


@pytest.fixture(scope="session")
def find(mpich_cache: Path) -> FindLauncher:
    """Returns a launcher by its flavour's name, or else the test is skipped."""

    def look_up(name: str) -> Launcher:
        launcher = find_launcher(name, mpich_cache)
        if isinstance(launcher, Unavailable):
            skip_or_fail(f"no {launcher.name}: {launcher.reason}")
        return launcher

    return look_up
