# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo_mpi.head_node``: one Slurm task on the head node, or a command in a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from dynamo_mpi.common.errors import DynamoMpiError, ExitCode
from dynamo_mpi.common.files import private_dir
from dynamo_mpi.common.signals import Interrupted, Interrupts
from dynamo_mpi.deploy.head_node.head_node import HeadNode
from dynamo_mpi.deploy.head_node.settings import load_settings
from dynamo_mpi.deploy.run_dir import ServicesDir
from dynamo_mpi.deploy.services import ServiceError

PREFIX = "dynamo-mpi-services-"


def main(argv: Sequence[str] | None = None) -> int:
    """Start the services and wait for the end.

    Args:
        argv: the arguments; None for ``sys.argv``.

    Returns:
        the exit code: 0 after SIGTERM or Ctrl-C, 128 + n if they came before everything was ready; else see ``dynamo_mpi.common.errors``.
    """
    os.umask(0o077)  # all files of the services are for this user only
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except ServiceError as error:
        if error.log:
            _say("\n".join(f"[{error.part}] {line}" for line in error.log.splitlines()))
        _say(str(error))
        return error.status
    except DynamoMpiError as error:
        _say(str(error))
        return error.exit_code
    except OSError as error:
        _say(f"file system error: {error}")
        return ExitCode.ENGINE


def _run(argv: list[str]) -> int:
    settings = load_settings(argv, os.environ)
    ready = False
    try:
        with (
            Interrupts() as interrupts,
            contextlib.closing(ServicesDir(settings.run_dir, settings.job_id, _say)) as run,
            private_dir(prefix=PREFIX) as private,
        ):
            head_node = HeadNode(settings, run, private, interrupts, _say)
            try:
                head_node.start()
                ready = True
                head_node.watch()
            except Interrupted as end:
                _say(f"{end}: stopping (again: at once)")
                raise
            finally:
                head_node.stop()
    except Interrupted as end:
        return ExitCode.OK if ready else end.exit_code
    return ExitCode.OK  # pragma: no cover - the services are watched until something is raised


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the reader of our output has exited: no reason to end the services
        print(f"head node: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
