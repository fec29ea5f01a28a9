# SPDX-License-Identifier: Apache-2.0
"""What listens for TCP connections in a deployment, and who can use it: the table of docs/concepts/security.md, which `dynamo-mpi doctor`
compares with this node's processes.
"""

from __future__ import annotations

import os
from enum import Enum
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.ports import ANY_ADDRESS, in_url, listening_at
from dynamo_mpi.stage.helper import TITLE as STAGING_TITLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

EVERYWHERE, ON_LOOPBACK = "all addresses", "loopback"
_JOBS = "the job's address"
_EVERYBODY = "everybody who reaches it"


class Listener(NamedTuple):
    """One row of the table.

    Args:
        process: the kind of process, as `kind_of` returns it.
        place: where it listens; in `dynamo-mpi local`, and in worlds of one host, loopback unless it is `EVERYWHERE`.
        what: what it listens for.
        who: who can use it.
        more: the rest of ``what``, for the page.
        anywhere: whether it may be set to listen at all addresses.
    """

    process: str
    place: str
    what: str
    who: str
    more: str = ""
    anywhere: bool = False


LISTENERS = (
    Listener(
        "etcd",
        _JOBS,
        "clients (`--etcd-port`)",
        "clients with this job's certificate",
    ),
    Listener("etcd", ON_LOOPBACK, "its peers", "peers with this job's certificate; there are none"),
    Listener(
        "NATS",
        _JOBS,
        "clients (`--nats-port`)",
        "clients with this job's password; TLS where Dynamo's runtime has it (1.5 or newer), else the password travels unencrypted",
    ),
    Listener("frontend", f"{_JOBS}, or `--http-host`", "HTTP (`--http-port`)", _EVERYBODY, anywhere=True),
    Listener("frontend", _JOBS, "Dynamo's response port", _EVERYBODY),
    Listener(
        "rank",
        _JOBS,
        "rank 0: liveness",
        "ranks with the world's token",
        ", until all ranks have joined; on loopback if all are on one host",
    ),
    Listener(
        "rank",
        _JOBS,
        "rank 0: Dynamo's request and response ports, the runtime's system port",
        _EVERYBODY,
        " (`DYN_TCP_RPC_HOST`, `DYN_TCP_RESPONSE_STREAM_HOST`, `--runtime-system-port`)",
    ),
    Listener(
        "rank",
        "the KV network (`--kv-network`)",
        "KV of the reference engine",
        "decode workers with the secret of a transfer",
    ),
    Listener(
        "rank",
        EVERYWHERE,
        "Open MPI's TCP between ranks",
        "MPI does not authenticate it",
        ", in worlds of several hosts, from port 1024 on (`OMPI_MCA_btl_tcp_port_min_v4`, `OMPI_MCA_btl_tcp_port_range_v4`). "
        "`OMPI_MCA_btl_tcp_if_include` limits which networks the ranks use, not where they listen",
    ),
    Listener(
        "node agent",
        _JOBS,
        "the other nodes' agents",
        "agents with the world's token",
        ", in a world of several hosts; until the preflight's result rank 0's at all addresses",
        anywhere=True,
    ),
    *(
        Listener(process, "`DYN_SYSTEM_HOST`", "`/live`, `/health`, `/metrics`", _EVERYBODY, more, anywhere=True)
        for process, more in (
            ("node agent", " (`DYN_SYSTEM_PORT`, if set), by default at all addresses"),
            ("rank", ": each node's first keeps the agent's socket, for its successor"),
        )
    ),
    Listener(
        "staging process",
        _JOBS,
        "the other nodes' staging processes",
        "those with the staging's token",
        ", with `--stage` in a world of several hosts, until all nodes have the model",
    ),
    Listener(
        "dynamo.trtllm",
        _JOBS,
        "Dynamo's request and response ports, the runtime's system port, events; what TensorRT-LLM opens for KV",
        _EVERYBODY,
        anywhere=True,
    ),
    Listener("rank of the KV check", _JOBS, "the pattern", "ranks with the check's key", ", for a few seconds"),
    Listener(
        "mpirun",
        EVERYWHERE,
        "PRRTE's connections between nodes",
        "PRRTE's to decide",
        " (Open MPI 5); no parameter limits where it listens",
    ),
    Listener("mpirun", ON_LOOPBACK, "its ranks (PMIx)", "processes of this user"),
    Listener("mpiexec", EVERYWHERE, "Hydra's control port: its proxies", "Hydra's to decide", " (MPICH)"),
    Listener(
        "leader of pods",
        "the pod's address (`--address`)",
        "the group's other pods (`--port`)",
        "pods with the group's secret",
    ),
)

