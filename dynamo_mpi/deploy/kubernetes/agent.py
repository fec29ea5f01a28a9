# SPDX-License-Identifier: Apache-2.0
"""mpirun's launch agent, instead of ssh: ``python -m dynamo_mpi.deploy.kubernetes.agent HOST 'shell line around orted or prted'``.

It sends the daemon's name and arguments to the leader, over a unix socket that only this user can open, and ends when the pod runs it. The
other pod starts nothing else: no shell, no other program. The daemon then runs mpirun's commands, so any process that knows the group's
secret can run commands in all of its pods.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import sys
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Sequence

DAEMONS = ("orted", "prted")
"""The daemons of Open MPI 4 and 5."""
MOST_ARGUMENTS, MOST_LETTERS = 200, 8192
_ALONE = frozenset({"--leave-session-attached", "--allow-run-as-root"})
_PAIRS = frozenset({"-mca", "--mca", "-pmca", "--prtemca", "--pmixmca"})
_FOR_MPIRUN = ("plm_rsh_agent", "plm_ssh_agent", "tmpdir_base")
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,127}")
# these name code or programs that the daemon would load or run; only mpirun needs the agent, since no daemon starts others here
_PROGRAMS = re.compile(r"path|agent|launcher|_exec")


class DaemonCommand(NamedTuple):
    """One daemon to start.

    Args:
        host: its host.
        daemon: its program, one of `DAEMONS`.
        arguments: its arguments.
    """

    host: str
    daemon: str
    arguments: tuple[str, ...]


def read_agent_words(words: Sequence[str]) -> DaemonCommand:
    """Parse the arguments of mpirun's launch agent: options for ssh, the host, then a line for a shell.

    Raises:
        ValueError: they don't start a daemon.
    """
    rest = list(words)
    while rest and rest[0].startswith("-"):  # ssh's: -x, -o NAME=VALUE
        rest = rest[2:] if rest[0] == "-o" else rest[1:]
    if len(rest) < 2:
        raise ValueError("no host and command")
    lexer = shlex.shlex(" ".join(rest[1:]), posix=True, punctuation_chars=";")
    lexer.whitespace_split, lexer.commenters = True, ""
    parts = list(lexer)
    # variables that the shell line sets are skipped: the pod has its own
    last = max((at for at, part in enumerate(parts) if part == ";"), default=-1)
    program, *arguments = parts[last + 1 :] or [""]
    return DaemonCommand(rest[0], program.rpartition("/")[2], _for_another_pod(arguments))


def _for_another_pod(arguments: Sequence[str]) -> tuple[str, ...]:
    """Remove settings that are only for mpirun's pod: the launch agent, and the folder for session files."""
    kept: list[str] = []
    at = 0
    while at < len(arguments):
        if arguments[at] in _PAIRS and arguments[at + 1 : at + 2] and arguments[at + 1].endswith(_FOR_MPIRUN):
            at += 3
            continue
        kept.append(arguments[at])
        at += 1
    return tuple(kept)


def refuse_other_than_daemon(daemon: object, arguments: object) -> tuple[str, tuple[str, ...]]:
    """Return the daemon and its arguments if they are valid; the pod that starts it calls this for every request.

    Raises:
        ValueError: it would start something else, or a daemon that loads or runs a program by a path in the request.
    """
    if daemon not in DAEMONS:
        raise ValueError(f"{daemon!r:.40} is no daemon of Open MPI")
    if not isinstance(arguments, list) or len(arguments) > MOST_ARGUMENTS:
        raise ValueError("no list of arguments, or too long a one")
    words = [word for word in arguments if isinstance(word, str) and len(word) <= MOST_LETTERS and "\0" not in word]
    if len(words) < len(arguments):
        raise ValueError("an argument that is no text, or too long")
    at = 0
    while at < len(words):
        if words[at] in _ALONE:
            at += 1
            continue
        if words[at] not in _PAIRS or at + 2 >= len(words):
            raise ValueError(f"{words[at]!r:.60} is no argument that a daemon needs")
        key = words[at + 1]
        if not _KEY.fullmatch(key) or _PROGRAMS.search(key.lower()):
            raise ValueError(f"the setting {key!r:.60} is none that a daemon needs")
        at += 3
    return str(daemon), tuple(words)


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
