# SPDX-License-Identifier: Apache-2.0
"""A rank that stages a model and does nothing else, as a worker's ranks do between the verdict and the load; rank 0 prints JSON.

    mpirun ... python -m tests.bench.stage_ranks MODEL FOLDER [--network CIDR] [--readers N] [--seconds S] [--digests]

With ``--broadcast`` it copies as ``sbcast`` does: rank 0 reads block by block, MPI broadcasts each, and all wait for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import NamedTuple

from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.process import host_name
from dynamo_mpi.mpi.world import World, init_mpi, load_mpi_library
from dynamo_mpi.stage.manifest import StageError, scan
from dynamo_mpi.stage.plan import StagePlan, plan_staging
from dynamo_mpi.stage.session import Staging
from dynamo_mpi.stage.store import PARTIAL

BLOCK_BYTES = 8 << 20


class Placement(NamedTuple):
    """A rank with its host."""

    host: str


def main() -> None:
    """Run this rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("folder")
    parser.add_argument("--network", default="")
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--digests", action="store_true")
    parser.add_argument("--broadcast", action="store_true")
    parser.add_argument("--import-seconds", type=float, default=0.0, help="wait as long as an import of the engine")
    parser.add_argument(
        "--cancel",
        action="store_true",
        help="cancel it once each node has a part, as a worker does whose hardware is refused",
    )
    parser.add_argument("--hold", action="store_true", help="use the copy until stdin closes")
    arguments = parser.parse_args()
    load_mpi_library()
    world = init_mpi()
    hosts = [answer.decode() for answer in world.gather(host_name().encode())]
    began = time.monotonic()
    if arguments.broadcast:
        broadcast(world, arguments.model, arguments.folder)
        result = {}
    else:
        result = stage(world, arguments, hosts)
    world.barrier(60.0)
    if world.rank == 0:
        print(json.dumps({**result, "wall_seconds": round(time.monotonic() - began, 3)}), flush=True)
    if arguments.hold and world.rank == 0:
        os.read(0, 1)
    world.barrier(600.0)


def stage(world: World, arguments: argparse.Namespace, hosts: list[str]) -> dict[str, object]:
    """Stage the model, and return how it has ended, on rank 0."""
    packed, result = b"", dict[str, object]()
    if world.rank == 0:
        limits = (arguments.readers, arguments.seconds, arguments.digests)
        try:
            plan = plan_staging(
                arguments.model, arguments.folder, [Placement(host) for host in hosts], arguments.network, limits
            )
            packed = plan.pack().encode()
        except StageError as error:
            result = {"problem": str(error)}
    packed = world.broadcast(packed)
    if not packed:
        return result
    staging = Staging(world, StagePlan.unpack(packed.decode()), lambda status: None)
    staging.begin()
    time.sleep(arguments.import_seconds)
    if arguments.cancel:
        parts = world.gather(json.dumps(await_part(arguments.folder)).encode())
        world.barrier(60.0)
        staging.cancel()
        return {"parts": [json.loads(part) for part in parts]} if world.rank == 0 else {}
    try:
        outcome = staging.finish()
    except DynamoMpiError as error:
        world.broadcast()
        return {"error": error.problem}
    staging.accept(world.broadcast(outcome.path.encode()).decode())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {"path": outcome.path, "problem": outcome.problem, "rank_memory_bytes": memory, **outcome.figures}


def await_part(folder: str, seconds: float = 20.0) -> bool:
    """Wait until this node has a part of the model; return whether it has."""
    end = time.monotonic() + seconds
    while not (found := any(Path(folder).glob(f"*/{PARTIAL}*/*.safetensors"))) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def broadcast(world: World, model: str, folder: str) -> None:
    """Copy file by file and block by block, in lock-step."""
    files = scan(model).files if world.rank == 0 else ()
    names = json.loads(world.broadcast(json.dumps([(file.path, file.size) for file in files]).encode()))
    Path(folder).mkdir(parents=True, exist_ok=True)
    buffer = bytearray(BLOCK_BYTES)
    for name, size in names:
        target = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT, 0o600)
        source = os.open(os.path.join(model, name), os.O_RDONLY) if world.rank == 0 else -1
        for offset in range(0, size, BLOCK_BYTES):
            block = memoryview(buffer)[: min(BLOCK_BYTES, size - offset)]
            if world.rank == 0:
                done = 0
                while done < len(block):
                    done += os.preadv(source, [block[done:]], offset + done)
            world.comm.Bcast(block, 0)
            os.pwrite(target, block, offset)
            world.comm.Barrier()
        os.close(target)
        if source >= 0:
            os.close(source)


if __name__ == "__main__":
    main()
