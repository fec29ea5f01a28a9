# SPDX-License-Identifier: Apache-2.0
"""The steps of a deployment as command lines: of srun, or plain commands and mpirun's (Open MPI 4 and 5)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_mpi.checks.node_probe import HERE, ProbeResult
from dynamo_mpi.deploy.nodes import is_this_host
from dynamo_mpi.deploy.step_commands import (
    COPY_STEP,
    KV_CHECK,
    STEP_PREFIX,
    CodeLocation,
    Command,
    check_flags,
    check_words,
    kv_check_words,
    nodes_of,
    only_stage_words,
    probe_words,
    services_environment,
    services_words,
    spare_words,
    worker_environment,
    worker_words,
)
from dynamo_mpi.discovery.records import LAUNCH_VARIABLE
from dynamo_mpi.mpi.launcher import ATTEMPT_VARIABLE as ATTEMPT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dynamo_mpi.deploy.nodes import Nodes, Worker
    from dynamo_mpi.deploy.pyxis import Container
    from dynamo_mpi.deploy.settings import LaunchSettings

# srun takes options from its environment, in which salloc and sbatch leave theirs. Our flags override some; the others, listed here, would
# change the placement of ranks, or their devices.
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
# the step of a lost node keeps its place on the other nodes until the job ends (Slurm 22.05): without --overlap the next one waits for it
_NO_KILL = ("--no-kill", "--overlap")
# srun waits for the rest of a step when its first rank exits; ours all exit together
_WAIT_SECONDS = 60
GDS_VARIABLE = "PMIX_MCA_gds"
# --overlap: a worker on the node needs its CPUs
_ON_ONE_NODE = ("--overlap", "--nodes=1", "--ntasks=1")
# a rank of the KV check that can't reach rank 0 ends by itself before
_CHECK_WAIT_SECONDS = 20


@dataclass(frozen=True)
class Srun:
    """Renders the steps of one deployment.

    Args:
        settings: the deployment's settings.
        nodes: the allocation.
        container: the image of all steps, if any.
        source: location of dynamo_mpi's code.
        run_dir: the path of the deployment's folder in the steps.
        token: distinguishes this deployment's steps from others of the job.
        forwarded: names of variables that the image must not override.
    """

    settings: LaunchSettings
    nodes: Nodes
    container: Container | None
    source: CodeLocation
    run_dir: str
    token: str
    forwarded: tuple[str, ...] = ()

    def check(self) -> Command:
        """The check of the layouts, before anything starts: on the head node, where paths are the same as for the ranks."""
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
        # otherwise Slurm's PMIx plugin uses a ring of nodes, in which one disconnected pair blocks the start of MPI on all nodes
        environment = {"SLURM_PMIX_FENCE": "tree"}
        command = self._step(KV_CHECK, options, self.settings.srun_args, words, environment, ())
        return _on_nodes(command, nodes)

    def services(self) -> Command:
        """etcd, NATS and the frontend; before them, in a container, the check."""
        flags = check_flags(self.settings) if self.checks_in_services else ()
        environment = worker_environment(self.settings) if flags else {}
        return self._on_head("services", services_words(self.source, self.run_dir, flags), environment)

    @property
    def checks_in_services(self) -> bool:
        """Whether the step of the services runs the check first: each step unpacks its image."""
        return self.container is not None and not self.settings.skip_check

    def worker(self, worker: Worker) -> Command:
        """One worker, with a rank for each GPU."""
        environment = {
            **services_environment(self.run_dir),
            **worker_environment(self.settings),
            LAUNCH_VARIABLE: self._step_name(worker.name),
        }
        # Slurm's order, in which it numbers a step's nodes: a spare may stand in any place
        nodes = sorted(worker.nodes, key=self.nodes.names.index)
        options = (
            f"--mpi={self.settings.mpi}",
            f"--nodes={len(nodes)}",
            f"--nodelist={','.join(nodes)}",
            f"--ntasks={worker.ranks}",
            f"--ntasks-per-node={worker.ranks_per_node}",
            "--distribution=block",
            # the ranks bind themselves, to their GPUs' CPUs; SRUN_ARGS come later, and win
            "--cpu-bind=none",
            "--kill-on-bad-exit=1",
            f"--wait={_WAIT_SECONDS}",
            *(_NO_KILL if self.settings.no_kill else ()),
        )
        words = worker_words(self.settings, self.source, worker, self.run_dir)
        step = self._with_folders()._step(worker.name, options, self.settings.srun_args, words, environment, (ATTEMPT,))
        return _on_nodes(step, nodes)

    def _with_folders(self) -> Srun:
        """Return the same with the workers' folders mounted into the image."""
        ours = self
        for folder in filter(None, (self.settings.stage_dir, self.settings.cache_dir)):
            if ours.container is not None:
                ours = replace(ours, container=ours.container.with_mount(str(folder)))
        return ours

    def probe(self, node: str) -> Command:
        """The probe of a node after a failure. With a container it only shows that the node takes a step: to unpack the image would take
        longer than all else, and the ranks check the GPUs again before they load."""
        if self.container is None:
            return self._on_node(node, f"probe-{node}", probe_words(self.source), {})
        words = ("printf", "%s\\n", HERE, ProbeResult().line)
        return replace(self, container=None)._on_node(node, f"probe-{node}", words, {})

    def prepare(self, node: str) -> tuple[Command, ...]:
        """What makes a spare ready: the hardware check in the container, which brings the image; a copy of the model if that is staged."""
        words = spare_words(self.settings, self.source, self.run_dir, node)
        options, environment = (*_ON_ONE_NODE, f"--nodelist={node}"), worker_environment(self.settings)
        # with the GPUs that a worker's step would get
        own, more = self._with_folders(), self.settings.srun_args
        check = own._step(f"spare-{node}", (*options, "--mpi=none"), more, words, environment, ())
        if self.settings.stage_dir is None:
            return (check,)
        with_mpi, words = (*options, f"--mpi={self.settings.mpi}"), only_stage_words(self.source)
        return check, _on_nodes(own._step(f"{COPY_STEP}{node}", with_mpi, more, words, environment, ()), (node,))

    def _on_head(self, name: str, words: tuple[str, ...], environment: Mapping[str, str]) -> Command:
        return self._on_node(self.nodes.head, name, words, environment)

    def _on_node(self, node: str, name: str, words: tuple[str, ...], environment: Mapping[str, str]) -> Command:
        options = (*_ON_ONE_NODE, "--mpi=none", f"--nodelist={node}")
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
        starts_mpi = any(option.startswith("--mpi=pmix") for option in options)
        if self.container is not None and starts_mpi and GDS_VARIABLE not in self.container.variables:
            # PMIx 5's server hands job data out by files in Slurm's TmpFS, by default /tmp; but a container has a /tmp of its own
            given[GDS_VARIABLE] = "hash"
        step = self._step_name(name)
        common = (f"--jobid={self.nodes.job_id}", f"--job-name={step}", "--label", "--export=ALL")
        variables = dict.fromkeys((*names, *given, *self.forwarded))
        image = self.container.options(variables) if self.container is not None else ()
        lines = tuple((option,) for option in ("srun", *common, *options, *image, *more))
        return Command(name, step, (*lines, words), given)

    def _step_name(self, name: str) -> str:
        return f"{STEP_PREFIX}{self.token}-{name}"


