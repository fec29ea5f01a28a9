# SPDX-License-Identifier: Apache-2.0
"""A rank that does with compile caches what a worker's rank does, and compiles as the stand-in for TensorRT-LLM; it prints JSON lines.

mpirun ... python -m tests.hosts.cache_ranks ARCHIVES BASE KERNELS SEED_SECONDS
"""

from __future__ import annotations

import json
import os
import sys

from tensorrt_llm._compiling import compile_kernels

from dynamo_mpi.common.process import host_name
from dynamo_mpi.mpi.world import init_mpi, load_mpi_library
from dynamo_mpi.stage import cache_session
from dynamo_mpi.stage.cache_helper import handle
from dynamo_mpi.stage.cache_session import CachePlan, CacheSession
from dynamo_mpi.stage.cache_store import Part, folders_of, name_of


def main() -> None:
    """Run this rank."""
    directory, base, kernels, seconds = sys.argv[1:]
    cache_session.SEED_SECONDS = float(seconds)
    os.environ["STANDIN_TRTLLM_KERNELS"] = kernels
    load_mpi_library()
    world = init_mpi()
    key = {"ranks": world.size}
    folders = folders_of(directory, name_of("M", key))
    packed = b""
    if world.rank == 0:
        found = handle({"do": "look", "folders": folders, "key": key, "ranks": world.size, "worker": "w"})
        parts = tuple(Part(*part) for part in found.get("parts", ()))
        packed = CachePlan(name_of("M", key), (base,), found.get("folder", ""), parts, folders[0]).pack().encode()
    plan = CachePlan.unpack(world.broadcast(packed).decode())
    session = CacheSession(world.rank, plan, os.environ, lambda _: None)
    session.begin()
    seeding = session.finish(world)
    if seeding is not None:
        print(
            json.dumps({"seeded": seeding.seeded, "problems": [each.problem for each in seeding.problems]}), flush=True
        )
    if os.environ.get("TRITON_CACHE_DIR"):
        compile_kernels(world.rank)
    answers = [json.loads(answer) for answer in world.gather(json.dumps(session.save()).encode())]
    if world.rank == 0 and all("part" in answer for answer in answers):
        request = {"do": "publish", "target": plan.target, "key": key, "parts": [answer["part"] for answer in answers]}
        print(json.dumps({"published": handle(request), "new": [answer["new"] for answer in answers]}), flush=True)
    where = os.environ.get("TRITON_CACHE_DIR", "")
    print(json.dumps({"rank": world.rank, "host": host_name(), "folder": where}), flush=True)
    session.remove()


if __name__ == "__main__":
    main()
