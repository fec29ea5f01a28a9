# SPDX-License-Identifier: Apache-2.0
"""Two reference engines in one world: the first ranks prefill, the others decode from the KV that they fetch.

Usage: reference_handoff.py MODEL_DIR TASK.json, where the latter holds
``{"prefill": [tp, pp], "decode": [tp, pp], "max_tokens", "prompts": [[token, ...]], "spoil": prefill rank}``. Decode's
rank 0 prints as JSON the tokens of each prompt, its error, the milliseconds from its being submitted there to its first token, and the
tokens of the first prompt computed by decode alone. The address of the rank to spoil is made wrong in each offer.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import time
from pathlib import Path
from typing import Any, cast

from mpi4py import MPI

from dynamo_mpi.engines.reference.factory import thread_environment

os.environ.update(thread_environment(MPI.COMM_WORLD.Get_size()))

# After the line above: numpy reads the number of threads when it is imported.
from dynamo_mpi.engines.protocol import GenerationRequest, TokenChunk
from dynamo_mpi.engines.reference.config import ReferenceConfig
from dynamo_mpi.engines.reference.engine import ReferenceEngine


def run(engine: ReferenceEngine, request: GenerationRequest) -> tuple[list[TokenChunk], float]:
    """Return a request's chunks, and the milliseconds to the first of them."""
    chunks: queue.SimpleQueue[TokenChunk] = queue.SimpleQueue()
    began = time.perf_counter()
    engine.submit(request, chunks.put)
    received = [chunks.get(timeout=60)]
    first = (time.perf_counter() - began) * 1000
    while received[-1].finish_reason is None:
        received.append(chunks.get(timeout=60))
    return received, first


def lead_prefill(engine: ReferenceEngine, task: dict[str, Any], decode_root: int) -> None:
    for number, prompt in enumerate(task["prompts"]):
        request = GenerationRequest(f"p{number}", tuple(prompt), 1, keep_kv=True)
        MPI.COMM_WORLD.send(run(engine, request)[0][-1].kv_transfer_params, decode_root)


def lead_decode(engine: ReferenceEngine, task: dict[str, Any]) -> dict[str, Any]:
    output: dict[str, Any] = {"tokens": [], "milliseconds": [], "errors": []}
    for number, prompt in enumerate(task["prompts"]):
        offer = MPI.COMM_WORLD.recv(source=0)
        if task.get("spoil") is not None:
            offer["ranks"][task["spoil"]]["port"] = 1
        request = GenerationRequest(f"d{number}", tuple(prompt), task["max_tokens"], kv_transfer_params=offer)
        chunks, milliseconds = run(engine, request)
        output["tokens"].append([token for chunk in chunks for token in chunk.token_ids])
        output["milliseconds"].append(milliseconds)
        output["errors"].append(chunks[-1].error)
    alone = run(engine, GenerationRequest("alone", tuple(task["prompts"][0]), task["max_tokens"]))[0]
    output["alone"] = [token for chunk in alone for token in chunk.token_ids]
    return output


def main() -> int:
    task = json.loads(Path(sys.argv[2]).read_text())
    world = MPI.COMM_WORLD
    (prefill_tp, prefill_pp), (decode_tp, decode_pp) = task["prefill"], task["decode"]
    prefills = world.Get_rank() < prefill_tp * prefill_pp
    comm = cast("MPI.Intracomm", world.Split(0 if prefills else 1, world.Get_rank()))
    config = ReferenceConfig(
        Path(sys.argv[1]),
        prefill_tp if prefills else decode_tp,
        pp_size=prefill_pp if prefills else decode_pp,
        serves_kv=prefills,
        kv_network="127.0.0.1",
        kv_pull_seconds=5.0,
    )
    engine = ReferenceEngine(comm, config)
    engine.load()
    assert engine._loaded is not None
    # what isn't handed over must be missed
    engine._loaded.transformer.cache.keys[:, :, :, :600] = 1000
    engine._loaded.transformer.cache.values[:, :, :, :600] = 1000
    world.Barrier()
    if comm.Get_rank() == 0:
        engine.start()
        if prefills:
            lead_prefill(engine, task, prefill_tp * prefill_pp)
        else:
            print(json.dumps(lead_decode(engine, task)))
            world.send(None, 0)
        if prefills:
            world.recv(source=prefill_tp * prefill_pp)
        engine.close()
    else:
        engine.follow()
    return 0


if __name__ == "__main__":
    sys.exit(main())
