# SPDX-License-Identifier: Apache-2.0
"""Doctor's checks of the ports that services and workers need, from the kernel's tables, and of what this user's processes
listen at, by the table of docs/concepts/security.md; nothing is bound."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.ports import holder
from dynamo_mpi.config.options import resolve
from dynamo_mpi.deploy.head_node_settings import OPTIONS
from dynamo_mpi.layout.format import listed
from dynamo_mpi.ops.doctor.check import Check, Context, Probe, Section, error, ok, skipped, warning
from dynamo_mpi.ops.listeners import Found, Reach, find_listeners

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SYSTEM_PORT = "DYN_SYSTEM_PORT"
MAX_SYSTEM_PORT = 65535
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_NAMES = ("etcd_port", "nats_port", "http_port")


class Wanted(NamedTuple):
    """A port that one of the services needs.

    Args:
        id: the id of its check.
        number: the port.
        setting: its setting; empty for a default, for which another is chosen if it is in use.
        taken_by: the process that already listens there, as text; None if there is none.
    """

    id: str
    number: int
    setting: str
    taken_by: str | None


def check_services(context: Context) -> Iterator[Check]:
    """Check the ports of etcd, NATS and the frontend."""
    options = [option for option in OPTIONS if option.name in _NAMES]
    values, origins = resolve(options, {}, context.environ, {})
    for option in options:
        number = values[option.name]
        origin = origins[option.name]
        setting = origin.removeprefix("environment ") if origin != "default" else ""
        yield judge_port(Wanted(option.name.replace("_", "-"), number, setting, holder(number)))


def judge_port(wanted: Wanted) -> Check:
    """Evaluate one port: services of other jobs are common on a head node, so only a port that was named must be free."""
    if wanted.taken_by is None:
        return ok(wanted.id, f"{wanted.number} is free")
    found = f"{wanted.number} is taken by {wanted.taken_by}"
    if not wanted.setting:
        return ok(wanted.id, f"{found}: services that are started here take another")
    needed = "a free port, unless that is the service that is meant: one that was named is never moved"
    return warning(wanted.id, f"{wanted.setting}: {found}", needed, f"another {wanted.setting}, or none")


def check_system_port(context: Context) -> Iterator[Check]:
    """Check the port of rank 0's /health, /live and /metrics."""
    text = context.environ.get(SYSTEM_PORT, "").strip()
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 7 else 0
    yield judge_system_port(text, holder(number) if 0 < number <= MAX_SYSTEM_PORT else None)


def judge_system_port(text: str, taken_by: str | None) -> Check:
    """Evaluate ``DYN_SYSTEM_PORT``: 0 is any port, a negative number none."""
    id = "system-port"
    if not text or text.startswith("-"):
        return skipped(id, f"{SYSTEM_PORT} isn't set: no /health, /live and /metrics of workers")
    if not (text.isascii() and text.isdecimal()):
        return error(id, f"{SYSTEM_PORT} is {text!r}", "a port, 0 for any, -1 for none", f"correct {SYSTEM_PORT}")
    if int(text) > MAX_SYSTEM_PORT:
        needed = f"a TCP port, at most {MAX_SYSTEM_PORT}"
        return error(id, f"{SYSTEM_PORT} is {text}", needed, f"a lower {SYSTEM_PORT}, or 0 for any")
    if taken_by is not None:
        needed = "a free port on each node: rank 0 refuses to start without it, other nodes answer no probes"
        return warning(
            id,
            f"{SYSTEM_PORT} {text} is taken by {taken_by}",
            needed,
            f"another {SYSTEM_PORT}, or 0 for any; two workers of a node need two",
        )
    return ok(id, f"{text} is free" if int(text) else "0: any that is free")


def check_range(context: Context) -> Iterator[Check]:
    """Check the range of ports for outgoing connections."""
    options = [option for option in OPTIONS if option.name in _NAMES]
    values, _ = resolve(options, {}, context.environ, {})
    try:
        text = _RANGE.read_text(encoding="ascii")
    except OSError as problem:
        yield skipped("ephemeral", f"{_RANGE} can't be read: {problem.strerror}")
        return
    yield judge_range(text, {option.name.partition("_")[0]: values[option.name] for option in options})


def judge_range(text: str, ports: dict[str, int]) -> Check:
    """Evaluate the range: a connection may take a port in it while a service restarts."""
    low, high = map(int, text.split()[:2])
    inside = [f"{name} {number}" for name, number in ports.items() if low <= number <= high]
    if inside:
        needed = "ports of services outside of it: a connection that goes out may take one of them"
        return warning("ephemeral", f"{low} to {high}, and in it {', '.join(inside)}", needed, "ports below the range")
    return ok("ephemeral", f"{low} to {high}")


SECTION = Section(
    "ports",
    (
        Probe("services", check_services),
        Probe("system-port", check_system_port),
        Probe("ephemeral", check_range),
    ),
)


_SUFFIXES = {Reach.EVERYWHERE: "-all-addresses", Reach.LOOPBACK: "-loopback", Reach.ADDRESS: ""}


def check_listeners(_: Context) -> Iterator[Check]:
    """Report what listens, where, and who can use it."""
    return judge_listeners(find_listeners())


def judge_listeners(found: Sequence[Found]) -> Iterator[Check]:
    """Yield a check for each kind of process and listener; a warning for one that the table doesn't have."""
    if not found:
        yield skipped("listeners", "no process of a deployment of this user's listens on this node")
    for each in found:
        id = each.kind.replace(" ", "-").lower() + _SUFFIXES[each.reach]
        processes = f"process{'es' if len(each.pids) > 1 else ''} {listed([str(pid) for pid in each.pids])}"
        text = f"{listed(each.places)} ({processes})"
        if each.rows:
            yield ok(id, f"{text}: " + "; or ".join(f"{row.what.replace('`', '')}: {row.who}" for row in each.rows))
        else:
            needed = "a listener of docs/concepts/security.md"
            yield warning(id, f"{text}: not known", needed, f"ss -ltnp | grep pid={each.pids[0]}, to see what it is")


LISTENERS = Section("listeners", (Probe("listeners", check_listeners),))
