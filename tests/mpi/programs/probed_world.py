# SPDX-License-Identifier: Apache-2.0
"""A world that runs probes under rank 0's guard, and nothing else. Arguments: the plan; `strict` or `report`; the kind of GPU, if any.

Rank 0 prints what was found as JSON. DYN_MPI_FAULT works as in a worker; WEIGHTS are the bytes that each rank would load. Where HOLD names a
file, rank 0 makes `HOLD.up` once the world stands, and begins with the probes once there is `HOLD.go`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from dynamo_mpi import __version__
from dynamo_mpi.checks.hardware import EvaluationInput, HardwareCheckPlan
from dynamo_mpi.checks.rank_report import RankReport
from dynamo_mpi.checks.run_hardware_checks import run_hardware_checks, run_local
from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.log import RankLogger
from dynamo_mpi.common.phases import PhaseTracker
from dynamo_mpi.common.process import host_name
from dynamo_mpi.mpi.launcher import detect_launcher
from dynamo_mpi.mpi.world import World, init_mpi, load_mpi_library
from dynamo_mpi.supervisor.fault_injection import arm
from dynamo_mpi.supervisor.heartbeat_client import HeartbeatClient
from dynamo_mpi.supervisor.rendezvous import Rendezvous, SupervisorConfig
from dynamo_mpi.supervisor.supervisor import WorldSupervisor
from tests.contexts import rank_context


def lead(world: World, plan: HardwareCheckPlan, phases: PhaseTracker, kind: str | None, *, strict: bool) -> int:
    cards = [RankReport.unpack(card) for card in world.gather(own_card().pack())]
    guard = WorldSupervisor(
        rank_context(phases, world=world, host=host_name()),
        cards,
        SupervisorConfig(os.environ.get("NETWORK", "127.0.0.1") or None),
    )
    world.broadcast(guard.rendezvous.pack(b""))
    hold(os.environ.get("HOLD", ""))
    world.barrier(30)
    began = time.monotonic()
    weights = (int(os.environ.get("WEIGHTS", "0")),) * world.size
    with phases.enter("hardware_check"):
        report = run_hardware_checks(
            world, EvaluationInput(plan, cards, kind, weights), guard, os.environ, strict=strict
        )
    error = report.error
    results = {
        "findings": [finding.as_json() for finding in report.findings],
        "figures": report.figures,
        "text": report.text,
        "seconds": time.monotonic() - began,
    }
    print(json.dumps(results), flush=True)
    if error is not None:
        guard.report_orderly_failure(error)
    world.broadcast(bytes([error.exit_code if error else 0]))
    guard.close()
    return int(error.exit_code) if error else 0


def follow(world: World, plan: HardwareCheckPlan, phases: PhaseTracker) -> int:
    world.gather(own_card().pack())
    rendezvous, _ = Rendezvous.unpack(world.broadcast())
    client = HeartbeatClient(rendezvous, world, phases, RankLogger(world.rank, host_name()))
    world.barrier(30)
    try:
        with phases.enter("hardware_check"):
            run_local(world, plan, os.environ)
    except (DynamoMpiError, ValueError) as error:
        client.report_failure(error)
    code = world.broadcast()[0]
    client.close()
    return code


def hold(path: str) -> None:
    if path:
        Path(f"{path}.up").touch()
        while not Path(f"{path}.go").exists():
            time.sleep(0.02)


def own_card() -> RankReport:
    return RankReport(host_name(), "", __version__, ())


def main() -> None:
    launch, phases = detect_launcher(os.environ), PhaseTracker()
    if os.environ.get("DYN_MPI_FAULT"):
        arm(os.environ, launch, phases, RankLogger(launch.rank, host_name()))
    load_mpi_library()
    world = init_mpi()
    plan = HardwareCheckPlan.unpack(sys.argv[1])
    if world.rank == 0:
        code = lead(world, plan, phases, sys.argv[3] if len(sys.argv) > 3 else None, strict=sys.argv[2] == "strict")
    else:
        code = follow(world, plan, phases)
    # as a worker does: a launcher ends the rest when the first leaves with an error
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    world.barrier(10)
    sys.exit(code)


if __name__ == "__main__":
    main()
