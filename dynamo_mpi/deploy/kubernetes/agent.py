# SPDX-License-Identifier: Apache-2.0
"""mpirun's launch agent, instead of ssh: ``python -m dynamo_mpi.deploy.kubernetes.agent HOST 'shell line around orted or prted'``.

It sends the daemon's arguments to the leader, over a unix socket that only this user can open, and ends when the pod runs it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import TYPE_CHECKING

from dynamo_mpi.common.exit_codes import ExitCode
from dynamo_mpi.deploy.kubernetes.daemon_command import read_agent_words

if TYPE_CHECKING:
    from collections.abc import Sequence

SOCKET_VARIABLE = "DYN_MPI_PODS_SOCKET"
ANSWER_SECONDS = 60.0


def main(argv: Sequence[str]) -> int:
    """Have the daemon started; return the exit code, which mpirun only compares with 0."""
    try:
        command = read_agent_words(argv)
        with socket.socket(socket.AF_UNIX) as leader:
            leader.settimeout(ANSWER_SECONDS)
            leader.connect(os.environ.get(SOCKET_VARIABLE, ""))
            leader.sendall(json.dumps(command._asdict()).encode() + b"\n")
            with leader.makefile("rb") as answers:
                answer = json.loads(answers.readline() or b'{"failed": "the leader has exited"}')
    except (OSError, ValueError) as error:
        answer = {"failed": str(error)}
    if failed := answer.get("failed"):
        print(f"dynamo_mpi.pods: {failed}", file=sys.stderr, flush=True)
        return ExitCode.ENGINE
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
