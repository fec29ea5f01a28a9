# SPDX-License-Identifier: Apache-2.0
"""What a cluster consists of, and where each of its files lies."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.namespaces.errors import ClusterError

NETWORK = "10.213.77"
"""First three numbers of every address. Exists only inside the cluster's own network namespaces."""
LOGIN = "login"
SLURMCTLD_PORT = 6817
SLURMD_PORT = 6818
LONGEST_STATE_PATH = 64
"""Slurm's longest socket is STATE/spool.n99/stepd.slurm.pmix.JOB.STEP, and a Unix socket's path ends at 107 characters."""


def cable(node: str) -> str:
    """The login node's end of a compute node's cable: a network interface."""
    return f"to-{node}"


@dataclass(frozen=True)
class ClusterSettings:
    """One cluster.

    Attributes:
        state: private folder of this cluster; identifies it.
        nodes: compute nodes, named n1, n2, ...
        cpus_per_node: CPUs that each node claims, whatever the machine has.
        gpus_per_node: fake GPUs per node; 0 for none.
        kill_wait: seconds between SIGTERM and SIGKILL when Slurm ends a job (Slurm's own default is 30).
        node_timeout: seconds without an answer after which slurmctld gives a node up (Slurm's own default is 300).
        requeue_delay: seconds that a requeued job waits (Slurm's ``cred_expire``, 120 by default).

    Raises:
        ClusterError: a value that cannot work.
    """

    state: Path
    nodes: int = 4
    cpus_per_node: int = 4
    gpus_per_node: int = 4
    kill_wait: int = 5
    node_timeout: int = 10
    requeue_delay: int = 120

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 99:
            raise ClusterError(f"{self.nodes} nodes asked for: 1 to 99 are possible")
        if self.cpus_per_node < 1 or self.gpus_per_node < 0:
            raise ClusterError("a node needs at least one CPU, and no fewer than no GPUs")
        if not self.state.is_absolute() or len(str(self.state)) > LONGEST_STATE_PATH:
            raise ClusterError(
                f"state folder {self.state}: must be an absolute path of at most {LONGEST_STATE_PATH} characters, "
                "as Unix sockets lie in it"
            )

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(f"n{number}" for number in range(1, self.nodes + 1))

    @property
    def addresses(self) -> dict[str, str]:
        """IPv4 address of every host, the login node first."""
        return {LOGIN: f"{NETWORK}.254"} | {
            name: f"{NETWORK}.{number}" for number, name in enumerate(self.node_names, start=1)
        }

    @property
    def slurm_conf(self) -> Path:
        return self.state / "slurm.conf"

    @property
    def hosts(self) -> Path:
        return self.state / "hosts"

    @property
    def logs(self) -> Path:
        return self.state / "log"

    @property
    def munge_socket(self) -> Path:
        return self.state / "munge" / "socket"

    @property
    def munge_key(self) -> Path:
        return self.state / "munge" / "key"

    @property
    def gpu_devices(self) -> tuple[Path, ...]:
        return tuple(self.state / "dev" / f"nvidia{number}" for number in range(self.gpus_per_node))

    @property
    def temporary(self) -> Path:
        """TMPDIR of everything that runs in the cluster, so that nothing is left in /tmp."""
        return self.state / "tmp"

    @property
    def pyxis_plugin(self) -> Path:
        """The stand-in under the real one's name, which Slurm's messages have."""
        return self.state / "spank_pyxis.so"

    @property
    def container_root(self) -> Path:
        """Where the stand-in mounts an image, in a mount namespace of each step's own."""
        return self.state / "root"

    @property
    def pmix_library(self) -> Path:
        """Copy of Debian's PMIx folder, completed (see ``config.complete_pmix_library``)."""
        return self.state / "pmix_library"

    @property
    def anchor(self) -> Path:
        """Which process holds the cluster (see ``processes.ProcessIdentity``)."""
        return self.state / "anchor.json"

    @property
    def file(self) -> Path:
        return self.state / "settings.json"

    def save(self) -> None:
        self.file.write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def load(cls, state: Path) -> ClusterSettings:
        """Read the settings of a cluster that was built before.

        Raises:
            ClusterError: there is none in that folder.
        """
        try:
            values = json.loads((state / "settings.json").read_text())
        except FileNotFoundError:
            raise ClusterError(f"no cluster in {state}: build one with 'up'") from None
        return cls(**{**values, "state": state})
