# SPDX-License-Identifier: Apache-2.0
"""Launch a whole deployment: etcd, NATS and Dynamo's frontend on the head node, and prefill and decode (or aggregated) workers.

Inside a Slurm allocation each part is a job step on nodes of its own; with --hostfile mpirun starts it. Arguments after ``--`` are passed to
every worker. It runs until Ctrl-C, SIGTERM, SIGUSR2 (a batch script's warning before its time limit), a few minutes before the end of the
job's time (SLURM_JOB_END_TIME), or `dynamo-mpi down`, and ends only the steps that it started. The exit code is that of the failed step.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_mpi.cli.style import write_out
from dynamo_mpi.common.display import without_controls
from dynamo_mpi.common.errors import DynamoMpiError, UsageError
from dynamo_mpi.common.files import private_dir
from dynamo_mpi.common.log_tail import Follower
from dynamo_mpi.common.os_errors import of_os_error
from dynamo_mpi.common.process import DRAIN_SIGNALS, home_variable
from dynamo_mpi.common.signals import SIGNALS, Interrupted, Interrupts
from dynamo_mpi.config.options import add_options
from dynamo_mpi.config.variables import known_only
from dynamo_mpi.deploy import no_kill
from dynamo_mpi.deploy.controller import DeploymentController, LaunchContext
from dynamo_mpi.deploy.excluded import excluded_before
from dynamo_mpi.deploy.launchers import FOLDER_PREFIX, UNBOUND, Mpirun, Srun, folder_environment, token_of
from dynamo_mpi.deploy.node_watch import NodeWatch
from dynamo_mpi.deploy.nodes import (
    STAND_IN_JOB,
    Nodes,
    allocated,
    assign,
    choose,
    nodes_wanted,
    of_dry_run,
    of_hostfile,
)
from dynamo_mpi.deploy.pyxis import Container, check_mounts, mount, read_user_options, resolve_image
from dynamo_mpi.deploy.refusals import check_folders, check_inputs, check_root, check_worker_flags
from dynamo_mpi.deploy.run_dir import RunDir, write_refusal
from dynamo_mpi.deploy.run_files import check_run_dir
from dynamo_mpi.deploy.services import StepFailed
from dynamo_mpi.deploy.settings import OPTIONS, LaunchSettings, read_settings, unknown
from dynamo_mpi.deploy.step_commands import CHECKOUT_INSIDE, RUN_DIR_INSIDE, CodeLocation, find_source, needs_kv_check
from dynamo_mpi.deploy.steps import MpirunStepController, SlurmStepController, end_of_job
from dynamo_mpi.mpi.job_time_limit import VARIABLE as END

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence

    from dynamo_mpi.deploy.excluded import ExcludedNode
    from dynamo_mpi.deploy.nodes import Placement
    from dynamo_mpi.deploy.step_commands import CommandBuilder
    from dynamo_mpi.deploy.steps import StepController

TAKES_FURTHER_WORDS = True
# the logs may be on a shared file system
_FOLLOW_SECONDS = 0.5
# our own lines in every rank's output; the load of a large model prints thousands of others
_OURS = ("dynamo_mpi: rank ", '"target":"dynamo_mpi"')
# no list of hosts, so a count, or a mistake in one
_NUMBER = re.compile(r"[-+.\d]+")
# variables that the user sets for the programs, and, without an image, for Python and the linker
_FORWARDED = ("DYN_", "HEAD_NODE", "HF_", "NCCL_", "OMP_", "TLLM_", "TRACEPARENT", "TRACESTATE", "TRTLLM_", "UCX_")
# mpirun hands these to the ranks itself; an image may have its own
_MPI_PARAMETERS = ("OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_")
_BARE_METAL = (
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "PATH",
    "PYTHONPATH",
    "SLURM_JOB_END_TIME",
    "SLURM_RESTART_COUNT",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    add_options(parser, OPTIONS)
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    parser.add_argument(
        "--verbose", action="store_true", help="show all output of the steps, not only dynamo_mpi's lines"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    try:
        return _run(arguments)
    except DynamoMpiError as error:
        if not arguments.dry_run and (path := _refused_at(arguments)) is not None:
            write_refusal(path, error.exit_code, f"the launch was refused: {error}")
        raise


def _refused_at(arguments: argparse.Namespace) -> Path | None:
    """Return the folder in which a `wait` may run for the refused launch: the one that was named, this job's, or mpirun's if it exists."""
    named, job = arguments.run_dir or os.environ.get("DYN_MPI_RUN_DIR"), os.environ.get("SLURM_JOB_ID", "")
    path = Path(os.path.abspath(named or _default_run_dir(job)))
    return path if named or job or path.is_dir() else None


def _run(arguments: argparse.Namespace) -> int:
    for line in unknown(os.environ):
        _say(f"dynamo-mpi launch: warning: {line}")
    count, named = _split_nodes(arguments.agg_nodes)
    settings = read_settings({**vars(arguments), "agg_nodes": count}, arguments.further_words, os.environ)
    if settings.image is not None:
        image, remark = resolve_image(settings.image)
        settings = replace(settings, image=image)
        if remark:
            _say(f"dynamo-mpi launch: {remark}")
    nodes = _nodes(settings, arguments.dry_run, named)
    path = Path(os.path.abspath(settings.run_dir or _default_run_dir(nodes.job_id)))
    excluded = () if arguments.dry_run else excluded_before(path, nodes.job_id)
    left_out = [each.node for each in excluded]
    nodes = nodes.with_head_outside(left_out)
    placement = assign(settings, nodes, left_out)
    source = find_source(settings.image, settings.python)
    builder, step_controller = _launcher(settings, nodes, source, path)
    container = builder.container if isinstance(builder, Srun) else None
    mounts = None if container is None else container.mounts
    for line in check_worker_flags(settings, placement, mounts, os.environ):
        _say(f"dynamo-mpi launch: warning: {line}")
    check_folders(settings, in_job=nodes.job_id not in ("", STAND_IN_JOB))
    if arguments.dry_run:
        check_run_dir(path)
        refusal = check_inputs(settings, mounts, known_only(os.environ))
        if refusal is not None:
            _say(f"dynamo-mpi launch: the deployment would be refused:\n{refusal.report}")
            return refusal.code
        _show(settings, builder, placement, nodes, path)
        return 0
    if settings.launcher == "mpirun":
        with _environment(settings) as environ:
            check_root(settings.mpirun, environ)
    if settings.no_kill and settings.launcher == "slurm" and (problem := no_kill.warning(os.environ)):
        _say(f"dynamo-mpi launch: warning: {problem}")
    with contextlib.closing(RunDir(path)) as run_dir:
        code, report = _conduct(
            settings, placement, builder, step_controller, run_dir, excluded, verbose=arguments.verbose
        )
        run_dir.write_end(code, report)
        return code


def _conduct(
    settings: LaunchSettings,
    placement: Placement,
    builder: CommandBuilder,
    step_controller: StepController,
    run_dir: RunDir,
    excluded: Sequence[ExcludedNode],
    *,
    verbose: bool,
) -> tuple[int, str]:
    """Run the deployment, and return its exit code and why it ended."""
    only = () if verbose else _OURS
    follower = Follower(run_dir.logs, "*.log", sys.stderr, only=only, period_seconds=_FOLLOW_SECONDS)
    try:
        with (
            Interrupts((*SIGNALS, *DRAIN_SIGNALS), wakes_on_exit=True) as interrupts,
            _environment(settings) as environ,
        ):
            follower.start()
            try:
                watch = NodeWatch(_watched(placement)) if settings.launcher == "slurm" and settings.no_kill else None
                context = LaunchContext(run_dir, interrupts, _say, environ, watch, excluded)
                code = DeploymentController(settings, placement, builder, step_controller, context).run()
            finally:
                follower.close()
    except Interrupted as end:
        return end.exit_code, str(end)
    except StepFailed as error:
        if error.log:
            _say(error.log)
        _say(f"dynamo-mpi launch: {error}\n  log:    {run_dir.logs}")
        return error.status, str(error)
    except OSError as error:
        refused = of_os_error(error)
        _say(f"dynamo-mpi launch: {refused}")
        return refused.exit_code, str(refused)
    return code, "ended in order"


def _watched(placement: Placement) -> tuple[str, ...]:
    """Return the nodes of a deployment, each once."""
    names = (*(node for worker in placement.workers for node in worker.nodes), *placement.spares, placement.head)
    return tuple(dict.fromkeys(names))


@contextlib.contextmanager
def _environment(settings: LaunchSettings) -> Iterator[Mapping[str, str]]:
    """Provide the steps' base environment, and the files that it needs."""
    if settings.launcher == "slurm":
        # Slurm sets it itself since version 23; an empty value means no limit
        # the image may have a release that knows more of them
        usable = os.environ if settings.image or settings.python else known_only(os.environ)
        end = {} if END in os.environ else {END: end_of_job(os.environ.get("SLURM_JOB_ID", ""))}
        yield {**usable, **end}
        return
    with private_dir(prefix=FOLDER_PREFIX) as folder:
        yield {**folder_environment(folder), **UNBOUND, **known_only(os.environ), **home_variable(os.environ)}


