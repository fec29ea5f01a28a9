# SPDX-License-Identifier: Apache-2.0
"""Sends one streaming chat completion to the frontend, and measures it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from dynamo_mpi.common.errors import EngineError, ExitCode
from dynamo_mpi.common.ports import LOOPBACK


class NotServedYet(Exception):
    """The frontend has no worker for the model (yet)."""


class RequestRefused(EngineError):
    """The frontend or the worker refuses the request."""

    exit_code = ExitCode.USAGE


@dataclass(frozen=True)
class Answer:
    """A completion.

    Args:
        text: the whole answer.
        finish_reason: ``stop`` or ``length``.
        prompt_tokens: tokens of the prompt, with the chat template's own.
        completion_tokens: tokens of the answer.
        first_token_seconds: from sending the request to the first text.
        total_seconds: from sending the request to the end of the stream.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    first_token_seconds: float
    total_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first divided by their time; None if there are none."""
        seconds = self.total_seconds - self.first_token_seconds
        return (self.completion_tokens - 1) / seconds if self.completion_tokens > 1 and seconds > 0 else None


def ask(
    port: int,
    model: str,
    text: str,
    *,
    max_tokens: int,
    timeout_seconds: float,
    interruptible: Callable[[socket.socket], AbstractContextManager[None]],
    on_text: Callable[[str], None] = lambda text: None,
    host: str = LOOPBACK,
) -> Answer:
    """POST one chat completion to the frontend.

    Args:
        port: the frontend's.
        model: the served name.
        text: the user's message.
        max_tokens: limit of the answer's length.
        timeout_seconds: the longest wait without data.
        interruptible: guards the connected socket while we wait; see ``Interrupts.closing``.
        on_text: called with each piece of the answer when it arrives.
        host: the frontend's host.

    Raises:
        NotServedYet: 404 or 503.
        RequestRefused: another status from 400 to 499.
        EngineError: another error status, an error within the stream, or a stream that breaks off.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection(host, port, timeout=timeout_seconds)
    with contextlib.closing(connection):
        with _network("does not answer"):
            connection.connect()
        with interruptible(connection.sock):
            started = time.monotonic()
            with _network():
                headers = {"Content-Type": "application/json"}
                connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
                response = connection.getresponse()
                if response.status != 200:
                    _refuse(response.status, response.read().decode(errors="replace"))
            return _collect(read_events(_lines(response)), started, on_text)


@contextlib.contextmanager
def _network(what: str = "broke off") -> Iterator[None]:
    """Convert network errors to `EngineError`. Not used around ``on_text``, whose stdout may be a broken pipe."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise EngineError(
            f"the frontend {what}: {reason}", expected="a frontend that answers", fix="look at its log and the worker's"
        ) from error


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    with _network():
        yield from response


def read_events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the JSON of each server-sent event, up to ``[DONE]``.

    Raises:
        EngineError: the stream carries an error, or ends without ``[DONE]``.
    """
    kind = ""
    for raw in lines:
        line = raw.decode(errors="replace").rstrip("\r\n")
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            kind = ""
        elif field == "event":
            kind = value
        elif kind == "error" or (field == "data" and value.startswith('{"error"')):
            raise EngineError(
                f"the answer ended with an error: {value}", expected="a whole answer", fix="look at the worker's log"
            )
        elif field == "data" and value == "[DONE]":
            return
        elif field == "data":
            yield json.loads(value)
    raise EngineError("the answer broke off", expected="a whole answer", fix="look at the worker's log")


def _collect(events: Iterable[dict[str, Any]], started: float, on_text: Callable[[str], None]) -> Answer:
    pieces: list[str] = []
    first: float | None = None
    finish_reason = ""
    usage: dict[str, Any] = {}
    for event in events:
        usage = event.get("usage") or usage
        for choice in event.get("choices") or []:
            finish_reason = choice.get("finish_reason") or finish_reason
            piece = (choice.get("delta") or {}).get("content")
            if piece:
                first = first if first is not None else time.monotonic() - started
                pieces.append(piece)
                on_text(piece)
    total = time.monotonic() - started
    if first is None and not usage.get("completion_tokens"):
        raise EngineError("the answer holds no token", expected="at least one", fix="look at the worker's log")
    return Answer(
        text="".join(pieces),
        finish_reason=finish_reason,
        prompt_tokens=int(usage.get("prompt_tokens", 0)),
        completion_tokens=int(usage.get("completion_tokens", 0)),
        first_token_seconds=total if first is None else first,  # tokens without text, such as only an end token
        total_seconds=total,
    )


def _refuse(status: int, body: str) -> None:
    if status in (404, 503):
        raise NotServedYet(body)
    reason = _reason(body)
    if 400 <= status < 500:
        raise RequestRefused(
            f"the request was refused ({status}): {reason}",
            expected="a request that the model and the engine take",
            fix="a shorter question, fewer --max-tokens, or a larger --max-seq-len where it is too long",
        )
    raise EngineError(
        f"the frontend answered {status}: {reason}", expected="200, and the answer", fix="look at the worker's log"
    )


def _reason(body: str) -> str:
    """Return the message of an error's JSON; another body as it is."""
    try:
        message = json.loads(body)["message"]
    except (ValueError, KeyError, TypeError):
        return " ".join(body.split())
    return str(message)
