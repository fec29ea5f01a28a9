# SPDX-License-Identifier: Apache-2.0
"""Nodes as Slurm sees them (``scontrol show node``, ``scontrol show topology``), and whether they answer. Pure, but for what asks Slurm
(`ask_slurm_about`, `topology_of`, `slurmd_port`, `kill_wait`) or nodes (`answering`, `lost_among`).

Slurm calls a node down only after SlurmdTimeout, 300 s by default. That it doesn't answer is seen before: by a TCP connection to its slurmd,
as srun makes one. A refused connection is an answer: slurmd may be restarted while the steps run on.
"""

from __future__ import annotations

import contextlib
import errno
import re
import selectors
import socket
import subprocess
import time
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SCONTROL_SECONDS = 5.0
# of the order of spares, which is worth no longer wait
_TOPOLOGY_SECONDS = 2.0
# a lost SYN is sent again after a second (RFC 6298)
CONNECT_SECONDS = 1.2
# slurm.conf(5): SlurmdPort, KillWait
DEFAULT_PORT = 6818
DEFAULT_KILL_WAIT = 30
# scontrol(1), "NODES - SHOW COMMAND": base states and flags; the rest is a node that can run a step
_LOST = frozenset({"DOWN", "ERROR", "POWERED_DOWN", "POWERING_DOWN"})
# slurmd may be restarted, or busy, while the steps run on
_NO_RESPONSE = frozenset({"NOT_RESPONDING", "NO_RESPOND"})
# reasons to look at all nodes more often
SUSPICIOUS = _NO_RESPONSE | {"DOWN", "ERROR", "FAIL", "FAILING"}
# a node that is expected to fail is to get no further jobs, but runs those that it has
_DRAINED = frozenset({"DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING"})
_FIELD = re.compile(r"(?:^|\s)(\w+)=(\S*)")
_REASON = re.compile(r"\sReason=(.*?)(?: \[[^\]]*\])?$")
_GROUP = re.compile(r"(?:SwitchName|BlockName)=\S+.*?\sNodes=(\S+)")
# the host, or a router before it, has answered, but slurmd hasn't
_SILENT = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT, errno.EHOSTDOWN})


class SlurmNode(NamedTuple):
    """A node, according to Slurm.

    Args:
        name: its name.
        states: its state and flags, such as ``ALLOCATED`` and ``DRAIN``.
        reason: why an administrator, or Slurm, has taken it out; empty for none.
        address: where its slurmd listens.
        port: the port.
    """

    name: str
    states: frozenset[str]
    reason: str = ""
    address: str = ""
    port: int = DEFAULT_PORT

    @property
    def lost(self) -> str:
        """Why no step can run there any longer; empty if one can, as far as Slurm knows."""
        return self._says(_LOST | _NO_RESPONSE) if self.states & _LOST else ""

    @property
    def no_response(self) -> str:
        """What Slurm says of a node whose slurmd doesn't answer it: a reason only if its host doesn't answer either; else empty."""
        return self._says(_NO_RESPONSE)

    @property
    def drained(self) -> str:
        """Why it is to get no further jobs; empty if it may."""
        return self._says(_DRAINED)

    def _says(self, states: frozenset[str]) -> str:
        found = sorted(self.states & states)
        why = f" ({self.reason})" if self.reason else ""
        return f"Slurm says {'+'.join(found).lower()}{why}" if found else ""


def parse_nodes(text: str, port: int = DEFAULT_PORT) -> dict[str, SlurmNode]:
    """Read ``scontrol --oneliner show node``.

    Args:
        text: its output.
        port: SlurmdPort, which a node's line has only where it is another one.
    """
    nodes = {}
    for line in text.splitlines():
        fields = dict(_FIELD.findall(line))
        if name := fields.get("NodeName"):
            states = frozenset(filter(None, re.split(r"[+*~#!%$@^-]", _marked(fields.get("State", "")))))
            reason = _REASON.search(line)
            own = fields.get("Port", "")
            number = int(own) if own.isdecimal() and 0 < int(own) < 65536 else port
            nodes[name] = SlurmNode(
                name, states, reason[1].strip() if reason else "", fields.get("NodeAddr") or name, number
            )
    return nodes


def _marked(state: str) -> str:
    """Spell the flag that is written as a star: the node doesn't respond."""
    return f"{state}+NOT_RESPONDING" if "*" in state else state


