# SPDX-License-Identifier: Apache-2.0
"""Doctor's checks of Slurm: its commands, MPI plugins, container support, and the current job."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dynamo_mpi.layout.format import counted
from dynamo_mpi.mpi.job_time_limit import JobTimeLimit
from dynamo_mpi.mpi.launcher import Launcher
from dynamo_mpi.ops.doctor.check import Check, Context, Probe, Section, Status, error, ok, skipped, warning
from dynamo_mpi.ops.doctor.commands import Output, find, run
from dynamo_mpi.ops.doctor.slurm_output import (
    first_node,
    pmix_refusal,
    read_controllers,
    read_mpi_list,
    read_time_left,
    read_version,
    takes_containers,
)
from dynamo_mpi.ops.doctor.tmpfs import check_tmpfs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


# the first version with --overlap, which launch uses for the services' step
OLDEST = (20, 11)
_SHORT_SECONDS = 600
_TRY_PMIX = ("srun", "--mpi=pmix", "--test-only", "-n1", "true")


def check_version(context: Context) -> Iterator[Check]:
    """Check srun."""
    output = _ask(context, "srun", "--version")
    yield _no_program("srun", context.environ) if output is None else judge_version(output)


def judge_version(output: Output) -> Check:
    """Judge ``srun --version``."""
    if output.problem:
        return _silent("srun", "srun --version", output)
    version = read_version(output.text)
    found = " ".join(output.text.split())
    if version is not None and version < OLDEST:
        needed = f"Slurm {OLDEST[0]}.{OLDEST[1]} or newer: launch starts the services with srun --overlap"
        return warning("srun", found, needed, "start the steps by hand, or have Slurm updated")
    return ok("srun", found)


def check_controller(context: Context) -> Iterator[Check]:
    """Check whether slurmctld answers."""
    output = _ask(context, "scontrol", "ping")
    if output is not None:
        yield judge_controller(output)


def judge_controller(output: Output) -> Check:
    """Evaluate ``scontrol ping``, whose exit code is 1 if none is up."""
    up = read_controllers(output.text)
    if any(up.values()):
        down = [name for name, is_up in up.items() if not is_up]
        return ok(
            "controller",
            f"{', '.join(name for name in up if up[name])} up" + (f"; {', '.join(down)} down" if down else ""),
        )
    if not up:
        return _silent("controller", "scontrol ping", output)
    fix = "wait, or ask the cluster's administrators; scontrol ping shows it"
    return warning(
        "controller", f"slurmctld on {', '.join(up)} is down", "a controller that answers: no job or step starts", fix
    )


def check_mpi_plugins(context: Context) -> Iterator[Check]:
    """Check whether srun has a usable MPI plugin."""
    output = _ask(context, "srun", "--mpi=list")
    if output is None:
        yield _no_program("mpi-plugins", context.environ)
    else:
        plugins = judge_mpi_plugins(output, context.environ.get("SLURM_MPI_TYPE", ""))
        yield plugins
        # a plugin is listed even if its library is missing; --test-only submits nothing
        if plugins.status is Status.OK and (tried := _ask(context, *_TRY_PMIX)) is not None:
            yield judge_pmix(tried)


def judge_mpi_plugins(output: Output, chosen: str = "") -> Check:
    """Evaluate ``srun --mpi=list``, and the choice of ``SLURM_MPI_TYPE``."""
    plugins = None if output.code is None else read_mpi_list(output.text)
    if plugins is None:
        return _silent("mpi-plugins", "srun --mpi=list", output)
    found = ", ".join(plugins.types) + (f" ({', '.join(plugins.pmix_versions)})" if plugins.pmix_versions else "")
    if not plugins.pmix:
        needed = "pmix, which Open MPI, and so TensorRT-LLM, needs; pmi2 is MPICH's"
        fix = "have Slurm's PMIx plugin installed (slurm built --with-pmix), or launch by mpirun: --hostfile FILE"
        return warning("mpi-plugins", f"no pmix among {found or 'none'}", needed, fix)
    if chosen and chosen not in (*plugins.types, *plugins.pmix_versions):
        return warning(
            "mpi-plugins",
            f"SLURM_MPI_TYPE is {chosen}, which is none of {found}",
            "one of them",
            "unset SLURM_MPI_TYPE",
        )
    return ok("mpi-plugins", f"pmix there: {found}")


def judge_pmix(output: Output) -> Check:
    """Evaluate an ``srun --test-only`` that must load the PMIx plugin. Other errors, as that no nodes are free, say nothing about PMIx."""
    if refusal := pmix_refusal(output.text):
        needed = "a PMIx library where Slurm's plugin looks for it: no step with --mpi=pmix starts"
        fix = "have libpmix installed, or its symlink libpmix.so (Debian: libpmix-dev), on every node"
        return error("pmix", f"srun lists pmix, and can't load it: {refusal}", needed, fix)
    if output.problem:
        return skipped("pmix", f"whether srun can load it isn't known: {output.problem}")
    return ok("pmix", "srun can load it")


def check_pyxis(context: Context) -> Iterator[Check]:
    """Check whether srun can start containers."""
    output = _ask(context, "srun", "--help")
    if output is None:
        yield _no_program("pyxis", context.environ)
    else:
        yield judge_pyxis(output, context.environ)


def judge_pyxis(output: Output, environ: Mapping[str, str]) -> Check:
    """Evaluate ``srun --help``: a missing Pyxis is a problem only if an image is set."""
    if output.code is None or "--" not in output.text:
        return _silent("pyxis", "srun --help", output)
    if takes_containers(output.text):
        return ok("pyxis", "srun takes --container-image")
    if not environ.get("IMAGE"):
        return skipped("pyxis", "srun has no --container-image: no Pyxis; needed for steps in a container (IMAGE)")
    needed = "Pyxis, Slurm's plugin for containers"
    return warning(
        "pyxis",
        "IMAGE is set, and srun has no --container-image",
        needed,
        "unset IMAGE, and give PYTHON; or have Pyxis installed",
    )


def check_enroot(context: Context) -> Iterator[Check]:
    """Check enroot, which Pyxis needs; a login node need not have it."""
    output = _ask(context, "enroot", "version")
    if output is None:
        yield skipped("enroot", "enroot isn't on PATH here; Pyxis needs it on the compute nodes")
    elif output.problem:
        yield _silent("enroot", "enroot version", output)
    else:
        yield ok("enroot", " ".join(output.out.split()))


def check_job(context: Context) -> Iterator[Check]:
    """Check the current allocation."""
    job = context.environ.get("SLURM_JOB_ID")
    if not job:
        yield skipped(
            "job", "no Slurm job: SLURM_JOB_ID isn't set", "salloc --nodes=N --exclusive --gpus-per-node=G, or sbatch"
        )
        return
    yield ok("job", describe_job(context.environ))
    if (limit := JobTimeLimit.of(context.environ)) is not None:
        yield judge_time_left(int(limit.end - time.time()))
    elif output := _ask(context, "squeue", "--noheader", f"--job={job}", "--format=%L"):
        left = None if output.problem else read_time_left(output.out)
        yield skipped("time-left", "Slurm reports no time limit") if left is None else judge_time_left(left)
    if (nodes := judge_step_nodes(context.environ, context.launch.launcher)) is not None:
        yield nodes


def describe_job(environ: Mapping[str, str]) -> str:
    """Describe the resources of the job, and of the step."""
    nodes = environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES", "?")
    text = f"job {environ['SLURM_JOB_ID']}: {_counted(nodes, 'node')} ({environ.get('SLURM_JOB_NODELIST', '?')})"
    if tasks := environ.get("SLURM_NTASKS"):
        text += f", {_counted(tasks, 'task')}"
    if gpus := environ.get("SLURM_GPUS_ON_NODE"):
        text += f", {_counted(gpus, 'GPU')} on this node"
    if step := environ.get("SLURM_STEP_ID"):
        text += f"; in step {step} on {environ.get('SLURM_STEP_NODELIST', '?')}"
    return text


def _counted(number: str, noun: str) -> str:
    return counted(int(number), noun) if number.isdecimal() else f"{number} {noun}s"


def judge_time_left(seconds: int) -> Check:
    """Evaluate the remaining time of the job: a large model takes long to load."""
    minutes = max(0, seconds) // 60
    if seconds < _SHORT_SECONDS:
        return warning(
            "time-left",
            counted(minutes, "minute"),
            "time for the load, and for an orderly end",
            "a new job, or scontrol update TimeLimit=",
        )
    return ok("time-left", counted(minutes, "minute") if minutes < 600 else counted(minutes // 60, "hour"))


def judge_step_nodes(environ: Mapping[str, str], launcher: Launcher) -> Check | None:
    """Check a step that doesn't begin on the job's first node: Slurm's PMIx plugin may then contact the wrong node, and MPI's start hangs."""
    step, job = environ.get("SLURM_STEP_NODELIST", ""), environ.get("SLURM_JOB_NODELIST", "")
    first, job_first = first_node(step), first_node(job)
    if launcher is not Launcher.SLURM_PMIX or not first or not job_first or first == job_first:
        return None
    return warning(
        "step-nodes",
        f"this step begins on {first}, the job on {job_first}",
        "a step that begins on the job's first node, as Slurm's PMIx plugin sees it: MPI's start may hang otherwise",
        f"SLURM_JOB_NODELIST={step} srun --mpi=pmix …, as dynamo-mpi launch does it",
    )


def check_variables(context: Context) -> Iterator[Check]:
    """Check Slurm's input variables that change the meaning of an srun command."""
    yield from judge_variables(context.environ, in_rank=context.in_rank)


