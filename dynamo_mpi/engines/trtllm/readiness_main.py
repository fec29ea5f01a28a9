# SPDX-License-Identifier: Apache-2.0
"""Wait until ``dynamo.trtllm`` is registered, then ask it for one completion through its own endpoint, as a frontend would.

A process of its own (``python -m dynamo_mpi.engines.trtllm.readiness_main``): Dynamo's runtime brings a lease and threads that
rank 0's MPI process, where the engine runs, should not have. It writes one JSON object per line to stdout: ``{"registered": ID}``,
then ``{"proven": SECONDS}``, or ``{"error": TEXT}``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.host_address import is_here
from dynamo_mpi.common.ports import holds_port

if TYPE_CHECKING:
    from collections.abc import Sequence

_POLL_SECONDS = 0.1
# far less than dynamo.trtllm needs to import what it needs
_SETTLE_SECONDS = 1.0
_TOKENS = 2  # the first comes from the prompt, the second from the cache that the first one filled
# keeps the request out of the cache of others: the engine's own dummy requests share a prompt of one token
_CACHE_SALT = "dynamo_mpi-proof"


def proof_request(role: str, token_id: int) -> dict[str, Any]:
    """Return a request for two tokens.

    Prefill and decode workers make both themselves: with ``context_and_generation`` the handler needs no peer, which it
    allows for a health check only (`dynamo.trtllm.health_check`).
    """
    request: dict[str, Any] = {
        "token_ids": [token_id],
        "stop_conditions": {"max_tokens": _TOKENS, "ignore_eos": True},
        "sampling_options": {"temperature": 0.0},
        "output_options": {},
        "routing": {"cache_salt": _CACHE_SALT},
        "_HEALTH_CHECK": True,
    }
    if role in ("prefill", "decode"):
        request["disaggregated_params"] = {"request_type": "context_and_generation"}
    return request


async def find_instance(client: Any, pid: int) -> int:
    """Wait for the instance that process ``pid`` serves, and return its id: others may serve the same endpoint."""
    before: set[int] = set()
    # a client knows nothing at first, and hears of those that are there a moment later
    settled = time.monotonic() + _SETTLE_SECONDS
    while True:
        instances = list(client.instances())
        if time.monotonic() < settled:
            before |= {instance.instance_id for instance in instances}
        for instance in instances:
            transport = instance.transport
            if transport.kind == "tcp":
                # HOST:PORT/INSTANCE/ENDPOINT
                host, _, port = transport.address.partition("/")[0].rpartition(":")
                if port.isdecimal() and is_here(host.strip("[]")) and holds_port(pid, int(port)):
                    return int(instance.instance_id)
            elif instance.instance_id not in before:
                # a NATS subject doesn't say which process listens
                return int(instance.instance_id)
        await asyncio.sleep(_POLL_SECONDS)


async def _complete(client: Any, request: dict[str, Any], instance: int) -> int:
    tokens = 0
    async for chunk in await client.direct(request, instance):
        if chunk.is_error():
            raise RuntimeError(
                " ".join(str(comment) for comment in chunk.comments() or ["the stream ended with an error"])
            )
        data = chunk.data() or {}
        if data.get("finish_reason") not in (None, "stop", "length"):
            raise RuntimeError(f"it ended with {data['finish_reason']!r}")
        tokens += len(data.get("token_ids") or ())
    return tokens


async def probe_readiness(arguments: argparse.Namespace) -> None:
    """Wait, ask, and write what came of it."""
    from dynamo.runtime import DistributedRuntime

    runtime = DistributedRuntime(asyncio.get_running_loop(), arguments.discovery_backend, arguments.request_plane)
    client = await runtime.endpoint(arguments.endpoint.removeprefix("dyn://")).client()
    instance = await find_instance(client, arguments.pid)
    _write(registered=instance)
    if arguments.role == "encode":
        return
    start = time.monotonic()
    tokens = await _complete(client, proof_request(arguments.role, arguments.token_id), instance)
    if tokens == 0:
        raise RuntimeError("no token came")
    _write(proven=time.monotonic() - start)


def _write(**content: Any) -> None:
    print(json.dumps(content), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dynamo_mpi.engines.trtllm.readiness_main")
    parser.add_argument("--pid", type=int, required=True, help="process of dynamo.trtllm")
    parser.add_argument("--token-id", type=int, required=True, help="prompt of one token")
    for name in ("endpoint", "role", "discovery-backend", "request-plane"):
        parser.add_argument(f"--{name}", required=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns 0 when the completion came."""
    arguments = _parser().parse_args(argv)
    try:
        asyncio.run(probe_readiness(arguments))
    except Exception as error:  # the runtime has no finer type for any of its troubles
        _write(error=" ".join(f"{type(error).__name__}: {error}".split()))
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # the runtime's threads don't survive the interpreter's own end
    os._exit(code)