def ask_slurm_about(nodes: Sequence[str], environ: Mapping[str, str] | None = None) -> dict[str, SlurmNode] | None:
    """Ask Slurm for its view of nodes; None if it doesn't answer in some seconds."""
    text = _scontrol("--oneliner", "show", "node", ",".join(nodes), environ=environ)
    return None if text is None else parse_nodes(text, slurmd_port(environ))


_config: dict[str, str] = {}


def slurmd_port(environ: Mapping[str, str] | None = None) -> int:
    """Return SlurmdPort of the cluster's configuration."""
    return _config_number("SlurmdPort", DEFAULT_PORT, environ)


def kill_wait() -> int:
    """Return KillWait of the cluster's configuration: seconds from SIGTERM to SIGKILL when a step is cancelled."""
    return _config_number("KillWait", DEFAULT_KILL_WAIT, None)


def _config_number(name: str, default: int, environ: Mapping[str, str] | None) -> int:
    """Return a number of the configuration, which is asked for until Slurm has answered once."""
    text = _config.get("text") or _scontrol("show", "config", environ=environ)
    if text:
        _config["text"] = text
    found = re.search(rf"^{name}\s*=\s*(\d+)", text or "", re.MULTILINE)
    return int(found[1]) if found else default


def lost_among(nodes: Sequence[str]) -> list[str]:
    """Return those of some nodes that are down, or whose host doesn't answer; none where Slurm can't be asked."""
    known = ask_slurm_about(nodes) or {}
    answers = answering(list(known.values()))
    return [name for name, node in known.items() if node.lost or answers.get(name) is False]


def neighbours(text: str, node: str) -> list[frozenset[str]]:
    """Return the groups of nodes of one switch or block that have a node, the smallest first.

    Args:
        text: output of ``scontrol show topology`` for the node, with its lists of nodes expanded by `deploy.hostlist`.
        node: the node.
    """
    from dynamo_mpi.common.errors import UsageError
    from dynamo_mpi.deploy.hostlist import expand

    groups = []
    for written in _GROUP.findall(text):
        try:
            members = frozenset(expand(written, "scontrol show topology"))
        except UsageError:
            continue
        if node in members:
            groups.append(members)
    return sorted(groups, key=len)


def nearest(candidates: Sequence[str], groups: Sequence[frozenset[str]]) -> list[str]:
    """Return candidates in the order of their distance from a node: those of its smallest group first.

    Args:
        candidates: their names, the preferred ones first where the distance is the same.
        groups: the node's, see `neighbours`.
    """

    def distance(candidate: str) -> int:
        return next((place for place, members in enumerate(groups) if candidate in members), len(groups))

    return sorted(candidates, key=distance)


def topology_of(node: str, environ: Mapping[str, str] | None = None) -> list[frozenset[str]]:
    """Ask Slurm which nodes are near a node; empty where the cluster has no topology."""
    return neighbours(_scontrol("show", "topology", node, environ=environ, seconds=_TOPOLOGY_SECONDS) or "", node)


def answering(nodes: Sequence[SlurmNode], seconds: float = CONNECT_SECONDS) -> dict[str, bool | None]:
    """Connect to the slurmd of nodes, all at once; return whether each node's host answers, None if that can't be found out from here.

    Args:
        nodes: the nodes.
        seconds: after which no answer counts as none.
    """
    found: dict[str, bool | None] = {}
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for node in nodes:
            try:
                family, _, _, _, address = socket.getaddrinfo(node.address, node.port, type=socket.SOCK_STREAM)[0]
                connection = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            except OSError:  # its name doesn't resolve here, or there are too many open files
                found[node.name] = None
                continue
            connection.setblocking(False)
            code = connection.connect_ex(address)
            if code == errno.EINPROGRESS:
                selector.register(connection, selectors.EVENT_WRITE, node.name)
            else:
                found[node.name] = _is_answer(code)
        end = time.monotonic() + seconds
        while selector.get_map() and (left := end - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                connection = cast("socket.socket", key.fileobj)
                selector.unregister(connection)
                found[key.data] = _is_answer(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        found |= {key.data: False for key in selector.get_map().values()}
    return found


def _is_answer(code: int) -> bool | None:
    return True if code in (0, errno.ECONNREFUSED) else False if code in _SILENT else None


def _scontrol(*words: str, environ: Mapping[str, str] | None = None, seconds: float = _SCONTROL_SECONDS) -> str | None:
    try:
        done = subprocess.run(
            ("scontrol", *words),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            stdin=subprocess.DEVNULL,
            env=environ,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
