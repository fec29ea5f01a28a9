# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo_mpi.worker``: the same command in every rank; together they become one Dynamo worker.

    environment -> mpi_init -> preflight -> hardware_check -> stage -> load -> warmup -> register -> serve -> drain -> exit

Ranks other than 0 import as little as possible before the preflight result, and never what only rank 0 needs (settings, YAML, the Dynamo
runtime): on a shared file system, hundreds of ranks that open hundreds of files dominate the start-up time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from functools import cache

from dynamo_mpi.common.credentials import hide_secrets
from dynamo_mpi.common.errors import DynamoMpiError, ExitCode
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.common.log import RankLogger
from dynamo_mpi.common.phases import PhaseTracker
from dynamo_mpi.common.process import host_name
from dynamo_mpi.mpi.launcher import (
    MPICH_LAUNCHERS,
    Launcher,
    LaunchInfo,
    check_launch,
    check_user,
    check_world_size,
    detect_launcher,
    identify_mpi,
)
from dynamo_mpi.mpi.world import World, finalize_mpi, init_mpi, load_mpi_library
from dynamo_mpi.supervisor.agent_client import NodeAgentClient
from dynamo_mpi.supervisor.context import RankContext

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

    from dynamo_mpi.config.sources import WorkerSources
    from dynamo_mpi.supervisor.agent_socket import Agent
    from dynamo_mpi.supervisor.fault_injection import InjectedFault
    from dynamo_mpi.telemetry.health_address import HealthEndpoint
    from dynamo_mpi.telemetry.sd_notify import SystemdNotifier

    Sources = Callable[[], WorkerSources]

