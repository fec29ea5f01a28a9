# SPDX-License-Identifier: Apache-2.0
"""The steps of a deployment as srun's command lines, and the environment that they start from."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.deploy.command import SERVICE_VARIABLES, Command
from dynamo_mpi.deploy.kv_check import NAME as KV_CHECK
from dynamo_mpi.deploy.kv_check import kv_check_words, nodes_of
from dynamo_mpi.deploy.step_programs import check_words, services_words, worker_environment, worker_words
from dynamo_mpi.discovery.records import LAUNCH_VARIABLE
from dynamo_mpi.mpi.restart_count import VARIABLE as ATTEMPT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from dynamo_mpi.deploy.code_location import CodeLocation
    from dynamo_mpi.deploy.deployment import Worker
    from dynamo_mpi.deploy.nodes import Nodes
    from dynamo_mpi.deploy.settings import LaunchSettings

# srun takes options from its environment, where salloc and sbatch have left theirs. Those that we give as flags don't count any more;
# these would change where ranks go, or what they see.
_SRUN_INPUT = (
    "SLURM_CPU_BIND",
    "SLURM_EXACT",
    "SLURM_EXCLUSIVE",
    "SLURM_GPU_BIND",
    "SLURM_GPUS",
    "SLURM_GPUS_PER_TASK",
    "SLURM_HOSTFILE",
    "SLURM_NPROCS",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_CORE",
    "SLURM_NTASKS_PER_GPU",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_NTASKS_PER_SOCKET",
    "SLURM_OVERLAP",
    "SLURM_STEP_GRES",
    "SLURM_TRES_PER_TASK",
    "SLURM_WHOLE",
)
# srun waits for the rest of a step when its first rank leaves; ours all leave together
_WAIT_SECONDS = 60
# Pyxis separates mounts by commas and a mount's parts by colons, and knows no quoting
_SEPARATORS = ",:"


@dataclass(frozen=True)
class Container:
    """The image of all steps, as Pyxis takes it.

    Args:
        image: as Pyxis takes it: ``REGISTRY#IMAGE:TAG``, or a .sqsh file.
        mounts: ``HOST:CONTAINER[:FLAGS]``, ours after the user's.
    """

    image: str
    mounts: tuple[str, ...]

    def options(self, variables: Iterable[str]) -> tuple[str, ...]:
        """Return srun's options.

        Args:
            variables: those that the image must not replace by its own.
        """
        return (
            f"--container-image={self.image}",
            f"--container-mounts={','.join(self.mounts)}",
            f"--container-env={','.join(variables)}",
        )


# a rank of the KV check that rank 0 can't reach gives up by itself before
_CHECK_WAIT_SECONDS = 20


@dataclass(frozen=True)
class Srun:
    """Renders the steps of one deployment.

    Args:
        settings: what was asked for.
        nodes: the allocation.
        container: the image of all steps, if any.
        source: where our code is.
        run_dir: the deployment's folder as the steps see it.
        token: tells our steps from others of the job.
        forwarded: names of variables that the image must not replace by its own.
    """

    settings: LaunchSettings
    nodes: Nodes
    container: Container | None
    source: CodeLocation
    run_dir: str
    token: str
    forwarded: tuple[str, ...] = ()

    def check(self) -> Command:
        """The layouts, before anything starts: on the head node, where paths mean what they mean to the ranks."""
        return self._on_head("check", check_words(self.settings, self.source), worker_environment(self.settings))

    def kv_check(self, workers: Sequence[Worker]) -> Command:
        """The KV check: one rank on each node of both roles."""
        nodes = nodes_of(workers, "prefill", "decode")
        options = (
            f"--mpi={self.settings.mpi}",
            f"--nodes={len(nodes)}",
            f"--nodelist={','.join(nodes)}",
            f"--ntasks={len(nodes)}",
            "--ntasks-per-node=1",
            f"--wait={_CHECK_WAIT_SECONDS}",
        )
        words = kv_check_words(self.settings, self.source, workers)
        # Slurm's PMIx plugin lets MPI start along a ring of nodes otherwise, and a pair that is cut keeps all of them waiting
        environment = {"SLURM_PMIX_FENCE": "tree"}
        command = self._step(KV_CHECK, options, self.settings.srun_args, words, environment, ())
        return _on_nodes(command, nodes)

    def services(self) -> Command:
        """etcd, NATS and the frontend."""
        return self._on_head("services", services_words(self.source, self.run_dir), {})

    def worker(self, worker: Worker, services: Iterable[str] = SERVICE_VARIABLES) -> Command:
        """One worker, with a rank for each GPU.

        Args:
            worker: which.
            services: names of the variables that say where the services are, and what opens them.
        """
        environment = {**worker_environment(self.settings), LAUNCH_VARIABLE: self._step_name(worker.name)}
        options = (
            f"--mpi={self.settings.mpi}",
            f"--nodes={len(worker.nodes)}",
            f"--nodelist={','.join(worker.nodes)}",
            f"--ntasks={worker.ranks}",
            f"--ntasks-per-node={worker.ranks_per_node}",
            "--distribution=block",
            "--kill-on-bad-exit=1",
            f"--wait={_WAIT_SECONDS}",
        )
        words = worker_words(self.settings, self.source, worker, self.run_dir)
        names = (*services, ATTEMPT)
        return _on_nodes(
            self._step(worker.name, options, self.settings.srun_args, words, environment, names), worker.nodes
        )

    def _on_head(self, name: str, words: tuple[str, ...], environment: Mapping[str, str]) -> Command:
        # --overlap: a worker of the head node needs its CPUs
        options = ("--overlap", "--mpi=none", "--nodes=1", f"--nodelist={self.nodes.head}", "--ntasks=1")
        return self._step(name, options, (), words, environment, ())

    def _step(
        self,
        name: str,
        options: tuple[str, ...],
        more: tuple[str, ...],
        words: tuple[str, ...],
        environment: Mapping[str, str],
        names: Iterable[str],
    ) -> Command:
        given = {**environment, "PYTHON": self.source.python}
        step = self._step_name(name)
        common = (f"--jobid={self.nodes.job_id}", f"--job-name={step}", "--label", "--export=ALL")
        variables = dict.fromkeys((*names, *given, *self.forwarded))
        image = self.container.options(variables) if self.container is not None else ()
        lines = tuple((option,) for option in ("srun", *common, *options, *image, *more))
        return Command(name, step, (*lines, words), given)

    def _step_name(self, name: str) -> str:
        return f"dynmpi-{self.token}-{name}"


def _on_nodes(command: Command, nodes: Sequence[str]) -> Command:
    """Have a step of several nodes take them for the job's."""
    # Slurm's PMIx plugin (22.05, and still in 2026) takes a rank's place among the step's nodes for one among the job's when a rank asks
    # for another's address: on a step that doesn't begin on the job's first node that goes astray, and MPI's start hangs
    return replace(command, environment={**command.environment, "SLURM_JOB_NODELIST": ",".join(nodes)})


def token_of(run_dir: Path) -> str:
    """Return what tells the steps of a deployment from others of the same job: the same for the same folder."""
    return f"{zlib.crc32(str(run_dir).encode('utf-8', 'surrogateescape')):08x}"


def without_srun_input(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which srun does what its command line says."""
    return {name: value for name, value in environ.items() if name not in _SRUN_INPUT}


def mount(source: str, target: str, flags: str = "") -> str:
    """Return one mount.

    Raises:
        UsageError: Pyxis couldn't read it.
    """
    for path in (source, target):
        if any(character in path for character in _SEPARATORS):
            raise UsageError(
                f"{path!r} can't be mounted: Pyxis reads commas and colons as separators",
                needed="a path without either",
                fix="move or link it, or another --run-dir",
            )
    return ":".join(filter(None, (source, target, flags)))
