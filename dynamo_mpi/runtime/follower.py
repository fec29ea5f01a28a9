# SPDX-License-Identifier: Apache-2.0
"""The lifecycle of ranks other than 0: answer preflight, receive its result, load, and execute the engine's steps."""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager
from functools import partial

from dynamo_mpi.checks.rank_report import ReportRequest, collect_rank_report
from dynamo_mpi.common.codec import encode_strings
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.engines.spec import EngineSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mpi4py import MPI

    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.common.phases import PhaseTracker
    from dynamo_mpi.engines.protocol import Engine
    from dynamo_mpi.mpi.launcher import LaunchInfo
    from dynamo_mpi.mpi.world import World
    from dynamo_mpi.stage.cache_session import CacheSession
    from dynamo_mpi.stage.session import Staging
    from dynamo_mpi.supervisor.agent_client import NodeAgentClient
    from dynamo_mpi.supervisor.context import RankContext
    from dynamo_mpi.supervisor.fault_injection import InjectedFault
    from dynamo_mpi.supervisor.heartbeat_client import HeartbeatClient
    from dynamo_mpi.telemetry.health_client import HealthClient

# the first byte of rank 0's broadcasts
STOP, CONTINUE = b"S", b"G"
# with TensorRT-LLM, the phases that all ranks go through together
_WORLD_PHASES = ("warmup", "serve", "drain")
# without an error there is no limit: reading weights may take other ranks minutes
_AGREEMENT_SECONDS = 10.0
SHUTDOWN_SECONDS = 20.0
"""How long rank 0 waits until all ranks have finished; longer than it waits for the engine to close."""


