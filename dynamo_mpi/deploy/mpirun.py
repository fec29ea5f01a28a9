# SPDX-License-Identifier: Apache-2.0
"""The parts of a deployment as plain commands and mpirun's command lines (Open MPI 4 and 5)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_mpi.deploy.srun import token_of
from dynamo_mpi.deploy.step_commands import KV_CHECK_STEP as KV_CHECK
from dynamo_mpi.deploy.step_commands import (
    SERVICE_VARIABLES,
    CodeLocation,
    Command,
    check_words,
    kv_check_words,
    nodes_of,
    services_words,
    worker_environment,
    worker_words,
)
from dynamo_mpi.discovery.records import LAUNCH_VARIABLE
from dynamo_mpi.mpi.restart_count import VARIABLE as ATTEMPT

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dynamo_mpi.deploy.nodes import Worker
    from dynamo_mpi.deploy.settings import LaunchSettings


FOLDER_PREFIX = "dynamo-mpi-launch-"


def folder_environment(folder: Path) -> dict[str, str]:
    """Return the variables that give mpirun (Open MPI 4 and 5) a folder of its own for its session files on this host.

    In the default folder mpirun fails (213) if a killed mpirun with the same process id has left its files there.

    Open MPI 4 sets the session base of ranks itself, so the variable for only the local base would prevent that ranks start.
    """
    return {name: str(folder) for name in ("PRTE_MCA_prte_local_tmpdir_base", "OMPI_MCA_orte_tmpdir_base")}


@dataclass(frozen=True)
class Mpirun:
    """Renders the parts of one deployment; the services run on this host, without a launcher.

    Args:
        settings: the deployment's settings.
        source: location of dynamo_mpi's code.
        run_dir: the deployment's folder.
        forwarded: names of variables that are passed to the ranks.
    """

    settings: LaunchSettings
    source: CodeLocation
    run_dir: str
    forwarded: tuple[str, ...]

    def check(self) -> Command:
        """The check of the layouts, before anything starts."""
        return self._command("check", check_words(self.settings, self.source))

    def kv_check(self, workers: Sequence[Worker]) -> Command:
        """The KV check: one rank on each host of both roles."""
        environment = {"PYTHON": self.source.python}
        placed = self._placed(nodes_of(workers, "prefill", "decode"), 1, {*environment, *self.forwarded})
        lines = (*placed, kv_check_words(self.settings, self.source, workers))
        return Command(KV_CHECK, KV_CHECK, lines, environment)

    def services(self) -> Command:
        """etcd, NATS and the frontend."""
        return self._command("services", services_words(self.source, self.run_dir))

    def worker(self, worker: Worker, services: Iterable[str] = SERVICE_VARIABLES) -> Command:
        """One worker, with a rank for each GPU; ``services`` as for `Srun`."""
        launch = f"dynmpi-{token_of(Path(self.run_dir))}-{worker.name}"
        environment = {**self._environment(), LAUNCH_VARIABLE: launch}
        names = {*services, *environment, *self.forwarded, ATTEMPT}
        placed = self._placed(worker.nodes, worker.ranks_per_node, names)
        lines = (*placed, worker_words(self.settings, self.source, worker, self.run_dir))
        return Command(worker.name, worker.name, lines, environment)

    def _placed(self, nodes: Sequence[str], ranks_per_node: int, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        return (
            self.settings.mpirun,
            ("--host", ",".join(f"{host}:{ranks_per_node}" for host in nodes)),
            ("--map-by", f"ppr:{ranks_per_node}:node"),
            ("-n", str(len(nodes) * ranks_per_node)),
            # names only: mpirun takes the values from its environment, so that they don't appear in its command line
            *(("-x", name) for name in sorted(names)),
        )

    def _command(self, name: str, words: tuple[str, ...]) -> Command:
        return Command(name, name, (words,), self._environment())

    def _environment(self) -> dict[str, str]:
        return {**worker_environment(self.settings), "PYTHON": self.source.python}
