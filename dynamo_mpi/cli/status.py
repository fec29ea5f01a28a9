# SPDX-License-Identifier: Apache-2.0
"""Show a deployment's status: its workers, their phases, progress and requests, the failures of the last hour, its services.

Exit code 0 if the status could be read, whatever it is ("ok" of --output json is true if there is no problem); 64 if there is no such run
folder, 69 if etcd can't be reached, 77 if it rejects the credentials. --watch shows it until Ctrl-C, with exit code 0: redrawn on a
terminal, otherwise appended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from dynamo_mpi.cli.style import paint, terminal_width, write_out
from dynamo_mpi.common.display import without_controls
from dynamo_mpi.common.errors import AuthorizationError, DiscoveryError, ExitCode
from dynamo_mpi.config.options import Option, add_options, resolve
from dynamo_mpi.config.sources import MAX_SECONDS
from dynamo_mpi.ops.deployment import (
    MODEL,
    NAMESPACE,
    RUN_DIR,
    LauncherKilledError,
    add_output,
    find_deployment,
)
from dynamo_mpi.ops.run_dirs import NoRunDirError
from dynamo_mpi.ops.status import ETCD_SECONDS, read_status
from dynamo_mpi.ops.status_output import describe

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any

    from dynamo_mpi.common.errors import DynamoMpiError
    from dynamo_mpi.ops.status import DeploymentStatus

SHORTEST_SECONDS = 0.1
# Ctrl-C waits until it ends
WATCH_ETCD_SECONDS = 2.0


def to_period(text: str) -> float:
    """Read the interval of ``--watch``."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not SHORTEST_SECONDS <= value <= MAX_SECONDS:
        raise ValueError(f"a number of seconds from {SHORTEST_SECONDS:g} on")
    return value


WATCH = Option("watch", ("--watch",), (), None, to_period, "show it again and again")
OPTIONS = (RUN_DIR, NAMESPACE, MODEL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    add_options(parser, OPTIONS)
    text = "show it until Ctrl-C, every 2 s or at this interval"
    parser.add_argument("--watch", nargs="?", const="2", metavar="SECONDS", help=text)
    add_output(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; return the exit code.

    Raises:
        UsageError: the deployment is ambiguous or missing.
        DiscoveryError: etcd doesn't answer.
        AuthorizationError: it rejects our credentials.
    """
    values, _ = resolve((*OPTIONS, WATCH), vars(arguments), os.environ, {})
    if values["watch"] is None:
        write_out(_shown(_read(values, ETCD_SECONDS), arguments.output))
        return ExitCode.OK
    return _watch(values, arguments.output)


def _read(values: dict[str, Any], seconds: float) -> DeploymentStatus:
    deployment = find_deployment(values["run_dir"], os.environ)
    return read_status(deployment, values["namespace"], values["model"], seconds)


def _shown(status: DeploymentStatus, output: str) -> str:
    if output == "text":
        return describe(status, terminal_width()) if _is_terminal() else describe(status)
    from dynamo_mpi.ops.status_output import as_json

    return json.dumps(as_json(status))


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def _shown_error(error: DynamoMpiError, output: str) -> str:
    if output == "text":
        return str(error)
    from dynamo_mpi.ops.status_output import error_as_json

    return json.dumps(error_as_json(error))


def _watch(values: dict[str, Any], output: str) -> int:
    from dynamo_mpi.common.signals import Interrupted

    def look() -> str:
        try:
            return _shown(_read(values, WATCH_ETCD_SECONDS), output)
        except (DiscoveryError, AuthorizationError, LauncherKilledError, NoRunDirError) as error:
            return _shown_error(error, output)  # it may be there later

    try:
        watch(look, values["watch"], redraw=output == "text", title="dynamo-mpi status")
    except Interrupted as end:
        return ExitCode.OK if end.number == signal.SIGINT else end.exit_code
    return ExitCode.OK


# to the alternate screen, without line wrap and cursor; and back
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?7l\x1b[?25l", "\x1b[?25h\x1b[?7h\x1b[?1049l"
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


def watch(look: Callable[[], str], period_seconds: float, *, redraw: bool, title: str) -> None:
    """Show what ``look`` returns until a signal arrives.

    Args:
        look: returns the text.
        period_seconds: seconds between two calls.
        redraw: on a terminal, redraw.
        title: the screen's title.

    Raises:
        Interrupted: a signal has arrived.
    """
    from dynamo_mpi.common.signals import Interrupts

    with Interrupts() as interrupts:
        if not redraw or not sys.stdout.isatty():
            while True:
                write_out(look())
                interrupts.pause(period_seconds)
        text = ""
        _write(_ENTER)
        try:
            while True:
                text = without_controls(look())
                clock = time.strftime("%H:%M:%S")
                _draw([f"{title}, every {period_seconds:g} s, {clock}", "", *text.splitlines()])
                interrupts.pause(period_seconds)
        finally:
            _write(_LEAVE)
            if text:
                write_out(text)  # stays on the terminal


def _draw(lines: list[str]) -> None:
    import shutil  # it loads the compression libraries

    width, height = shutil.get_terminal_size()
    if len(lines) > height:
        lines = [*lines[: height - 1], f"… {len(lines) - height + 1} more lines"]
    body = "\r\n".join(paint(line[:width], sys.stdout) + _REST_OF_LINE for line in lines)
    _write(_HOME + body + _REST_OF_SCREEN)


def _write(text: str) -> None:
    data = text.encode(sys.stdout.encoding or "ascii", "replace")
    sys.stdout.flush()
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]
