# SPDX-License-Identifier: Apache-2.0
"""Rules over what was pulled between a prefill and a decode worker. Pure.

| rule | what has to hold | |
|---|---|---|
| T1 | what a decode rank pulls is what the prefill rank has | warning |
| T2 | every decode rank can pull from the prefill ranks that it needs | warning |
| T3 | no pair is far slower than its like | warning |
| T4 | hosts with InfiniBand or RoCE use it for KV | warning |
| T5 | what UCX's variables name is there | warning |
| T6 | the probe goes over the transport that the engine will use | info |
| T7 | a partner that came first can be asked | info |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.parallelism.finding import info, warning
from dynamo_mpi.parallelism.wording import counted, listed
from dynamo_mpi.preflight.host_row import lines
from dynamo_mpi.probe.fabric_rules import SLOW
from dynamo_mpi.probe.kv_answer import OK
from dynamo_mpi.probe.kv_terms import TCP

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.parallelism.finding import Finding
    from dynamo_mpi.probe.kv_answer import Between, Pull
    from dynamo_mpi.probe.kv_pairs import Pair

# below this nobody's latency matters, and on a busy host they differ for reasons of their own
_LATENCY_SECONDS = 5e-3
_LATENCY_SLOW = 10.0
_LEAST_LIKE = 3


def check_kv(between: Between) -> list[Finding]:
    """Apply every rule."""
    return [finding for rule in RULES for finding in rule(between)]


def check_bytes(between: Between) -> Iterator[Finding]:
    """T1: what a decode rank pulls is, byte for byte, what the prefill rank has; else answers are wrong, for as long as the pair serves."""
    wrong = [pair for pair, pull in between.pulls if pull.wrong]
    if wrong:
        # whoever comes second would end for what the first may be to blame for, and every later partner with it
        yield warning(
            "T1",
            f"KV is wrong when it arrives, of {counted(len(wrong), 'pair')} of ranks",
            found=lines([describe_pair(between, pair) for pair in wrong]),
            needed="what the prefill rank has sent",
            fix="leave the node that these pairs have in common out (sbatch --exclude=...), and have its memory, card and cable checked",
        )


def check_way(between: Between) -> Iterator[Finding]:
    """T2: every decode rank reaches the prefill ranks that hold what it needs, and has it in time."""
    failed = [(pair, pull) for pair, pull in between.pulls if pull.state != OK]
    if failed:
        yield warning(
            "T2",
            f"no KV comes through between {counted(len(failed), 'pair')} of ranks of {len(between.pulls)}{_common(between, failed)}",
            found=lines([f"{describe_pair(between, pair)}: {pull.text}" for pair, pull in failed]),
            needed=f"every decode rank reaches its prefill ranks over {between.wanted}: else the first request hangs or fails",
            fix="look at the network between these hosts (interface, firewall, UCX_NET_DEVICES, --kv-network); of a worker that was killed, "
            "wait until its record is gone; --probe without kv leaves it out",
        )


def check_rates(between: Between) -> Iterator[Finding]:
    """T3: no pair is three times slower than its like, over TCP or within a node eight times: there it is the CPUs that copy, which others
    use too. With fewer than three pairs of a kind nothing is compared."""
    slow, told = [], []
    for some in _alike(between):
        by_cpus = any(_is_tcp(pull) or not _between_nodes(between, pair) for pair, pull in some)
        factor = SLOW["mpi" if by_cpus else "nccl"]
        best = _upper_quartile([pull.rate for _, pull in some])
        quick = sorted(pull.seconds for _, pull in some)[len(some) // 4]
        for pair, pull in some:
            if pull.rate * factor < best:
                told.append(f"{describe_pair(between, pair)}: {show_rate(pull.rate)}, its like {show_rate(best)}")
            elif pull.seconds > max(_LATENCY_SECONDS, quick * _LATENCY_SLOW):
                told.append(f"{describe_pair(between, pair)}: {show_time(pull.seconds)}, its like {show_time(quick)}")
            else:
                continue
            slow.append((pair, pull))
    if slow:
        yield warning(
            "T3",
            f"KV is far slower between {counted(len(slow), 'pair')} of ranks than between others{_common(between, slow)}",
            found=lines(told),
            needed=f"pairs of one kind within a factor of {SLOW['nccl']:g}, over TCP or within a node of {SLOW['mpi']:g}: a request waits "
            "for its slowest part",
            fix="look at the links of these hosts (ibstat, ethtool), or leave the node out (sbatch --exclude=...)",
        )


def check_sockets(between: Between) -> Iterator[Finding]:
    """T4: where a host has InfiniBand or RoCE with a port that is up, KV between hosts goes over it, unless TCP was asked for."""
    if between.wanted == TCP:
        return
    fallen = [
        pair
        for pair, pull in between.pulls
        if pull.cards and pull.transport != TCP and _between_nodes(between, pair) and _is_tcp(pull)
    ]
    if fallen:
        yield warning(
            "T4",
            f"KV goes over TCP between {counted(len(fallen), 'pair')} of ranks whose hosts have InfiniBand or RoCE",
            found=lines([describe_pair(between, pair) for pair in fallen]),
            needed="UCX over verbs: TCP carries a tenth of it",
            fix="unset UCX_TLS and UCX_NET_DEVICES, or name the cards there; give the container /dev/infiniband and libibverbs; "
            "UCX_LOG_LEVEL=info says more",
        )


def check_names(between: Between) -> Iterator[Finding]:
    """T5: the devices and transports that UCX_NET_DEVICES and UCX_TLS name are there; UCX goes on with what is left of them."""
    said: dict[str, set[str]] = {}
    for pair, pull in between.pulls:
        for text in pull.warnings:
            said.setdefault(text, set()).add(between.nodes[1][pair.decode])
    if said:
        yield warning(
            "T5",
            "UCX's variables name what isn't there",
            found=lines([f"{listed(sorted(hosts))}: {text}" for text, hosts in said.items()]),
            needed="devices and transports that every host has",
            fix="correct UCX_NET_DEVICES and UCX_TLS, or unset them",
        )


def check_transport(between: Between) -> Iterator[Finding]:
    """T6: the probe goes over the transport that the engine config names, where it can; over another one its figures say little."""
    if between.reason:
        over = next((pull.transport for _, pull in between.pulls), TCP)
        yield info("T6", f"not probed over {between.wanted}, but over {over}: {between.reason}")


def check_partner(between: Between) -> Iterator[Finding]:
    """T7: a partner that came first listens for the probe, and there is time for all pairs."""
    if between.problem:
        yield info("T7", f"no KV was pulled between this worker and the {between.peer}: {between.problem}")
    if between.skipped:
        yield info(
            "T7", f"{counted(between.skipped, 'pair')} not probed: no time left", fix="--probe-seconds gives more"
        )


def describe_pair(between: Between, pair: Pair) -> str:
    """Name a pair: who pulls, from whom, where and over what."""
    prefill, decode = between.nodes
    ways = next((pull.ways for one, pull in between.pulls if one == pair), ())
    where = ", ".join((between.addresses[pair.prefill], *ways))
    return f"decode rank {pair.decode} on {decode[pair.decode]} <- prefill rank {pair.prefill} on {prefill[pair.prefill]} ({where})"


def show_rate(rate: float) -> str:
    """Write bytes a second for a person."""
    return f"{rate / 1e9:.1f} GB/s" if rate >= 1e9 else f"{rate / 1e6:.1f} MB/s"


def show_time(seconds: float) -> str:
    """Write a latency for a person."""
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def _alike(between: Between) -> Iterator[list[tuple[Pair, Pull]]]:
    kinds: dict[bool, list[tuple[Pair, Pull]]] = {}
    for pair, pull in between.pulls:
        if pull.state == OK and pull.rate:
            kinds.setdefault(_between_nodes(between, pair), []).append((pair, pull))
    yield from (some for some in kinds.values() if len(some) >= _LEAST_LIKE)


def _upper_quartile(values: Sequence[float]) -> float:
    return sorted(values)[-(-3 * len(values) // 4) - 1 if len(values) > _LEAST_LIKE else -1]


def _between_nodes(between: Between, pair: Pair) -> bool:
    prefill, decode = between.nodes
    return prefill[pair.prefill] != decode[pair.decode]


def _is_tcp(pull: Pull) -> bool:
    """Is TCP all that it used?"""
    return pull.transport == TCP or (bool(pull.ways) and all(way.startswith("tcp/") for way in pull.ways))


def _common(between: Between, some: Sequence[tuple[Pair, Pull]]) -> str:
    """Name the one rank or node that these pairs have in common, and no pair that is well has."""
    well = [pair for pair, _ in between.pulls if pair not in {bad for bad, _ in some}]
    if not well:
        return ""
    prefill, decode = between.nodes
    candidates = [
        *((f"prefill rank {p.prefill} on {prefill[p.prefill]}", "prefill", p.prefill) for p, _ in some[:1]),
        *((f"decode rank {p.decode} on {decode[p.decode]}", "decode", p.decode) for p, _ in some[:1]),
    ]
    for name, field, rank in candidates:
        if all(getattr(pair, field) == rank for pair, _ in some) and all(getattr(p, field) != rank for p in well):
            return f": {name}"
    nodes = set.intersection(*({prefill[pair.prefill], decode[pair.decode]} for pair, _ in some))
    nodes -= {node for pair in well for node in (prefill[pair.prefill], decode[pair.decode])}
    return f": what they have in common is {min(nodes)}" if len(nodes) == 1 else ""


RULES = (check_bytes, check_way, check_rates, check_sockets, check_names, check_transport, check_partner)
