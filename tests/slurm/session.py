# SPDX-License-Identifier: Apache-2.0
"""What a test does with a Slurm cluster: the fixture ``slurm`` is a :class:`SlurmSession`."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from tests.mpi_flavours import MpiFlavour, Unavailable, debian_openmpi, mpich_wheel
from tests.namespaces.commands import InsideProcess

from .cluster.cluster import Cluster
from .cluster.settings import LOGIN

REQUIRE = "DYN_MPI_REQUIRE_SLURM"
Argument = str | Path
DEFAULT_TIMEOUT = 60.0
"""Seconds for one command."""
UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "RESIZING")


@dataclass(frozen=True)
class SlurmSession:
    """A running cluster.

    Every command starts from this process's environment without any launcher's variables, with this Python's folder first on
    PATH; ``env`` adds to it. The nodes see this machine's files, so ``sys.executable`` and ``tmp_path`` hold there too.
    Which nodes a job gets is Slurm's choice, and an earlier job may still be completing on the first: name them (--nodelist).
    The nodes' network is their own: servers that ranks should reach run inside, on ``login`` or a node (``popen``).

    Attributes:
        cluster: for what is not offered here.
        mpich_cache: where PyPI's MPICH is kept.
    """

    cluster: Cluster
    mpich_cache: Path

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the compute nodes."""
        return self.cluster.settings.node_names

    @property
    def addresses(self) -> dict[str, str]:
        """IPv4 address of ``login`` and of each node."""
        return self.cluster.settings.addresses

    def image(self, name: str, **variables: str) -> Path:
        """Make an image for the stand-in of Pyxis, a text file with the image's variables, in the folder in which commands start."""
        path = self.cluster.settings.state / name
        path.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
        return path

    @property
    def debian_openmpi_env(self) -> Mapping[str, str]:
        """Makes mpi4py use Debian's Open MPI, for ``srun --mpi=pmix``."""
        return self.require(debian_openmpi()).library_environment

    @property
    def mpich_env(self) -> Mapping[str, str]:
        """Makes mpi4py use PyPI's MPICH, for ``srun --mpi=pmi2``."""
        return self.require(mpich_wheel(self.mpich_cache)).library_environment

    def require(self, flavour: MpiFlavour | Unavailable) -> MpiFlavour:
        """The flavour, or else the test is skipped; with DYN_MPI_REQUIRE_SLURM=1 it fails."""
        if isinstance(flavour, Unavailable):
            skip_or_fail(f"no {flavour.name}: {flavour.reason}")
        return flavour

    def exec(
        self,
        *argv: Argument,
        env: Mapping[str, str] | None = None,
        host: str = LOGIN,
        cwd: Path | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, or on ``host``, to its end.

        Raises:
            subprocess.TimeoutExpired: it took longer than ``timeout`` seconds, and was ended.
        """
        return self.cluster.run(argv, host=host, environment=self.environment(env), cwd=cwd, timeout=timeout)

    def popen(
        self, *argv: Argument, env: Mapping[str, str] | None = None, host: str = LOGIN, cwd: Path | None = None
    ) -> InsideProcess:
        """Start a command whose stdout and stderr are pipes; its ``send_signal`` reaches the command itself."""
        return self.cluster.popen(argv, host=host, environment=self.environment(env), cwd=cwd)

    def srun(
        self,
        *arguments: Argument,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> subprocess.CompletedProcess[str]:
        """``exec`` of srun on the login node."""
        return self.exec("srun", *arguments, env=env, cwd=cwd, timeout=timeout)

    def sbatch(
        self,
        *arguments: Argument,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> subprocess.CompletedProcess[str]:
        """``exec`` of sbatch on the login node. Rather than its ``--wait``, which looks every ten seconds: ``wait_for_job``."""
        return self.exec("sbatch", *arguments, env=env, cwd=cwd, timeout=timeout)

    def wait_for_job(self, job_id: str, timeout: float = DEFAULT_TIMEOUT) -> dict[str, str]:
        """Wait until a job has ended; return what scontrol says of it, such as JobState and ExitCode ("CODE:SIGNAL").

        Args:
            job_id: as ``sbatch --parsable`` prints it; blanks around it don't matter.
            timeout: seconds.

        Raises:
            TimeoutError: it has not ended by then.
            ValueError: there is no such job.
        """
        deadline = time.monotonic() + timeout
        while True:
            shown = self.exec("scontrol", "--oneliner", "show", "job", job_id.strip())
            if shown.returncode:
                raise ValueError(f"job {job_id.strip()}: {shown.stderr.strip()}")
            facts = dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)
            if facts["JobState"] not in UNFINISHED:
                return facts
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id.strip()} is {facts['JobState']} after {timeout:g} s")
            time.sleep(0.1)

    def kill_node(self, node: str) -> None:
        """Power a node off; Slurm gets no notice."""
        self.cluster.kill_node(node)

    def start_node(self, node: str) -> None:
        """Power a node on and wait until every node is idle."""
        self.cluster.start_node(node)

    def switch_cable(self, node: str, *, on: bool) -> None:
        """Cut a running node off from the network, or connect it again."""
        self.cluster.switch_cable(node, on=on)

    def stop_slurmd(self, node: str, *, stopped: bool) -> None:
        """Let a node's slurmd not answer, or let it go on."""
        self.cluster.stop_slurmd(node, stopped=stopped)

    def drain(self, node: str, reason: str = "maintenance") -> None:
        """Take a node out as an administrator does: it gets no further job; steps of the job that has it go on."""
        done = self.exec("scontrol", "update", f"nodename={node}", "state=drain", f"reason={reason}")
        assert done.returncode == 0, done.stderr

    def resume(self, node: str) -> None:
        """Put a drained node back."""
        done = self.exec("scontrol", "update", f"nodename={node}", "state=resume")
        assert done.returncode == 0, done.stderr

    def pids(self, host: str) -> list[int]:
        """Pids, on this machine, of a host's processes, to be signalled with os.kill."""
        return self.cluster.pids(host)

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        return {**self.cluster.default_environment(), **(extra or {})}


def skip_or_fail(reason: str) -> NoReturn:
    """Skip the test, or let it fail where DYN_MPI_REQUIRE_SLURM=1 says that everything must be there, as in CI."""
    if os.environ.get(REQUIRE) == "1":
        pytest.fail(f"{REQUIRE}=1, but {reason}", pytrace=False)
    pytest.skip(reason)
