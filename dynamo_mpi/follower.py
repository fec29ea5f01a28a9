# SPDX-License-Identifier: Apache-2.0
"""Ranks other than 0: answer rank 0's inquiry, hear the verdict, load, and take part in the engine's steps."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from dynamo_mpi.engines.spec import EngineSpec, build_engine
from dynamo_mpi.errors import BootstrapError
from dynamo_mpi.exit_codes import ExitCode
from dynamo_mpi.fields import pack
from dynamo_mpi.preflight.inquiry import Inquiry, fill_card

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi4py import MPI

    from dynamo_mpi.engines.protocol import Engine
    from dynamo_mpi.launchers.launch import Launch
    from dynamo_mpi.supervision.phases import Phases
    from dynamo_mpi.supervision.watch import Watched
    from dynamo_mpi.world import World

# what rank 0 broadcasts begins with one byte that says how to read the rest
STOP, GO = b"S", b"G"


def follow(world: World, launch: Launch, argv: Sequence[str], phases: Phases, mpi_library: str) -> int:
    """Live a follower's life.

    Args:
        world: all ranks.
        launch: how this rank was started.
        argv: the command line, without the program.
        phases: where durations go.
        mpi_library: what the MPI library calls itself.

    Returns:
        The exit code that rank 0 has told.
    """
    with phases.enter("preflight"):
        message = world.broadcast()
        if message[:1] == STOP:
            return message[1]
        world.gather(fill_card(Inquiry.unpack(message[1:]), launch, argv, mpi_library).pack())
        message = world.broadcast()
        if message[:1] == STOP:
            return message[1]
    # Launchers signal every rank, and rank 0 leads the draining: a follower that left now would take the requests in flight with it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # before the verdict, every file that a rank opens counts
    from dynamo_mpi.supervision.watch import Watched

    spec = EngineSpec.unpack(message[1:])
    watched = Watched(world.duplicate())
    watched.start()
    try:
        if spec.engine == "trtllm":
            return _follow_trtllm(world, watched, phases)
        return _follow_engine(world, launch, spec, watched, phases)
    finally:
        watched.close()


def _follow_trtllm(world: World, watched: Watched, phases: Phases) -> int:
    from dynamo_mpi.engines.trtllm.follow import follow_trtllm

    with phases.enter("serve"):
        follow_trtllm(world, watched)
    return world.broadcast()[1]


def _follow_engine(world: World, launch: Launch, spec: EngineSpec, watched: Watched, phases: Phases) -> int:
    with phases.enter("load"):
        comm = world.duplicate()
        engine, report = build_part(spec, comm, launch.local_size or world.size)
        world.gather(report)
        message = world.broadcast()
        if engine is None or message[:1] == STOP:
            return message[1]
        world.gather(load_part(engine))
        message = world.broadcast()
        if message[:1] == STOP:
            return message[1]
    watched.close()
    with phases.enter("serve"):
        engine.follow()
    return world.broadcast()[1]


def build_part(spec: EngineSpec, comm: MPI.Intracomm, local_size: int) -> tuple[Engine | None, bytes]:
    """Build this rank's part of the engine, on rank 0 as on any other.

    Building and loading are agreed on apart: loading may be collective, and a rank that could not even build (a package is missing
    on its node) would leave the others waiting there.

    Returns:
        The engine and an empty report, or None and the exit code with the error, packed for rank 0.
    """
    try:
        return build_engine(spec, comm, local_size), b""
    except Exception as error:
        return None, _report(error)


def load_part(engine: Engine) -> bytes:
    """Load this rank's part, and return what to tell rank 0: nothing, or the exit code with the error."""
    try:
        engine.load()
    except Exception as error:
        return _report(error)
    return b""


def _report(error: Exception) -> bytes:
    if isinstance(error, BootstrapError):
        return pack([str(int(error.exit_code)), str(error)])
    import traceback

    return pack([str(int(ExitCode.ENGINE)), "".join(traceback.format_exception(error)).rstrip()])
