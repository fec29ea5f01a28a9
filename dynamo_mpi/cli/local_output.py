# SPDX-License-Identifier: Apache-2.0
"""What ``dynamo-mpi local`` prints: the answer and its timings as text, or all of it as one JSON object."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from typing import Any

from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.deploy.local.ask import Answer
from dynamo_mpi.deploy.local.stack import Ready, StackSettings
from dynamo_mpi.deploy.local.workers import StackRole
from dynamo_mpi.deploy.services import ServiceError


def curl_line(url: str, model: str) -> str:
    """Return a command that asks the served model."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32})
    words = ["curl", "-s", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    return shlex.join(words)


def success(
    role: StackRole, settings: StackSettings, ready: Ready, answer: Answer, url: str, processes: dict[str, list[int]]
) -> dict[str, Any]:
    """Return what ``--output json`` prints. Keys are added, never removed; ``tp_size`` and ``worker`` are only for a single worker."""
    workers = {spec.role: {"tp_size": spec.tp_size, "worker": ready.workers[spec.role]} for spec in settings.workers}
    return {
        "ok": True,
        "role": role,
        "model": ready.model,
        "url": url,
        **(workers["agg"] if role == "agg" else {}),
        "request_plane": settings.request_plane,
        "answer": {
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
        },
        "seconds": {
            "verdict": _slowest(worker.get("verdict_seconds") for worker in ready.workers.values()),
            "load": _slowest((worker.get("phases") or {}).get("load") for worker in ready.workers.values()),
            "ready": ready.seconds["ready"],
            "first_token": answer.first_token_seconds,
            "answer": answer.total_seconds,
        },
        "tokens_per_second": answer.tokens_per_second,
        "milestones": ready.seconds,
        "workers": workers,
        "processes": processes,
    }


def failure(error: DynamoMpiError, status: int) -> dict[str, Any]:
    """Return what ``--output json`` prints for a failed run."""
    part = error.part if isinstance(error, ServiceError) else None
    return {"ok": False, "part": part, "exit_code": int(status), "error": error.found, "fix": error.fix}


def _slowest(seconds: Iterable[float | None]) -> float | None:
    return max((value for value in seconds if value is not None), default=None)


class Printer:
    """Prints the data."""

    def piece(self, text: str) -> None:
        """Print a piece of the answer when it arrives."""

    def done(self, report: dict[str, Any]) -> None:
        """Print the whole result."""

    def failed(self, report: dict[str, Any]) -> None:
        """Print the failure."""


class JsonPrinter(Printer):
    """One JSON object on one line of stdout."""

    def done(self, report: dict[str, Any]) -> None:
        print(json.dumps(report), flush=True)

    failed = done


class TextPrinter(Printer):
    """The answer on stdout when it arrives, the timings on stderr."""

    def __init__(self) -> None:
        self._wrote = False

    def piece(self, text: str) -> None:
        self._wrote = True
        print(text, end="", flush=True)

    def done(self, report: dict[str, Any]) -> None:
        if self._wrote:
            print(flush=True)
        names = {"verdict": "verdict", "load": "load", "ready": "ready", "first_token": "first token"}
        seconds = report["seconds"]
        times = [f"{name} {seconds[key]:.2f} s" for key, name in names.items() if seconds[key] is not None]
        rate = report["tokens_per_second"]
        say(", ".join(times) + (f", {rate:.1f} tokens/s" if rate else ""))


def say(text: str) -> None:
    """Print one line of progress, or the error, to stderr."""
    print(text, file=sys.stderr, flush=True)