def _split_nodes(given: str | None) -> tuple[str | None, str | None]:
    """Return what ``--nodes`` says: how many nodes a worker has, and which nodes there are."""
    if given is not None and not given.strip():
        raise UsageError(
            f"--nodes is {given!r}",
            expected="a number of nodes for each worker, or the nodes to take: 'n[1-4]'",
            fix="leave it out, or look whether the variable that it is taken from is set",
        )
    return (given, None) if not given or _NUMBER.fullmatch(given.strip()) else (None, given)


def _nodes(settings: LaunchSettings, dry_run: bool, named: str | None) -> Nodes:
    if settings.hostfile is not None and settings.launcher == "mpirun":
        if named is not None:
            raise UsageError(
                f"--nodes lists nodes ({named}), and the hostfile {settings.hostfile} does, too",
                expected="one list of nodes; with mpirun the hostfile",
                fix="leave the list out, and take the other hosts out of the hostfile",
            )
        return of_hostfile(settings.hostfile, os.uname().nodename)
    wanted = nodes_wanted(settings)
    nodes = (
        of_dry_run(os.environ, wanted)
        if dry_run
        else allocated(os.environ, wanted, settings.gpus_per_node, no_kill=settings.no_kill)
    )
    return nodes if named is None else choose(nodes, os.environ, named)


