# SPDX-License-Identifier: Apache-2.0
"""What a launcher calls in ssh's place, on a host: ``agent.py SOCKET [OPTIONS OF ssh] HOST WORDS...``; runs them on that host by a shell.

Like ssh it joins the words by blanks, lends its own stdin, stdout and stderr, and ends with the command's exit code. Standard library only.
"""

from __future__ import annotations

import array
import json
import socket
import sys

LOST = 255
"""ssh's own exit code."""


def main(path: str, *words: str) -> int:
    rest = list(words)
    while rest and rest[0].startswith("-"):
        rest = rest[2:] if rest[0] == "-o" else rest[1:]
    request = {"host": rest[0], "line": " ".join(rest[1:])}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        lent = array.array("i", [0, 1, 2])
        data = json.dumps(request).encode() + b"\n"
        sent = server.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, lent)])
        server.sendall(data[sent:])
        answer = server.makefile("rb").readline()
    return int(json.loads(answer)["code"]) if answer else LOST


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
