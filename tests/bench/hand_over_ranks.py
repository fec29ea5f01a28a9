# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode ranks that hand prompts' KV over, and one plain socket copy after each. For `hand_over.py` alone.

Usage: hand_over_ranks.py MODEL_DIR PREFILL_TP DECODE_TP WARM_UPS ROUNDS LENGTH...

The first ranks of the world prefill, the others decode, each an engine over a communicator of its own. Decode's rank 0 prints as JSON,
by prompt length, the seconds of each hand-over as the engine itself logs them (from the pull's begin to the ranks' consensus that all
of it is there), and those of copying as many bytes over loopback from prefill's rank 0 into a buffer that is there already.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import socket
import sys
import time
from pathlib import Path
from typing import cast

from mpi4py import MPI

from dynamo_mpi.engines.reference.factory import thread_environment

os.environ.update(thread_environment(MPI.COMM_WORLD.Get_size()))

# After the line above: numpy reads the number of threads when it is imported.
import numpy as np

from dynamo_mpi.common.ports import LOOPBACK
from dynamo_mpi.engines.protocol import GenerationRequest, TokenChunk
from dynamo_mpi.engines.reference.config import ReferenceConfig
from dynamo_mpi.engines.reference.engine import ReferenceEngine
from dynamo_mpi.engines.reference.kv_descriptor import parse_descriptor

_PREFILL_ROOT = 0


class _Arrivals(logging.Handler):
    """Takes the milliseconds out of the engine's own line about a prompt's KV."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds: queue.SimpleQueue[float] = queue.SimpleQueue()

    def emit(self, record: logging.LogRecord) -> None:
        if "KV came in" in str(record.msg) and isinstance(record.args, tuple):
            self.seconds.put(float(str(record.args[1])) / 1000)


def finish(engine: ReferenceEngine, request: GenerationRequest) -> TokenChunk:
    """Run a request and return its last chunk."""
    chunks: queue.SimpleQueue[TokenChunk] = queue.SimpleQueue()
    engine.submit(request, chunks.put)
    while (chunk := chunks.get(timeout=120)).finish_reason is None:
        pass
    if chunk.finish_reason != "length":
        raise SystemExit(f"{request.request_id} did not finish: {chunk}")
    return chunk


def prompt_of(length: int) -> tuple[int, ...]:
    """Return the same tokens each time."""
    return tuple(1000 + place % 997 for place in range(length))


def prefill(engine: ReferenceEngine, lengths: list[int], times: int, decode_root: int) -> None:
    """KvDescriptor each prompt's KV, then send as many bytes as it has over a plain socket."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        MPI.COMM_WORLD.send(listener.getsockname()[1], decode_root)
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for length in lengths:
                for number in range(times):
                    request = GenerationRequest(f"p{length}-{number}", prompt_of(length), 1, keep_kv=True)
                    offer = finish(engine, request).kv_transfer_params
                    MPI.COMM_WORLD.send(offer, decode_root)
                    payload = memoryview(np.ones(kv_bytes(offer), np.uint8).data)
                    connection.recv(1)
                    connection.sendall(payload)


def kv_bytes(offer: object) -> int:
    """Return the size of the keys and values that an offer is about."""
    layout, tokens = parse_descriptor(offer).layout, parse_descriptor(offer).prompt_tokens
    return 2 * layout.layers * layout.kv_heads * layout.head_dim * tokens * np.dtype(np.float32).itemsize


def decode(engine: ReferenceEngine, lengths: list[int], times: int) -> dict[int, dict[str, object]]:
    """Go on from each offer, then fetch as many bytes over a plain socket; return the seconds of both."""
    arrivals = _Arrivals()
    logger = logging.getLogger("dynamo_mpi.engines.reference.engine")
    logger.addHandler(arrivals)
    logger.setLevel(logging.INFO)
    found: dict[int, dict[str, object]] = {}
    with socket.create_connection((LOOPBACK, MPI.COMM_WORLD.recv(source=_PREFILL_ROOT))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for length in lengths:
            handed, copied, size = [], [], 0
            for number in range(times):
                offer = MPI.COMM_WORLD.recv(source=_PREFILL_ROOT)
                finish(engine, GenerationRequest(f"d{length}-{number}", prompt_of(length), 2, kv_transfer_params=offer))
                handed.append(arrivals.seconds.get(timeout=10))
                size = kv_bytes(offer)
                copied.append(copy(connection, memoryview(np.ones(size, np.uint8).data)))
            found[length] = {"bytes": size, "handed": handed, "copied": copied}
    return found


def copy(connection: socket.socket, target: memoryview) -> float:
    """Ask for the bytes, fill ``target`` with them, and return the seconds."""
    began = time.perf_counter()
    connection.send(b"!")
    while target:
        count = connection.recv_into(target)
        if not count:
            raise SystemExit("the plain socket was closed")
        target = target[count:]
    return time.perf_counter() - began


def main() -> int:
    """Run all prompts; print the seconds."""
    model_dir = Path(sys.argv[1])
    prefill_tp, decode_tp, warm_ups, rounds, *lengths = map(int, sys.argv[2:])
    world = MPI.COMM_WORLD
    prefills = world.Get_rank() < prefill_tp
    comm = cast("MPI.Intracomm", world.Split(0 if prefills else 1, world.Get_rank()))
    size = prefill_tp if prefills else decode_tp
    engine = ReferenceEngine(comm, ReferenceConfig(model_dir, size, serves_kv=prefills, kv_network=LOOPBACK))
    engine.load()
    world.Barrier()
    if comm.Get_rank() != 0:
        engine.follow()
        return 0
    engine.start()
    if prefills:
        prefill(engine, lengths, warm_ups + rounds, prefill_tp)
        world.recv(source=prefill_tp)
    else:
        print(json.dumps(decode(engine, lengths, warm_ups + rounds)))
        world.send(None, _PREFILL_ROOT)
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