def _default_run_dir(job_id: str) -> Path:
    return Path(f"dynamo_mpi-{job_id}" if job_id else "dynamo_mpi-run")


def _launcher(
    settings: LaunchSettings, nodes: Nodes, source: CodeLocation, path: Path
) -> tuple[CommandBuilder, StepController]:
    forwarded = _variables(_FORWARDED)
    if settings.launcher == "mpirun":
        bare = tuple(name for name in _BARE_METAL if name in os.environ)
        return Mpirun(settings, source, str(path), (*forwarded, *bare)), MpirunStepController()
    container, inside = None, str(path)
    given = read_user_options(settings.srun_args, settings.image, os.environ)
    if settings.image is not None:
        own = [mount(str(path), RUN_DIR_INSIDE)]
        if source.checkout is not None:
            own.append(mount(str(source.checkout), CHECKOUT_INSIDE, "ro"))
        theirs = list(filter(None, (settings.mounts, *given.mounts)))
        check_mounts(",".join(theirs))
        mounts = (*theirs, *own)
        container = Container(settings.image, mounts, (*_variables(_MPI_PARAMETERS), *given.variables))
        inside = RUN_DIR_INSIDE
    settings = replace(settings, srun_args=given.words)
    return Srun(settings, nodes, container, source, inside, token_of(path), forwarded), SlurmStepController(
        nodes.job_id
    )


def _variables(begins: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(name for name in known_only(os.environ) if name.startswith(begins)))


def _show(settings: LaunchSettings, builder: CommandBuilder, placement: Placement, nodes: Nodes, path: Path) -> None:
    workers = placement.workers
    if nodes.job_id == STAND_IN_JOB:
        print(
            f"# not in an allocation: {', '.join(nodes.names[:2])} … and {STAND_IN_JOB} stand for its nodes and its id\n"
        )
    joint = builder.checks_in_services
    commands = [] if settings.skip_check or joint else [("the layouts, before anything starts", builder.check())]
    if needs_kv_check(settings, workers):
        commands.append(
            (
                "the check of KV transfer from prefill to decode nodes, before the workers start",
                builder.kv_check(workers),
            )
        )
    first = "the check, before anything starts; then " if joint else ""
    commands.append((f"{first}until {path}/services.json is there", builder.services()))
    commands += [("with what services.json gives, all at once", builder.worker(worker)) for worker in workers]
    for node in placement.spares:
        commands += [("meanwhile, on a spare node", command) for command in builder.prepare(node)]
    write_out("\n\n".join(f"# {command.name}: {note}\n{command.shown()}" for note, command in commands))


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the reader of our output has exited: no reason not to end in order
        print(without_controls(text), file=sys.stderr, flush=True)