def _on_nodes(command: Command, nodes: Sequence[str]) -> Command:
    """Make a step of several nodes treat them as the job's nodes."""
    # Slurm's PMIx plugin (22.05, and still in 2026) uses a node's index in the step as its index in the job when a rank needs
    # another's address: in a step that doesn't begin on the job's first node that is wrong, and the start of MPI hangs
    return replace(command, environment={**command.environment, "SLURM_JOB_NODELIST": ",".join(nodes)})


def staging_step(
    job: str, nodes: Sequence[str], mpi: str, srun_args: tuple[str, ...], words: tuple[str, ...]
) -> Command:
    """Return the step that copies a model to nodes, beside the job's other steps.

    Args:
        job: the job's id.
        nodes: the nodes, one rank on each.
        mpi: srun's MPI plugin.
        srun_args: further words for srun.
        words: the ranks' command line.
    """
    count = len(nodes)
    placed = (f"--nodes={count}", f"--nodelist={','.join(nodes)}", f"--ntasks={count}", "--ntasks-per-node=1")
    ends = ("--kill-on-bad-exit=1", f"--wait={_WAIT_SECONDS}")
    options = (
        f"--jobid={job}",
        "--job-name=dynamo-mpi-stage",
        "--export=ALL",
        "--overlap",
        f"--mpi={mpi}",
        *placed,
        *ends,
    )
    return _on_nodes(Command("stage", "stage", (("srun", *options, *srun_args), words)), nodes)


def token_of(run_dir: Path) -> str:
    """Return the token that distinguishes a deployment's steps from others of the same job: constant for a folder."""
    return f"{zlib.crc32(str(run_dir).encode('utf-8', 'surrogateescape')):08x}"


def without_srun_input(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without variables that change srun's command line."""
    return {name: value for name, value in environ.items() if name not in _SRUN_INPUT}


# each rank binds itself to its GPU's CPUs (--cpu-bind), of which mpirun (Open MPI 5 and 4) knows nothing; a flag of mpirun's wins over them
UNBOUND = {"PRTE_MCA_hwloc_default_binding_policy": "none", "OMPI_MCA_hwloc_base_binding_policy": "none"}
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

    @property
    def checks_in_services(self) -> bool:
        """Never: there is no container."""
        return False

    def services(self) -> Command:
        """etcd, NATS and the frontend."""
        return self._command("services", services_words(self.source, self.run_dir))

    def worker(self, worker: Worker) -> Command:
        """One worker, with a rank for each GPU."""
        launch = f"{STEP_PREFIX}{token_of(Path(self.run_dir))}-{worker.name}"
        environment = {**services_environment(self.run_dir), **self._environment(), LAUNCH_VARIABLE: launch}
        names = {*environment, *self.forwarded, ATTEMPT}
        placed = self._placed(worker.nodes, worker.ranks_per_node, names)
        lines = (*placed, worker_words(self.settings, self.source, worker, self.run_dir))
        return Command(worker.name, worker.name, lines, environment)

    def probe(self, node: str) -> Command:
        """The probe of a host after a failure."""
        return self._on_one(f"probe-{node}", node, probe_words(self.source), {"PYTHON": self.source.python})

    def prepare(self, node: str) -> tuple[Command, ...]:
        """What makes a spare host ready: the hardware check, and a copy of the model, where it is staged."""
        environment, words = self._environment(), spare_words(self.settings, self.source, self.run_dir, node)
        check, name = self._on_one(f"spare-{node}", node, words, environment), f"{COPY_STEP}{node}"
        if self.settings.stage_dir is None:
            return (check,)
        placed = self._placed((node,), 1, {*environment, *self.forwarded})
        return check, Command(name, name, (*placed, only_stage_words(self.source)), environment)

    def _on_one(self, name: str, node: str, words: tuple[str, ...], environment: Mapping[str, str]) -> Command:
        if is_this_host(node):
            return Command(name, name, (words,), environment)
        lines = (*self._placed((node,), 1, {*environment, *self.forwarded}), words)
        return Command(name, name, lines, environment)

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