def run_follower(
    context: RankContext, fault: InjectedFault | None = None, health_client: HealthClient | None = None
) -> int:
    """Run a follower's part of the worker.

    Args:
        context: this rank's context.
        fault: an injected fault.
        health_client: sends this rank's state to the node agent, on the node's first rank with a health endpoint.

    Returns:
        The exit code that rank 0 has sent.
    """
    world, launch, phases, agent, log = (
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
        report = collect_rank_report(ReportRequest.unpack(message[1:]), launch, context.argv, context.mpi_version)
        world.gather(report.pack())
        message = world.broadcast()
        if message[:1] == STOP:
            return message[1]
    # imported after the preflight result, as every file that a rank opens before counts
    from dynamo_mpi.common.log_writer import log_writer
    from dynamo_mpi.runtime.rank_binding import bind_to_gpu, watch_gpus
    from dynamo_mpi.supervisor.heartbeat_client import HeartbeatClient
    from dynamo_mpi.supervisor.rendezvous import Rendezvous
    from dynamo_mpi.supervisor.signals import SignalThread, signals_of

    gc.enable()
    rendezvous, packed = Rendezvous.unpack(message[1:])
    log_writer.open_file(rendezvous.log_dir, rendezvous.label, world.rank)
    phases.on_phase(lambda name: log.debug(f"phase {name}"))
    agent.send(f"preflight_done {rendezvous.as_json()}")
    heartbeat = HeartbeatClient(rendezvous, world, phases, log, agent)
    # rank 0 leads the drain: a follower that exited on a signal would fail the requests in flight. Not before the connection to rank 0: until
    # then a signal must end this rank, as rank 0 may be gone
    agent.uninstall_signal_handlers()
    signals = SignalThread(signals=signals_of(launch.launcher))
    spec = EngineSpec.unpack(packed)
    if health_client is not None:
        health_client.follow(heartbeat, {"engine": spec.engine, "role": spec.role, "component": rendezvous.label})
    if fault is not None:
        fault.follow(heartbeat)
    signals.begin(partial(_forward_signal, agent, heartbeat))
    bind_to_gpu(context, spec)
    watch_gpus(context, report)
    try:
        caches = _begin_caches(context, spec, heartbeat) if spec.caches else None
        staging = _begin_staging(world, spec) if spec.stage else None
        stopped = _check_hardware(world, spec, phases) if spec.probe else None
        if stopped is not None and staging is not None:
            staging.cancel()
        elif stopped is None and (staging is not None or caches is not None):
            with phases.enter("stage"):
                if staging is not None:
                    spec, stopped = _finish_staging(world, spec, staging, phases)
                if caches is not None and stopped is None:
                    caches.finish(world)
        code = _follow(context, spec, heartbeat) if stopped is None else stopped
        if caches is not None:
            caches.end()
    except Exception as error:  # any error: the other ranks may be inside the engine's collectives
        heartbeat.report_failure(error)
    with phases.enter("exit"):
        # rank 0 reports ranks that don't reach this barrier
        world.barrier(2 * SHUTDOWN_SECONDS)
    if caches is not None:
        # not before: no other rank waits for it now, and where this process is killed its node agent does it
        caches.remove()
    signals.close()
    heartbeat.close()
    return code


def _forward_signal(agent: NodeAgentClient, heartbeat: HeartbeatClient, number: int) -> None:
    agent.note_signal(number)
    heartbeat.forward_signal(number)


def _check_hardware(world: World, spec: EngineSpec, phases: PhaseTracker) -> int | None:
    """Run this rank's part of the hardware checks; return the exit code if rank 0 refuses the hardware."""
    from dynamo_mpi.checks.hardware import HardwareCheckPlan
    from dynamo_mpi.checks.run_hardware_checks import run_local

    with phases.enter("hardware_check"):
        run_local(world, HardwareCheckPlan.unpack(spec.probe), os.environ)
        phases.mark_local_done()
        message = world.broadcast()
    return message[1] if message[:1] == STOP else None


def _begin_caches(context: RankContext, spec: EngineSpec, heartbeat: HeartbeatClient) -> CacheSession:
    from dynamo_mpi.stage.cache_session import CachePlan, CacheSession, write_back

    agent, world, plan = context.agent, context.world, CachePlan.unpack(spec.caches)
    node_ranks = context.launch.local_size or world.size
    session = CacheSession(world.rank, plan, os.environ, lambda folder: agent.send(f"caches {folder}"), node_ranks)
    # rank 0 serves: the worker is ready
    heartbeat.on_phase(lambda name: write_back(session, heartbeat.send_caches) if name == "serve" else None)
    session.begin()
    return session


def _begin_staging(world: World, spec: EngineSpec) -> Staging:
    from dynamo_mpi.stage.plan import StagePlan
    from dynamo_mpi.stage.session import Staging

    staging = Staging(world, StagePlan.unpack(spec.stage))
    staging.begin()
    return staging


def _finish_staging(
    world: World, spec: EngineSpec, staging: Staging, phases: PhaseTracker
) -> tuple[EngineSpec, int | None]:
    """Wait for the copies of the model; return the spec with the folder to load from, and the exit code if rank 0 stops the world."""
    staging.finish()
    phases.mark_local_done()
    message = world.broadcast()
    if message[:1] == STOP:
        return spec, message[1]
    path = message[1:].decode("utf-8", "surrogateescape")
    staging.accept(path)
    return spec._replace(model_dir=path or spec.model_dir), None


def _follow(context: RankContext, spec: EngineSpec, heartbeat: HeartbeatClient) -> int:
    if not spec.engine:
        return context.world.broadcast()[1]
    if spec.engine == "trtllm":
        return _follow_trtllm(context, heartbeat)
    return _follow_engine(context.world, context.launch, spec, heartbeat, context.phases)


def _follow_trtllm(context: RankContext, heartbeat: HeartbeatClient) -> int:
    # what TensorRT-LLM does on this rank isn't visible, so the phase follows rank 0's
    heartbeat.on_phase(partial(_follow_phase, context.phases))
    with context.phases.enter("load"):
        follow_trtllm(context.world, heartbeat, context.log)
    return context.world.broadcast()[1]


def _follow_phase(phases: PhaseTracker, name: str) -> None:
    if name in _WORLD_PHASES and name != phases.current:
        phases.begin(name)


def _follow_engine(
    world: World, launch: LaunchInfo, spec: EngineSpec, heartbeat: HeartbeatClient, phases: PhaseTracker
) -> int:
    with phases.enter("load"):
        comm = world.duplicate()
        engine, error = build_engine_shard(spec, comm, launch.local_size or world.size)
        if message := _agree_on_error(world, heartbeat, error):
            return message[1]
        if engine is not None:
            error = load_engine_shard(engine)
            phases.mark_local_done()
            if message := _agree_on_error(world, heartbeat, error):
                return message[1]
    with phases.enter("serve"):
        if engine is not None:
            engine.follow()
    return world.broadcast()[1]


def _agree_on_error(world: World, heartbeat: HeartbeatClient, error: Exception | None) -> bytes:
    """Send rank 0 this rank's error, if any; return its message if it is STOP, otherwise nothing."""
    with abort_if_late(error, heartbeat.report_failure):
        world.gather(encode_error(error))
    if error is not None:
        heartbeat.record(error)
    message = world.broadcast()
    return message if message[:1] == STOP else b""


@contextmanager
def abort_if_late(error: Exception | None, abort: Callable[[Exception], object]) -> Iterator[None]:
    """Call ``abort`` if the other ranks don't gather ``error`` in time: they may wait for this rank in a collective."""
    if error is None:
        yield
        return
    # imported after the preflight result, as every file that a rank opens before counts
    from dynamo_mpi.common.waiting import call_if_late

    with call_if_late(_AGREEMENT_SECONDS, partial(abort, error)):
        yield


def build_engine_shard(
    spec: EngineSpec, comm: MPI.Intracomm, local_size: int
) -> tuple[Engine | None, Exception | None]:
    """Build this rank's shard of the engine, on any rank.

    The ranks agree on building and on loading separately: loading may be collective, and if a rank could not build its shard (a package is
    missing on its node), the others would wait for it there.

    Returns:
        The engine, or the error.
    """
    try:
        if spec.engine == "reference":
            from dynamo_mpi.engines.reference.factory import build_reference_engine

            return build_reference_engine(spec, comm, local_size), None
        raise ValueError(f"no engine is called {spec.engine!r}")
    except Exception as error:
        return None, error


def load_engine_shard(engine: Engine) -> Exception | None:
    """Load this rank's shard; return the error, if any."""
    try:
        engine.load()
    except Exception as error:
        return error
    return None


def encode_error(error: Exception | None) -> bytes:
    """Encode an error for rank 0: exit code and text, or nothing if there is none."""
    if error is None:
        return b""
    from dynamo_mpi.common.failure import describe_error

    text, code = describe_error(error)
    return encode_strings([str(code), text])


def follow_trtllm(world: World, heartbeat: HeartbeatClient, log: RankLogger) -> None:
    """Join TensorRT-LLM's session and run its tasks until rank 0 closes it."""
    from dynamo_mpi.common.log import print_trtllm_launch_line
    from dynamo_mpi.engines.trtllm.session import serve_tasks
    from dynamo_mpi.engines.trtllm.task import install, prepare_rank

    comm, tasks = world.duplicate(), world.duplicate()
    install(tasks, heartbeat.report_failure)
    prepare_rank(world, log.warning)
    print_trtllm_launch_line("worker", world.rank, world.size)
    try:
        serve_tasks(comm)
    except BaseException as error:
        heartbeat.report_failure(error)
