# SPDX-License-Identifier: Apache-2.0
"""Wait until ``dynamo.trtllm`` is registered, then request one completion through its endpoint, like a frontend.

A separate process (``python -m dynamo_mpi.engines.trtllm.readiness_main``), because Dynamo's runtime has a lease and threads that rank 0's
MPI process, where the engine runs, should not have. It writes one JSON object per line to stdout: ``{"registered": ID}``, then
``{"proven": SECONDS, "warning": TEXT}``, or ``{"error": TEXT}``.

A completion with tokens proves that the engine works, not that its weights are right. So a second one is asked for with log probabilities,
where the engine gives them: one that is no number is an error. A text of one token over and over is a warning, and so is a second completion
that fails or takes long.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.host_address import is_here
from dynamo_mpi.common.ports import holds_port
from dynamo_mpi.common.run_with_services import use_services_file

if TYPE_CHECKING:
    from collections.abc import Sequence

_POLL_SECONDS = 0.1
# far less than dynamo.trtllm needs for its imports
_SETTLE_SECONDS = 1.0
_TOKENS = 2  # the second is generated from the KV cache that the first one filled
# sound models seldom repeat one token so often
_CHECKED_TOKENS = 8
_CHECK_SECONDS = 30.0
# keeps the request out of the shared prefix cache: the engine's own dummy requests have a prompt of one token too
_CACHE_SALT = "dynamo_mpi-proof"


class Completion(NamedTuple):
    """What came back.

    Args:
        tokens: the generated tokens.
        log_probs: their log probabilities; empty if the engine gives none.
    """

    tokens: list[int]
    log_probs: list[float | None]


def completion_request(role: str, token_id: int, tokens: int = _TOKENS, *, log_probs: bool = False) -> dict[str, Any]:
    """Return a request for some tokens.

    Prefill and decode workers generate them all themselves: with ``context_and_generation`` the handler needs no peer, which it allows for
    health checks only (`dynamo.trtllm.health_check`).
    """
    request: dict[str, Any] = {
        "token_ids": [token_id],
        "stop_conditions": {"max_tokens": tokens, "ignore_eos": True},
        "sampling_options": {"temperature": 0.0},
        "output_options": {"logprobs": 1} if log_probs else {},
        "routing": {"cache_salt": _CACHE_SALT},
        "_HEALTH_CHECK": True,
    }
    if role in ("prefill", "decode"):
        request["disaggregated_params"] = {"request_type": "context_and_generation"}
    return request


async def find_instance(client: Any, pid: int) -> int:
    """Wait for the instance that process ``pid`` serves, and return its id: other processes may serve the same endpoint."""
    existing: set[int] = set()
    # a new client gets the existing instances with a delay
    settled_at = time.monotonic() + _SETTLE_SECONDS
    while True:
        instances = list(client.instances())
        if time.monotonic() < settled_at:
            existing |= {instance.instance_id for instance in instances}
        for instance in instances:
            transport = instance.transport
            if transport.kind == "tcp":
                # HOST:PORT/INSTANCE/ENDPOINT
                host, _, port = transport.address.partition("/")[0].rpartition(":")
                if port.isdecimal() and is_here(host.strip("[]")) and holds_port(pid, int(port)):
                    return int(instance.instance_id)
            elif instance.instance_id not in existing:
                # a NATS subject doesn't identify the process
                return int(instance.instance_id)
        await asyncio.sleep(_POLL_SECONDS)


async def _complete(client: Any, request: dict[str, Any], instance: int) -> Completion:
    found = Completion([], [])
    async for chunk in await client.direct(request, instance):
        if chunk.is_error():
            raise RuntimeError(
                " ".join(str(comment) for comment in chunk.comments() or ["the stream ended with an error"])
            )
        data = chunk.data() or {}
        if data.get("finish_reason") not in (None, "stop", "length"):
            raise RuntimeError(f"it ended with {data['finish_reason']!r}")
        found.tokens.extend(data.get("token_ids") or ())
        found.log_probs.extend(data.get("log_probs") or ())
    return found


def judge(completion: Completion) -> str:
    """Return a warning about a completion of `_CHECKED_TOKENS` tokens, or an empty text.

    Raises:
        RuntimeError: a log probability is no number. JSON has null for one.
    """
    wrong = [value for value in completion.log_probs if value is None or not math.isfinite(value)]
    if wrong:
        raise RuntimeError(
            f"{len(wrong)} of {len(completion.log_probs)} log probabilities are no numbers: the weights, or what computes with them, are "
            "damaged; compare the model's files with their source, and look for Xid errors of the GPUs"
        )
    if len(completion.tokens) >= _CHECKED_TOKENS and len(set(completion.tokens)) == 1:
        return (
            f"the answer to a prompt of one token is {len(completion.tokens)} times token {completion.tokens[0]}: if answers to questions "
            "make no sense either, compare the model's files with their source, and its quantisation with the GPU's"
        )
    return ""


async def probe_readiness(arguments: argparse.Namespace) -> None:
    """Wait for the registration, request a completion, and write the results."""
    from dynamo.runtime import DistributedRuntime

    runtime = DistributedRuntime(asyncio.get_running_loop(), arguments.discovery_backend, arguments.request_plane)
    client = await runtime.endpoint(arguments.endpoint.removeprefix("dyn://")).client()
    instance = await find_instance(client, arguments.pid)
    _write(registered=instance)
    if arguments.role == "encode":
        return
    start = time.monotonic()
    warning = await ask(client, arguments, instance)
    _write(proven=time.monotonic() - start, warning=warning)


async def ask(client: Any, arguments: argparse.Namespace, instance: int, check_seconds: float = _CHECK_SECONDS) -> str:
    """Request a completion, and another one to be judged; return a warning, or an empty text.

    Args:
        client: of the worker's endpoint.
        arguments: the command line's.
        instance: the worker's id.
        check_seconds: time limit for the second completion; the first one has that of the worker's start.

    Raises:
        RuntimeError: the first completion failed, or `judge` refuses the second one.
    """
    first = await _complete(client, completion_request(arguments.role, arguments.token_id), instance)
    if not first.tokens:
        raise RuntimeError("the completion has no tokens")
    request = completion_request(arguments.role, arguments.token_id, _CHECKED_TOKENS, log_probs=arguments.log_probs)
    try:
        checked = await asyncio.wait_for(_complete(client, request, instance), check_seconds)
    except asyncio.TimeoutError:
        reason = f"no answer in {check_seconds:g} s"
    except Exception as error:  # an engine that refuses log probabilities has answered without them
        reason = " ".join(f"{type(error).__name__}: {error}".split())
    else:
        return judge(checked)
    what = "log probabilities were" if arguments.log_probs else "a longer answer was"
    return f"{what} not checked: {reason}"


def _write(**content: Any) -> None:
    print(json.dumps(content), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dynamo_mpi.engines.trtllm.readiness_main")
    parser.add_argument("--pid", type=int, required=True, help="process of dynamo.trtllm")
    parser.add_argument("--token-id", type=int, required=True, help="prompt of one token")
    parser.add_argument("--log-probs", action="store_true", help="ask for log probabilities")
    for name in ("endpoint", "role", "discovery-backend", "request-plane"):
        parser.add_argument(f"--{name}", required=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the probe; return 0 if the completion succeeded."""
    arguments = _parser().parse_args(argv)
    try:
        use_services_file()
        asyncio.run(probe_readiness(arguments))
    except Exception as error:  # the runtime has no finer exception types
        _write(error=" ".join(f"{type(error).__name__}: {error}".split()))
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # the runtime's threads crash during Python's finalization
    os._exit(code)