# by the program's file: Open MPI's mpirun and mpiexec are links to these, or run them; MPICH's are Hydra itself
_LAUNCHERS = {
    **dict.fromkeys(("prterun", "prte", "prted", "orterun", "orted"), "mpirun"),
    **dict.fromkeys(("mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy"), "mpiexec"),
}
# by a word of the command line; the first that fits
_WORDS = {
    b"--advertise-client-urls": "etcd",
    b"dynamo.frontend": "frontend",
    b"dynamo.trtllm": "dynamo.trtllm",
    b"dynamo_mpi.checks.kv": "rank of the KV check",
    b"dynamo_mpi.pods": "leader of pods",
    b"dynamo_mpi.worker": "rank",
}
# by the title that a process gives itself
_TITLES = {b"dynamo_mpi: node agent on ": "node agent", STAGING_TITLE.encode(): "staging process"}


def markdown_table() -> str:
    """Return the table as the page has it."""
    rows = (f"| {row.process} | {row.place} | {row.what}{row.more} | {row.who} |\n" for row in LISTENERS)
    return "| process | where | what | who can use it |\n|---|---|---|---|\n" + "".join(rows)


def kind_of(pid: int) -> str | None:
    """Return what a process of a deployment is; None for another process."""
    try:
        process = Path(f"/proc/{pid}")
        name = (process / "comm").read_text(errors="replace").strip()
        command = (process / "cmdline").read_bytes()
        program = os.path.basename(os.readlink(process / "exe")).removesuffix(" (deleted)")
    except OSError:
        return None
    if program in _LAUNCHERS:
        return _LAUNCHERS[program]
    if name.startswith("nats-server"):
        return "NATS"
    for title, kind in _TITLES.items():
        if command.startswith(title):
            return kind
    words = command.split(b"\0")
    return next((kind for word, kind in _WORDS.items() if word in words), None)


class Reach(Enum):
    """From where a listener can be reached."""

    EVERYWHERE = "all addresses"
    LOOPBACK = "loopback"
    ADDRESS = "an address"


def reach_of(address: str) -> Reach:
    """Return from where a listener at an address of this node can be reached."""
    if address in ANY_ADDRESS:
        return Reach.EVERYWHERE
    return Reach.LOOPBACK if ip_address(address.removeprefix("::ffff:")).is_loopback else Reach.ADDRESS


def rows_for(kind: str, reach: Reach) -> tuple[Listener, ...]:
    """Return the rows that a listener of such a process may be; none if the table has no such listener."""
    return tuple(row for row in LISTENERS if row.process == kind and _may_be(row, reach))


def _may_be(row: Listener, reach: Reach) -> bool:
    if reach is Reach.EVERYWHERE:
        return row.anywhere or row.place == EVERYWHERE
    # all but those of all addresses are on loopback in worlds of one host
    return row.place != EVERYWHERE and (reach is Reach.LOOPBACK or row.place != ON_LOOPBACK)


class Found(NamedTuple):
    """Processes of one kind that listen, with the same reach.

    Args:
        kind: the kind of process.
        reach: from where they can be reached.
        pids: the processes.
        places: addresses with ports.
    """

    kind: str
    reach: Reach
    pids: tuple[int, ...]
    places: tuple[str, ...]

    @property
    def rows(self) -> tuple[Listener, ...]:
        """The rows of the table that they may be."""
        return rows_for(self.kind, self.reach)


def find_listeners(pids: Iterable[int] | None = None) -> list[Found]:
    """Return what processes of deployments listen at, on this node.

    Args:
        pids: these processes; None for all of this user's.
    """
    seen = [
        (kind, pid, place)
        for pid in (_own_processes() if pids is None else pids)
        if (kind := kind_of(pid)) is not None
        for place in listening_at(pid)
    ]
    # Hydra's proxies and ranks inherit its socket
    inherited = {place for kind, _, place in seen if kind == "mpiexec"}
    found: dict[tuple[str, Reach], list[tuple[int, str]]] = {}
    for kind, pid, (address, port) in seen:
        if kind == "mpiexec" or (address, port) not in inherited:
            found.setdefault((kind, reach_of(address)), []).append((pid, f"{in_url(address)}:{port}"))
    return [
        Found(*key, tuple(dict.fromkeys(pid for pid, _ in each)), tuple(dict.fromkeys(place for _, place in each)))
        for key, each in found.items()
    ]


def _own_processes() -> Iterator[int]:
    for entry in sorted(os.listdir("/proc")):
        if entry.isdecimal():
            try:
                if os.stat(f"/proc/{entry}").st_uid == os.geteuid():
                    yield int(entry)
            except OSError:
                continue  # exited meanwhile
