# SPDX-License-Identifier: Apache-2.0
"""The lifecycle of ranks other than 0: answer preflight, receive its result, load, and execute the engine's steps."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from dynamo_mpi.checks.rank_report import ReportRequest, collect_rank_report
from dynamo_mpi.common.codec import encode_strings
from dynamo_mpi.engines.spec import EngineSpec, build_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mpi4py import MPI

    from dynamo_mpi.common.phases import PhaseTracker
    from dynamo_mpi.engines.protocol import Engine
    from dynamo_mpi.mpi.launcher import LaunchInfo
    from dynamo_mpi.mpi.world import World
    from dynamo_mpi.supervisor.agent_client import NodeAgentClient
    from dynamo_mpi.supervisor.context import RankContext
    from dynamo_mpi.supervisor.fault_injection import InjectedFault
    from dynamo_mpi.supervisor.heartbeat_client import HeartbeatClient
    from dynamo_mpi.telemetry.health_client import HealthClient

# what rank 0 broadcasts begins with one byte that says how to read the rest
STOP, GO = b"S", b"G"
# of a life with TensorRT-LLM, what all ranks do together
_SHARED = ("prove", "serve", "drain")
# ranks that go on reading their weights come to it after minutes, maybe: then there is no hurry, and nothing to agree on either
_AGREE_SECONDS = 10.0
PARTING_SECONDS = 20.0
"""How long rank 0 waits for all ranks to come to their end; longer than it gives the engine to close."""


def run_follower(context: RankContext, fault: InjectedFault | None = None, reporter: HealthClient | None = None) -> int:
    """Run a follower's part of the worker.

    Args:
        context: this rank's.
        fault: one on demand.
        reporter: to the process that answers this node's probes, on the rank that has begun it.

    Returns:
        The exit code that rank 0 has told.
    """
    world, launch, phases, client, log = (
        context.world,
        context.launch,
        context.phases,
        context.agent,
        context.log,
    )
    with phases.enter("preflight"):
        message = world.broadcast()
        if message[:1] == STOP:
            return message[1]
        world.gather(
            collect_rank_report(ReportRequest.unpack(message[1:]), launch, context.argv, context.mpi_version).pack()
        )
        message = world.broadcast()
        if message[:1] == STOP:
            return message[1]
    # before the verdict, every file that a rank opens counts
    from dynamo_mpi.common.log_writer import log_writer
    from dynamo_mpi.supervisor.heartbeat_client import HeartbeatClient
    from dynamo_mpi.supervisor.rendezvous import Rendezvous
    from dynamo_mpi.supervisor.signal_thread import SignalThread, signals_of

    meeting, packed = Rendezvous.unpack(message[1:])
    log_writer.open_file(meeting.log_dir, meeting.label, world.rank)
    phases.on_phase(lambda name: log.debug(f"phase {name}"))
    client.send(f"preflight_done {meeting.as_json()}")
    lifeline = HeartbeatClient(meeting, world, phases, log, client)
    # rank 0 leads the draining: a follower that left now would take the requests in flight with it; one that has not found rank 0 yet
    # would wait for it in vain, if that has gone, and the launcher with it
    client.uninstall_signal_handlers()
    signals = SignalThread(signals=signals_of(launch.launcher))
    spec = EngineSpec.unpack(packed)
    if reporter is not None:
        reporter.follow(lifeline, {"engine": spec.engine, "role": spec.role, "component": meeting.label})
    if fault is not None:
        fault.follow(lifeline)
    signals.begin(partial(_pass_on, client, lifeline))
    try:
        stopped = _probe(world, spec, phases) if spec.probe else None
        code = _follow(world, launch, spec, lifeline, phases) if stopped is None else stopped
    except Exception as error:  # of any kind: the other ranks are somewhere inside the engine
        lifeline.report_failure(error)
    with phases.enter("exit"):
        # rank 0 looks after those that don't come
        world.barrier(2 * PARTING_SECONDS)
    signals.close()
    lifeline.close()
    return code


def _pass_on(client: NodeAgentClient, lifeline: HeartbeatClient, number: int) -> None:
    client.send(f"signalled {number}")
    lifeline.forward_signal(number)


def _probe(world: World, spec: EngineSpec, phases: PhaseTracker) -> int | None:
    """Take part in the probes; return the exit code where rank 0 has found the hardware not to be as it has to be."""
    from dynamo_mpi.checks.hardware_check_plan import HardwareCheckPlan
    from dynamo_mpi.checks.run_hardware_checks import run_local

    with phases.enter("probe"):
        run_local(world, HardwareCheckPlan.unpack(spec.probe), os.environ)
        phases.mark_local_done()
        message = world.broadcast()
    return message[1] if message[:1] == STOP else None


def _follow(world: World, launch: LaunchInfo, spec: EngineSpec, lifeline: HeartbeatClient, phases: PhaseTracker) -> int:
    if spec.engine == "trtllm":
        return _follow_trtllm(world, lifeline, phases)
    return _follow_engine(world, launch, spec, lifeline, phases)


def _follow_trtllm(world: World, lifeline: HeartbeatClient, phases: PhaseTracker) -> int:
    from dynamo_mpi.runtime.trtllm_follower import follow_trtllm

    # what TensorRT-LLM does on this rank is not ours to see, so it goes by what rank 0 says
    lifeline.on_phase(partial(_keep_step, phases))
    with phases.enter("load"):
        follow_trtllm(world, lifeline)
    return world.broadcast()[1]


def _keep_step(phases: PhaseTracker, name: str) -> None:
    if name in _SHARED and name != phases.current:
        phases.begin(name)


def _follow_engine(
    world: World, launch: LaunchInfo, spec: EngineSpec, lifeline: HeartbeatClient, phases: PhaseTracker
) -> int:
    with phases.enter("load"):
        comm = world.duplicate()
        engine, error = build_engine_shard(spec, comm, launch.local_size or world.size)
        if message := _agree(world, lifeline, error):
            return message[1]
        if engine is not None:
            error = load_engine_shard(engine)
            phases.mark_local_done()
            if message := _agree(world, lifeline, error):
                return message[1]
    with phases.enter("serve"):
        if engine is not None:
            engine.follow()
    return world.broadcast()[1]


def _agree(world: World, lifeline: HeartbeatClient, error: Exception | None) -> bytes:
    """Tell rank 0 how it went, and hear whether to stop: then what it has said, else nothing."""
    with abort_if_late(error, lifeline.report_failure):
        world.gather(encode_error(error))
    if error is not None:
        lifeline.record(error)
    message = world.broadcast()
    return message if message[:1] == STOP else b""


@contextmanager
def abort_if_late(error: Exception | None, fail: Callable[[Exception], object]) -> Iterator[None]:
    """End the world by ``fail`` where the others don't come to hear of ``error`` soon: they may wait for this rank in what it has left."""
    if error is None:
        yield
        return
    # before the verdict, every file that a rank opens counts
    import threading

    timer = threading.Timer(_AGREE_SECONDS, fail, (error,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def build_engine_shard(
    spec: EngineSpec, comm: MPI.Intracomm, local_size: int
) -> tuple[Engine | None, Exception | None]:
    """Build this rank's part of the engine, on rank 0 as on any other.

    Building and loading are agreed on apart: loading may be collective, and a rank that could not even build (a package is missing
    on its node) would leave the others waiting there.

    Returns:
        The engine, or else why there is none.
    """
    try:
        return build_engine(spec, comm, local_size), None
    except Exception as error:
        return None, error


def load_engine_shard(engine: Engine) -> Exception | None:
    """Load this rank's part, and return why it could not be loaded."""
    try:
        engine.load()
    except Exception as error:
        return error
    return None


def encode_error(error: Exception | None) -> bytes:
    """Return what to tell rank 0: nothing, or the exit code with the error."""
    if error is None:
        return b""
    from dynamo_mpi.common.failure import describe_error

    text, code = describe_error(error)
    return encode_strings([str(code), text])
