# SPDX-License-Identifier: Apache-2.0
"""Run rounds of requests through the reference engine on all ranks; rank 0 prints what came out as JSON.

Usage: reference_generate.py MODEL_DIR ROUNDS.json, where the latter holds
``{"max_batch_size", "pp_size", "idle_seconds", "rounds": [[{"prompt", "max_tokens", "seed", "temperature"}]]}``.
The requests of a round are submitted together, the next round when all of them have ended. Without rounds the engine is
closed without having been started.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from mpi4py import MPI

from dynamo_mpi.engines.reference.factory import thread_environment

os.environ.update(thread_environment(MPI.COMM_WORLD.Get_size()))

# After the line above: numpy reads the number of threads when it is imported.
from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.engines.protocol import GenerationRequest, Sampling, TokenChunk
from dynamo_mpi.engines.reference.engine import ReferenceConfig, ReferenceEngine


class CpuSampler:
    """Records this process's CPU time against the clock, so that a window can be chosen afterwards."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._record, daemon=True)
        self._thread.start()

    def _record(self) -> None:
        while not self._done.wait(0.05):
            times = os.times()
            self._samples.append((time.time(), times.user + times.system))

    def share(self, began: float, ended: float) -> float:
        """Return the CPU seconds per second between two times of the clock."""
        self._done.set()
        self._thread.join()
        inside = [sample for sample in self._samples if began <= sample[0] <= ended]
        return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])


def run_round(engine: ReferenceEngine, wanted: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    done = threading.Semaphore(0)
    results: list[dict[str, Any]] = [{"tokens": [], "times": []} for _ in wanted]

    def receive(result: dict[str, Any], chunk: TokenChunk) -> None:
        result["tokens"] += chunk.token_ids
        result["times"].append(time.perf_counter())
        if chunk.finish_reason is not None:
            result["finish_reason"] = chunk.finish_reason
            done.release()

    began = time.perf_counter()
    for index, (request, result) in enumerate(zip(wanted, results, strict=True)):
        sampling = Sampling(temperature=request.get("temperature", 0.0), seed=request.get("seed"))
        engine.submit(
            GenerationRequest(f"{number}-{index}", tuple(request["prompt"]), request["max_tokens"], sampling=sampling),
            partial(receive, result),
        )
    for _ in wanted:
        done.acquire()
    for result in results:
        result["times"] = [moment - began for moment in result["times"]]
    return results


def main() -> int:
    task = json.loads(Path(sys.argv[2]).read_text())
    comm = MPI.COMM_WORLD
    pp_size = task.get("pp_size", 1)
    config = ReferenceConfig(
        Path(sys.argv[1]),
        comm.Get_size() // pp_size,
        pp_size=pp_size,
        max_batch_size=task.get("max_batch_size", 8),
    )
    began = time.perf_counter()
    try:
        engine = ReferenceEngine(comm, config)
        engine.load()
    except DynamoMpiError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    loaded = time.perf_counter() - began
    cpu = CpuSampler()
    output: dict[str, Any] = {"load_seconds": loaded}
    window = (0.0, 0.0)
    if comm.Get_rank() == 0:
        if task["rounds"]:
            engine.start()
        output["rounds"] = [run_round(engine, wanted, number) for number, wanted in enumerate(task["rounds"])]
        idle_from = time.time()
        time.sleep(task["idle_seconds"])  # the idle window itself is what is measured
        window = (idle_from + 0.2, time.time())
        engine.close()
    else:
        engine.follow()
    window = comm.bcast(window)
    shares = comm.gather(cpu.share(*window) if task["idle_seconds"] else 0.0)
    if comm.Get_rank() == 0:
        output["idle_cpu_shares"] = shares
        print(json.dumps(output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
