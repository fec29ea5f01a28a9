# SPDX-License-Identifier: Apache-2.0
"""Streamed tokens per second through our serving path, against Dynamo's own sample engine.

    python tests/bench/serving_rate.py [--tokens 512] [--rounds 5]

Both workers make tokens for nothing, and run beside each other behind one real frontend (etcd, tcp request plane). They are asked in
turn, by 1 and by 32 clients at once, over streaming HTTP; the figures to look at are the median ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from dynamo_mpi.common.ports import LOOPBACK, free_port
from dynamo_mpi.deploy.programs import find_etcd
from dynamo_mpi.deploy.services import Etcd, Frontend
from dynamo_mpi.engines.reference.convert_gguf import export_model, find_default_gguf

HERE = Path(__file__).resolve().parent
NAMES = ("ours", "sample")


async def stream(port: int, model: str, tokens: int) -> int:
    """Ask for ``tokens`` tokens, read the stream to its end, and return the number of events with text."""
    body = json.dumps(
        {
            "model": model,
            "prompt": [1, 2, 3, 4],
            "max_tokens": tokens,
            "stream": True,
            "ignore_eos": True,
        }
    ).encode()
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
    data = await reader.read(-1)
    writer.close()
    if b"[DONE]" not in data or b'"finish_reason":"length"' not in data:
        raise SystemExit(f"{model} did not finish: {data[-600:]!r}")
    return data.count(b"data: {")


async def rate(port: int, model: str, clients: int, tokens: int) -> tuple[float, int]:
    """Return tokens per second over all clients, and events."""
    start = time.perf_counter()
    events = await asyncio.gather(*(stream(port, model, tokens) for _ in range(clients)))
    return clients * tokens / (time.perf_counter() - start), sum(events)


async def compare(port: int, clients: int, tokens: int, rounds: int) -> None:
    """Ask both in turn and print the ratio."""
    for model in NAMES:
        await rate(port, model, clients, tokens)
    pairs = []
    for _ in range(rounds):
        pairs.append([await rate(port, model, clients, tokens) for model in NAMES])
    ratios = sorted(ours[0] / sample[0] for ours, sample in pairs)
    ours, sample = (statistics.median(pair[i][0] for pair in pairs) for i in (0, 1))
    events = [statistics.median(pair[i][1] for pair in pairs) for i in (0, 1)]
    print(
        f"{clients} clients x {tokens} tokens: ours {ours:,.0f} tok/s in {events[0]:.0f} events, "
        f"sample engine {sample:,.0f} tok/s in {events[1]:.0f} events; "
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, {rounds} pairs)",
        flush=True,
    )


async def listed(frontend: Frontend) -> None:
    """Wait until the frontend lists both models."""
    end = time.monotonic() + 60
    while not set(NAMES) <= set(await asyncio.to_thread(frontend.models)):
        if time.monotonic() > end:
            raise SystemExit(f"the frontend lists only {frontend.models()}")
        await asyncio.sleep(0.1)


async def answers(service: Etcd | Frontend) -> None:
    """Wait until a service answers."""
    end = time.monotonic() + 60
    while not await asyncio.to_thread(service.answers):
        if time.monotonic() > end:
            raise SystemExit(f"{service.name} does not answer")
        await asyncio.sleep(0.05)


async def run(arguments: argparse.Namespace) -> None:
    """Start everything, compare, stop everything."""
    with ExitStack() as cleanup:
        scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        log = cleanup.enter_context((scratch / "log").open("wb"))

        def start(command: list[str], environment: dict[str, str]) -> None:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            cleanup.callback(process.wait)
            cleanup.callback(process.terminate)

        etcd = Etcd(find_etcd(), free_port(), scratch / "etcd")
        frontend = Frontend(free_port(), {"ETCD_ENDPOINTS": etcd.url, "DYN_REQUEST_PLANE": "tcp"}, scratch)
        environment = os.environ | frontend.environment() | {"DYN_LOG": "error", "DYN_SYSTEM_PORT": "0"}
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (os.environ.get("PYTHONPATH"), str(HERE.parent.parent)))
        )
        export_model(find_default_gguf(), scratch / "model")
        start(list(etcd.command()), dict(os.environ))
        await answers(etcd)
        start(list(frontend.command()), environment)
        # the sample engine registers under its model's path, so each gets a folder of its own name
        (scratch / "sample").symlink_to(scratch / "model")
        start(
            [sys.executable, str(HERE / "echo_worker.py"), str(scratch / "model"), "ours", "dyn://bench.ours.generate"],
            environment,
        )
        start([sys.executable, str(HERE / "sample_worker.py"), str(scratch / "sample"), "sample"], environment)
        await answers(frontend)
        await listed(frontend)
        for clients in (1, 32):
            await compare(frontend.port, clients, arguments.tokens, arguments.rounds)


def main() -> int:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    asyncio.run(run(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
