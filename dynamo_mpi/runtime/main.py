# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo_mpi.worker``: the same command in every rank; together they become one Dynamo worker.

    environment -> world -> preflight -> load -> prove -> register -> serve -> drain -> exit

Ranks other than 0 import next to nothing before the verdict, and never what only rank 0 needs (settings, YAML, the Dynamo runtime): on a
shared file system, hundreds of ranks opening hundreds of files are what a start waits for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.exit_codes import ExitCode
from dynamo_mpi.common.log import RankLogger
from dynamo_mpi.common.phases import PhaseTracker
from dynamo_mpi.common.process import host_name
from dynamo_mpi.mpi.launch_checks import check_launch, check_world_size, identify_mpi
from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo, detect_launcher
from dynamo_mpi.mpi.world import World, finalize_mpi, init_mpi, load_mpi_library
from dynamo_mpi.supervisor.agent_client import NodeAgentClient
from dynamo_mpi.supervisor.context import RankContext

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.supervisor.agent_client import Agent
    from dynamo_mpi.supervisor.fault_injection import InjectedFault
    from dynamo_mpi.telemetry.health_client import HealthClient
    from dynamo_mpi.telemetry.sd_notify import SystemdNotifier

# How long ranks that refuse alone stay, so that all have started and rank 0 has said why: a launcher ends the rest when the first
# process fails, and no MPI orders them yet.
_HUSH_SECONDS = 2.0
_PARTING_SECONDS = 20.0  # longer than rank 0 gives the engine to close
_LAST_SECONDS = 0.3
_NO_USUAL_END = frozenset({"dynamo._core", "tensorrt_llm"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run this rank's life.

    Args:
        argv: the command line without the program; None takes ``sys.argv``.

    Returns:
        The exit code, the same on every rank.
    """
    phases = PhaseTracker()
    words = sys.argv[1:] if argv is None else list(argv)
    # Python would turn Ctrl-C into a traceback on every rank
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    launch = detect_launcher(os.environ)
    if {"-h", "--help", "--version"} & set(words):
        return _help(words, launch)
    log = RankLogger(launch.rank, host_name())
    fault: InjectedFault | None = None
    try:
        if os.environ.get("DYN_MPI_FAULT"):
            from dynamo_mpi.supervisor.fault_injection import arm

            fault = arm(os.environ, launch, phases, log)
        with phases.enter("environment"):
            library = identify_mpi(load_mpi_library())
            check_launch(launch, library)
    except DynamoMpiError as error:
        return _refuse_alone(error, launch, log)
    agent = _spawn_node_agent(launch, log.host, words)
    # before any thread is started, and after the agent, which would hold what it inherits open
    answers = _answer_probes(launch, log, words)
    client = NodeAgentClient(launch, os.environ, agent, lambda: _respawn_node_agent(launch, log.host, words))
    client.install_signal_handlers()
    phases.on_phase(lambda name: client.send(f"phase {name}"), first=True)
    reporter = None if isinstance(answers, DynamoMpiError) else answers
    if reporter is not None:
        phases.on_phase(reporter.send_phase, first=True)
        reporter.start()
    notifier = _notifier(launch, words)
    if notifier is not None:
        # from the next phase on it is one of rank 0's hooks
        notifier.on_phase("world")
    try:
        with phases.enter("world"):
            if isinstance(answers, DynamoMpiError):
                raise answers
            alone = launch.launcher in (Launcher.ALONE, Launcher.SLURM_SHELL, Launcher.SRUN_WITHOUT_MPI)
            world = init_mpi(alone=alone, alone_on_node=launch.local_size == 1)
            if launch.launcher is Launcher.HYDRA and launch.size > 1:
                from dynamo_mpi.supervisor.shared_memory import segments_of

                # mpiexec removes none of a rank that it kills, and that may be in the next moment
                client.send(f"segments {' '.join(segments_of(os.getpid()))}")
            check_world_size(launch, library, world.size)
            if launch.local_size is not None and launch.local_size < world.size:
                from dynamo_mpi.supervisor.agent_invitation import connect_agents

                connect_agents(world, launch.local_rank, client, log.host)
    except DynamoMpiError as error:
        if notifier is not None:
            notifier.report_failure(str(error))
        code = _refuse_alone(error, launch, log)
        client.send(f"failed {code}")
        return code
    except Exception as error:
        return _abandon(error, None, launch, client, log, phases, words)
    client.set_abort(world.abort)
    log = RankLogger(world.rank, log.host)
    context = RankContext(world, launch, words, phases, log, client, library.version)
    if reporter is not None:
        reporter.send("rank", str(world.rank))
    try:
        # what it imports is a part of it
        phases.begin("preflight")
        if world.rank == 0:
            from dynamo_mpi.runtime.leader import run_leader

            return _leave(world, client, run_leader(context, reporter, notifier))
        from dynamo_mpi.runtime.follower import run_follower

        return _leave(world, client, run_follower(context, fault, reporter))
    except Exception as error:
        return _abandon(error, world, launch, client, log, phases, words)


def _spawn_node_agent(launch: LaunchInfo, host: str, words: Sequence[str]) -> Agent | None:
    """Fork the agent of this node, where that is for this rank to do."""
    if launch.local_rank not in (0, None):
        return None
    from dynamo_mpi.supervisor.agent_start import spawn_node_agent

    return spawn_node_agent(launch, host, words, os.environ)


def _respawn_node_agent(launch: LaunchInfo, host: str, words: Sequence[str]) -> Agent | None:
    """Start another agent in place of one that has ended."""
    from dynamo_mpi.supervisor.agent_start import respawn_node_agent

    return respawn_node_agent(launch, host, words, os.environ)


def _answer_probes(launch: LaunchInfo, log: RankLogger, words: Sequence[str]) -> HealthClient | DynamoMpiError | None:
    """Fork the process that answers this node's probes, where the user wants them answered and that is for this rank to do."""
    if not os.environ.get("DYN_SYSTEM_PORT"):
        return None
    from dynamo_mpi.telemetry.health_start import start_health_server

    return start_health_server(launch, log, words, os.environ)


def _notifier(launch: LaunchInfo, words: Sequence[str]) -> SystemdNotifier | None:
    """Return what tells a supervisor of the world, on rank 0 of one that wants to be told."""
    if not os.environ.get("NOTIFY_SOCKET"):
        return None
    from dynamo_mpi.supervisor.early_settings import Limits
    from dynamo_mpi.telemetry.sd_notify import SystemdNotifier

    notifier = SystemdNotifier.from_env(os.environ, {"world": Limits.of(words, os.environ).world_seconds})
    return notifier if launch.rank == 0 else None


def _help(words: Sequence[str], launch: LaunchInfo) -> int:
    if launch.rank == 0:
        from dynamo_mpi.config.worker import build_parser

        try:
            build_parser().parse_args([word for word in words if word in ("-h", "--help", "--version")])
        except SystemExit as end:
            return int(end.code or 0)
    return ExitCode.OK


def _refuse_alone(error: DynamoMpiError, launch: LaunchInfo, log: RankLogger) -> int:
    """Leave before, or without, a world: rank 0 speaks, and all give it, and each other, the time to know their exit code."""
    if launch.rank == 0:
        log.error(f"error: {error}")
    if launch.size > 1 and launch.launcher is not Launcher.SLURM_SHELL:
        # srun --kill-on-bad-exit sends it when the first rank leaves, and srun's own code is the highest of all ranks'
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(_HUSH_SECONDS)
    return error.exit_code


def _leave(world: World, client: NodeAgentClient, code: int) -> int:
    """Wait for each other before the first rank leaves: on ``srun --kill-on-bad-exit`` the rest get SIGTERM then, and srun would exit
    with that signal's code instead of ours."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    client.detach()
    if not world.barrier(_PARTING_SECONDS):
        # some rank hangs: that is no success
        world.abort(code or ExitCode.DEADLINE)
    from dynamo_mpi.common.hard_exit import hard_exit_after

    # MPI_Finalize waits for all ranks, too, and for as long as it takes
    hard_exit_after(_PARTING_SECONDS, code or ExitCode.DEADLINE)
    return code


def _abandon(
    error: Exception,
    world: World | None,
    launch: LaunchInfo,
    client: NodeAgentClient,
    log: RankLogger,
    phases: PhaseTracker,
    argv: Sequence[str],
) -> NoReturn:
    """End all ranks because this one can't go on; the others may be anywhere, also inside a collective."""
    from dynamo_mpi.common.failure import Failure, describe_error
    from dynamo_mpi.common.hard_exit import hard_exit_after
    from dynamo_mpi.common.log_writer import log_writer
    from dynamo_mpi.supervisor.early_settings import Limits
    from dynamo_mpi.supervisor.failure_files import write_failure
    from dynamo_mpi.supervisor.rendezvous import Rendezvous

    text, code = describe_error(error)
    # a reader of our words, or a file system, that hangs is no reason to stay
    hard_exit_after(_PARTING_SECONDS, code)
    report = f"error in {phases.current}: {text.rstrip()}"
    limits = Limits.of(argv, os.environ)
    meeting = Rendezvous(log.host, failure_dir=limits.failure_dir)
    if not log_writer.has_destination:
        log_writer.open_file(limits.log_dir, meeting.label, log.rank)
    log.error(report)
    failure = Failure(log.rank, code, text, phase=phases.current, at=time.monotonic())
    write_failure(meeting, failure, log.host, report={"report": report, "consequences": []})
    client.send(f"failed {code}")
    if world is not None and world.size > 1:
        world.abort(code)
    if launch.launcher is Launcher.HYDRA and launch.size > 1:
        with contextlib.suppress(OSError, AttributeError):
            sys.stderr.flush()
        # as long as MPI doesn't run, MPICH's mpiexec ends the others for nothing less: they would wait in its start for --world-timeout
        os.kill(os.getpid(), signal.SIGKILL)
    with contextlib.suppress(OSError, AttributeError):
        sys.stderr.flush()
    os._exit(code)


def exit_process(code: int) -> NoReturn:
    """Leave with ``code``, without Python's own ending where Dynamo's runtime or TensorRT-LLM was started.

    A thread of the runtime that asks for the interpreter while that goes down is unwound through Rust, which aborts the process (134 instead
    of our code); TensorRT-LLM has been seen to hang there (its pull request 17970).
    """
    if _NO_USUAL_END & sys.modules.keys():
        finalize_mpi()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError):  # whoever read it has gone, or it was never open
                stream.flush()
        if detect_launcher(os.environ).launcher is Launcher.HYDRA:
            # to MPICH 5 a rank that leaves so has died, and its mpiexec would kill those that are a moment later
            time.sleep(_LAST_SECONDS)
        os._exit(code)
    sys.exit(code)