# how long a rank that exits before MPI_Init waits, so that all ranks have started and rank 0 has logged the reason: a launcher ends the
# other ranks when the first process fails
_EXIT_GRACE_SECONDS = 2.0
_AGENT_SECONDS = 2.0  # longer than it waits for another agent
_SHUTDOWN_SECONDS = 20.0  # longer than rank 0 waits for the engine to close
_HYDRA_EXIT_SECONDS = 0.3
_MODULES_WITH_THREADS = frozenset({"dynamo._core", "tensorrt_llm"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run this rank.

    Args:
        argv: the command line without the program; None takes ``sys.argv``.

    Returns:
        The exit code, the same on every rank.
    """
    phases = PhaseTracker()
    argv = sys.argv[1:] if argv is None else list(argv)
    # otherwise Ctrl-C prints a traceback on every rank
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    launch = detect_launcher(os.environ)
    if {"-h", "--help", "--version"} & set(argv):
        return _help(argv, launch)
    hide_secrets()
    log = RankLogger(launch.rank, host_name())
    fault: InjectedFault | None = None
    try:
        if os.environ.get("DYN_MPI_FAULT"):
            from dynamo_mpi.supervisor.fault_injection import arm

            fault = arm(os.environ, launch, phases, log)
        with phases.enter("environment"):
            library = identify_mpi(load_mpi_library())
            check_user(launch, os.environ, os.getuid())
            check_launch(launch, library)
    except DynamoMpiError as error:
        return _exit_before_mpi(error, launch, log)
    # once per process, and not at all on a rank that needs no settings
    sources = cache(lambda: _sources(argv))
    # before any thread is started
    endpoint = _open_health_endpoint(launch, log)
    health = None if isinstance(endpoint, DynamoMpiError) else endpoint
    agent, respawn = _spawn_node_agent(launch, log.host, sources, health)
    client = NodeAgentClient(launch, os.environ, agent, respawn)
    client.install_signal_handlers()
    phases.on_phase(lambda name: client.send(f"phase {name}"), first=True)
    health_client = None
    if health is not None and agent is not None:
        from dynamo_mpi.telemetry.health_client import HealthClient

        health_client = HealthClient(client, health.address, sources().early.heartbeat_timeout)
        phases.on_phase(health_client.send_phase, first=True)
    notifier = _create_notifier(launch, sources)
    if notifier is not None:
        # in later phases it is one of rank 0's hooks
        notifier.on_phase("mpi_init")
    try:
        with phases.enter("mpi_init"):
            if isinstance(endpoint, DynamoMpiError):
                raise endpoint
            alone = launch.launcher in (Launcher.ALONE, Launcher.SLURM_SHELL, Launcher.SRUN_WITHOUT_MPI)
            world = init_mpi(alone=alone, size=launch.size, local_size=launch.local_size)
            if launch.launcher in MPICH_LAUNCHERS and launch.size > 1:
                from dynamo_mpi.supervisor.leftovers import segments_of

                # at once: neither mpiexec nor srun removes the segments of a rank that it kills
                client.send(f"segments {' '.join(segments_of(os.getpid()))}")
            check_world_size(launch, library, world.size)
            if launch.local_size is not None and launch.local_size < world.size:
                from dynamo_mpi.supervisor.agent_socket import connect_agents

                connect_agents(world, launch.local_rank, client, log.host)
    except DynamoMpiError as error:
        if notifier is not None:
            notifier.report_failure(str(error))
        code = _exit_before_mpi(error, launch, log)
        client.send(f"failed {code}")
        return code
    except Exception as error:
        return _abort_world(error, None, launch, client, log, phases, sources)
    client.set_abort(world.abort)
    log = RankLogger(world.rank, log.host)
    context = RankContext(world, launch, argv, phases, log, client, library.version)
    if health_client is not None:
        health_client.send("rank", str(world.rank))
    try:
        # begun here, so that the imports below belong to it
        phases.begin("preflight")
        if world.rank == 0:
            from dynamo_mpi.runtime.leader import run_leader

            return _finalize(world, client, run_leader(context, sources(), health_client, notifier))
        from dynamo_mpi.runtime.follower import run_follower

        return _finalize(world, client, run_follower(context, fault, health_client))
    except Exception as error:
        return _abort_world(error, world, launch, client, log, phases, sources)


def _sources(argv: Sequence[str]) -> WorkerSources:
    from dynamo_mpi.config.sources import WorkerSources

    return WorkerSources(argv, os.environ)


def _spawn_node_agent(
    launch: LaunchInfo, host: str, sources: Sources, health: HealthEndpoint | None
) -> tuple[Agent | None, Callable[[], Agent | None] | None]:
    """Fork the agent of this node if this is the node's first rank; return it, and what starts its successors."""
    if not _is_first_of_node(launch):
        return None, None
    from dynamo_mpi.runtime.agent_process import AgentStarter

    if launch.rank == 0:
        # both need them, and the agent inherits them
        import dynamo_mpi.common.failure
        import dynamo_mpi.common.log_writer
        import dynamo_mpi.common.redact
        import dynamo_mpi.supervisor.leases  # noqa: F401
    starter = AgentStarter(launch, host, sources().early, os.environ, health)
    return starter.spawn(), starter.respawn


def _open_health_endpoint(launch: LaunchInfo, log: RankLogger) -> HealthEndpoint | DynamoMpiError | None:
    """Listen for health requests if that is enabled and this is the node's first rank."""
    if not os.environ.get("DYN_SYSTEM_PORT") or not _is_first_of_node(launch):
        return None
    from dynamo_mpi.telemetry.health_address import open_health_endpoint

    return open_health_endpoint(launch, log, os.environ)


def _is_first_of_node(launch: LaunchInfo) -> bool:
    return launch.local_rank == 0 or (launch.local_rank is None and launch.rank == 0)


def _create_notifier(launch: LaunchInfo, sources: Sources) -> SystemdNotifier | None:
    """Return the sd_notify client, on rank 0, if a service manager wants notifications."""
    if not os.environ.get("NOTIFY_SOCKET"):
        return None
    from dynamo_mpi.telemetry.sd_notify import SystemdNotifier

    notifier = SystemdNotifier.from_env(os.environ, {"mpi_init": sources().early.world_timeout})
    return notifier if launch.rank == 0 else None


def _help(argv: Sequence[str], launch: LaunchInfo) -> int:
    if launch.rank == 0:
        from dynamo_mpi.config.help_text import WORKER, WORKER_EXAMPLES, arrange
        from dynamo_mpi.config.worker import build_parser

        parser = build_parser()
        arrange(parser, WORKER, WORKER_EXAMPLES)
        try:
            parser.parse_args([word for word in argv if word in ("-h", "--help", "--version")])
        except SystemExit as end:
            return int(end.code or 0)
    return ExitCode.OK


def _exit_before_mpi(error: DynamoMpiError, launch: LaunchInfo, log: RankLogger) -> int:
    """Exit without an MPI world: rank 0 logs the error, and all ranks wait until all have determined the same exit code."""
    if launch.rank == 0:
        log.error(f"error: {error}")
    if launch.size > 1 and launch.launcher is not Launcher.SLURM_SHELL:
        # srun --kill-on-bad-exit sends SIGTERM when the first rank exits, and srun's exit code is the highest of all ranks'
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(_EXIT_GRACE_SECONDS)
    return error.exit_code


def _finalize(world: World, client: NodeAgentClient, code: int) -> int:
    """Wait for all ranks before the first one exits: with ``srun --kill-on-bad-exit`` the others would get SIGTERM, and srun would return
    that signal's code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    client.detach()
    if not world.barrier(_SHUTDOWN_SECONDS):
        # a rank hangs, so code 0 would be wrong
        world.abort(code or ExitCode.DEADLINE)
    from dynamo_mpi.common.process import hard_exit_after

    # MPI_Finalize waits for all ranks too, without a limit
    hard_exit_after(_SHUTDOWN_SECONDS, code or ExitCode.DEADLINE)
    return code


def _abort_world(
    error: Exception,
    world: World | None,
    launch: LaunchInfo,
    client: NodeAgentClient,
    log: RankLogger,
    phases: PhaseTracker,
    sources: Sources,
) -> NoReturn:
    """End all ranks because this one can't go on; the others may be inside a collective."""
    from dynamo_mpi.common.failure import Failure, describe_error
    from dynamo_mpi.common.log_writer import log_writer
    from dynamo_mpi.common.process import hard_exit_after
    from dynamo_mpi.supervisor.failure_reports import write_failure
    from dynamo_mpi.supervisor.rendezvous import Rendezvous

    text, code = describe_error(error)
    # exit even if logging or a file system blocks
    hard_exit_after(_SHUTDOWN_SECONDS, code)
    report = f"error in {phases.current}: {text.rstrip()}"
    rendezvous = Rendezvous(log.host, failure_dir=sources().early.failure_dir)
    if not log_writer.has_destination:
        log_writer.open_file(sources().early.log_dir, rendezvous.label, log.rank)
    log.error(report)
    failure = Failure(log.rank, code, text, phase=phases.current, at=time.monotonic())
    write_failure(rendezvous, failure, log.host, report={"report": report, "consequences": []})
    client.send(f"failed {code}")
    if world is not None and world.size > 1:
        if client.connected:
            # the agent ends this rank too, once the other agents know: one that doesn't would report what MPI_Abort makes of its ranks
            time.sleep(_AGENT_SECONDS)
        world.abort(code)
    if launch.launcher is Launcher.HYDRA and launch.size > 1:
        with contextlib.suppress(OSError, AttributeError):
            sys.stderr.flush()
        # before MPI runs, MPICH's mpiexec ends the others only if a rank is killed; otherwise they would wait for --world-timeout
        os.kill(os.getpid(), signal.SIGKILL)
    with contextlib.suppress(OSError, AttributeError):
        sys.stderr.flush()
    os._exit(code)


def exit_process(code: int) -> NoReturn:
    """Exit with ``code``, without Python's finalization.

    If a thread of Dynamo's runtime requests the GIL during finalization, it is unwound through Rust, which aborts the process (code 134);
    TensorRT-LLM has been seen to hang there (its pull request 17970). Without them it would only take time.
    """
    is_hydra = detect_launcher(os.environ).launcher is Launcher.HYDRA
    if is_hydra and not _MODULES_WITH_THREADS & sys.modules.keys():
        sys.exit(code)
    if "mpi4py.MPI" in sys.modules:
        finalize_mpi()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # its reader is gone, or it was never open
            stream.flush()
    if is_hydra:
        # MPICH 5 treats such an exit as a death: its mpiexec would kill the ranks that exit a moment later
        time.sleep(_HYDRA_EXIT_SECONDS)
    os._exit(code)