def judge_variables(environ: Mapping[str, str], *, in_rank: bool) -> Iterator[Check]:
    """Evaluate them. In a rank, ``SLURM_EXPORT_ENV`` is that of the srun that started it."""
    export = environ.get("SLURM_EXPORT_ENV", "ALL")
    if not in_rank and export.split(",")[0] in ("NONE", "NIL"):
        needed = "ALL, or nothing: the ranks need MODEL_PATH, ETCD_ENDPOINTS and the like"
        yield warning("export", f"SLURM_EXPORT_ENV={export}", needed, "unset SLURM_EXPORT_ENV, or srun --export=ALL")
    for name in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND"):
        if value := environ.get(name, "").replace("none", ""):
            yield warning(
                name,
                f"{name}={value}",
                "every rank sees all GPUs of its node (K9)",
                f"unset {name}; srun --gpus-per-node=N without --gpus-per-task and --gpu-bind",
            )


def _ask(context: Context, program: str, *words: str) -> Output | None:
    path = find(program, context.environ)
    return None if path is None else run([path, *words], context.environ, context.left())


def _no_program(id: str, environ: Mapping[str, str]) -> Check:
    if environ.get("SLURM_JOB_ID"):
        return skipped(
            id,
            "srun isn't on PATH: inside a container Slurm's commands are the host's",
            "dynamo-mpi doctor on the host",
        )
    return skipped(id, "srun isn't on PATH: no Slurm here")


def _silent(id: str, command: str, output: Output) -> Check:
    """Return the check for a command without a usable answer."""
    if "configuration source" in output.text:
        return skipped(id, "Slurm's commands are installed, but no cluster is configured")
    found = f"{command}: {output.problem or 'an answer that can not be read: ' + ' '.join(output.text.split())[:200]}"
    return warning(
        id,
        found,
        "an answer: launch would wait like that too",
        f"{command} by hand; scontrol ping checks the controller",
    )


SECTION = Section(
    "slurm",
    (
        Probe("srun", check_version),
        Probe("controller", check_controller),
        Probe("mpi-plugins", check_mpi_plugins),
        Probe("pyxis", check_pyxis),
        Probe("enroot", check_enroot),
        Probe("tmpfs", check_tmpfs),
        Probe("job", check_job),
        Probe("variables", check_variables),
    ),
)
