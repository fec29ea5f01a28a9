# SPDX-License-Identifier: Apache-2.0
"""Wait until a deployment is ready: every role that it needs serves, and the frontend has answered a real completion.

In a deployment that launch started, all workers must serve; in others, one of each role that the model needs. Exit code 0 if it is ready;
124 at the time limit, with the missing workers and their progress (64 if there is no such run folder until then, 69 if etcd doesn't answer,
78 if all serve but their model cards differ); 64 at once for a file or a folder that a launch would refuse, 65 for a damaged services.json,
77 if etcd rejects the credentials; the failure's own code if it can no longer become ready.
While launch runs, it restarts workers; if it ends, its exit code.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dynamo_mpi.cli.style import write_out
from dynamo_mpi.common.display import without_controls
from dynamo_mpi.config.options import Option, add_options, resolve, to_role
from dynamo_mpi.config.sources import MAX_SECONDS, to_seconds
from dynamo_mpi.layout.layout import ROLES
from dynamo_mpi.ops.deployment import MODEL, NAMESPACE, RUN_DIR, add_output
from dynamo_mpi.ops.wait import ReadinessWaiter, WaitRequest

if TYPE_CHECKING:
    import argparse

    from dynamo_mpi.ops.wait import WaitResult

SCHEMA = 1


def to_roles(text: str) -> tuple[str, ...]:
    """Read roles, separated by commas."""
    roles = tuple(dict.fromkeys(to_role(part.strip()) for part in text.split(",") if part.strip()))
    if not roles or any(role not in ROLES for role in roles):
        raise ValueError(f"some of {', '.join(ROLES)}, with commas between")
    return roles


def to_url(text: str) -> str:
    """Read the URL of a frontend, without user and password: a frontend needs none, and the URL is displayed."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        is_one = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_one = False
    if not is_one:
        raise ValueError("http://HOST:PORT")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


ROLE = Option("role", ("--role",), (), (), to_roles, "roles that must serve, separated by commas or as several flags")
FRONTEND = Option(
    "frontend",
    ("--frontend",),
    ("DYN_MPI_FRONTEND",),
    None,
    to_url,
    "URL of the frontend that must answer; by default the run folder's",
)
TIMEOUT = Option("timeout", ("--timeout",), (), 3600.0, to_seconds, f"seconds to wait, up to {MAX_SECONDS:g}")
OPTIONS = (RUN_DIR, NAMESPACE, MODEL, FRONTEND, TIMEOUT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    add_options(parser, OPTIONS)
    parser.add_argument(*ROLE.flags, dest=ROLE.name, action="append", metavar="ROLE", help=ROLE.help)
    add_output(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; return the exit code.

    Raises:
        UsageError: the deployment is ambiguous or missing.
    """
    given = {**vars(arguments), "role": ",".join(arguments.role) if arguments.role else None}
    values, _ = resolve((*OPTIONS, ROLE), given, os.environ, {})
    request = WaitRequest(
        values["run_dir"],
        values["namespace"],
        values["model"],
        values["role"],
        values["frontend"] or "",
        values["timeout"],
    )
    outcome = ReadinessWaiter(request, os.environ, _say).run()
    if outcome.error is not None:
        if log := getattr(outcome.error, "log", ""):
            _say(log)
        _say(str(outcome.error))
    if arguments.output == "json":
        write_out(json.dumps(_as_json(outcome)))
    elif outcome.error is None:
        write_out(_describe(outcome))
    return outcome.exit_code


def _describe(outcome: WaitResult) -> str:
    workers = outcome.status.workers if outcome.status is not None else ()
    serving = [worker.record for worker in workers if worker.record.is_serving]
    parts = [
        f"{model}: {', '.join(w.role for w in serving if w.model == model)}"
        for model in dict.fromkeys(worker.model for worker in serving)
    ]
    proof = "; a completion came back" if outcome.answers else ""
    return f"ready after {outcome.seconds:.1f} s: {'; '.join(parts)}{proof}"


def _as_json(outcome: WaitResult) -> dict[str, Any]:
    """Return the final state: what is missing, what has answered, and under ``status`` the output of `status`, null if etcd wasn't
    queried."""
    from dynamo_mpi.ops.status_output import as_json

    content: dict[str, Any] = {
        "schema": SCHEMA,
        "ok": outcome.error is None,
        "exit_code": int(outcome.exit_code),
        "seconds": outcome.seconds,
        "missing": [{"name": item.name, "position": item.position} for item in outcome.missing],
        "completions": {
            model: {"tokens": answer.completion_tokens, "seconds": answer.total_seconds}
            for model, answer in outcome.answers.items()
        },
        "status": None if outcome.status is None else as_json(outcome.status),
    }
    if outcome.error is not None:
        content["error"] = {**outcome.error.plain(), "exit_code": int(outcome.exit_code)}
    return content


def _say(text: str) -> None:
    print(without_controls(f"dynamo-mpi wait: {text}"), file=sys.stderr, flush=True)
