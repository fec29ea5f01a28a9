# SPDX-License-Identifier: Apache-2.0
"""Rules over the measurements of the KV check. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.checks.fabric_rules import rate_text, time_text
from dynamo_mpi.checks.kv_pull import NIXL, OK, TCP
from dynamo_mpi.checks.rank_facts import lines
from dynamo_mpi.layout.finding import error, info, warning
from dynamo_mpi.layout.format import counted, listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.checks.kv_pull import PairResult
    from dynamo_mpi.layout.finding import Finding

SLOW = {NIXL: 3.0, TCP: 8.0}
"""How many times slower than comparable pairs a pair may be. Over TCP the CPUs copy, and other processes use them too."""
# a latency below this never matters, and on a busy host latencies differ for other reasons
_SLOW_LATENCY, _LATENCY_SECONDS = 10.0, 5e-3
_LEAST_LIKE = 3
_LEAVE_OUT = "leave the host out (sbatch --exclude=…); `launch --kv-check warn` starts the workers all the same"


def check_bytes(results: Sequence[PairResult]) -> Iterator[Finding]:
    """T1: what a decode host pulls is, byte for byte, what the prefill host has."""
    if wrong := [result for result in results if result.wrong]:
        yield error(
            "T1",
            f"wrong bytes arrive between {counted(len(wrong), 'pair')} of hosts{_common(results, wrong)}",
            found=lines(list(map(describe_pair, wrong))),
            expected="the bytes that the prefill host has sent",
            fix=f"have memory, card and cable checked, or {_LEAVE_OUT}",
        )


def check_connection(results: Sequence[PairResult]) -> Iterator[Finding]:
    """T2: every decode host can pull from every prefill host."""
    if failed := [result for result in results if result.state != OK]:
        count = f"{counted(len(failed), 'pair')} of hosts of {len(results)}"
        yield error(
            "T2",
            f"no KV comes through between {count}{_common(results, failed)}",
            found=lines([f"{describe_pair(result)}: {result.text}" for result in failed]),
            expected="every decode host reaches every prefill host; otherwise the first request hangs or fails",
            fix=f"check interface, firewall and UCX_NET_DEVICES of these hosts, or {_LEAVE_OUT}",
        )


def check_rates(results: Sequence[PairResult], least_rate: float = 0.0) -> Iterator[Finding]:
    """T3: no pair is below ``--min-rate``, or three times (over TCP eight times) slower than comparable pairs (three pairs or more), or takes
    ten times as long, and more than 5 ms, for 4 KiB."""
    if slow := slow_pairs(results, least_rate):
        yield error(
            "T3",
            f"KV is too slow between {counted(len(slow), 'pair')} of hosts{_common(results, list(slow))}",
            found=lines([f"{describe_pair(result)}: {why}" for result, why in slow.items()]),
            expected="the rate that is expected: a request waits for its slowest part",
            fix=f"check the links of these hosts (ibstat, ethtool), or {_LEAVE_OUT}",
        )


def check_sockets(results: Sequence[PairResult]) -> Iterator[Finding]:
    """T4: if a host has InfiniBand or RoCE with a port that is up, NIXL uses it."""
    if fallen := [result for result in results if result.cards and result.transport == NIXL and _is_tcp(result)]:
        yield warning(
            "T4",
            f"KV goes over TCP between {counted(len(fallen), 'pair')} of hosts that have InfiniBand or RoCE",
            found=lines(list(map(describe_pair, fallen))),
            expected="UCX over verbs: TCP reaches a tenth of its rate",
            fix="unset UCX_TLS and UCX_NET_DEVICES, or name the cards there; give the container /dev/infiniband and libibverbs",
        )


def check_coverage(without_nixl: Sequence[str], skipped: int) -> Iterator[Finding]:
    """T5: all pairs are checked, and by NIXL; if it isn't installed, over TCP."""
    if without_nixl:
        yield info("T5", f"checked over TCP, which says little about NIXL: not installed on {listed(without_nixl)}")
    if skipped:
        yield info("T5", f"{counted(skipped, 'pair')} not checked: no time left", fix="--seconds gives more")


RULES = (check_bytes, check_connection, check_rates, check_sockets, check_coverage)


def check_kv(results: Sequence[PairResult], least_rate: float) -> list[Finding]:
    """Apply the rules to all pairs, which go over one transport; ``least_rate`` in bytes a second, 0 for none."""
    found = (check_bytes(results), check_connection(results), check_rates(results, least_rate), check_sockets(results))
    return [finding for findings in found for finding in findings]


def slow_pairs(results: Sequence[PairResult], least_rate: float) -> dict[PairResult, str]:
    """Return the pairs that are too slow, with the rate that was measured and the one that is expected; arguments as of `check_kv`."""
    measured = [result for result in results if result.state == OK and result.rate]
    expected, longest = least_rate, float("inf")
    if len(measured) >= _LEAST_LIKE:
        rates, latencies = sorted(result.rate for result in measured), sorted(result.latency for result in measured)
        # the upper quartile: one slow host is in half of the pairs of a small deployment
        slower = SLOW[TCP if any(map(_is_tcp, measured)) else NIXL]
        expected = max(expected, rates[-(len(rates) // 4) - 1] / slower)
        longest = max(_LATENCY_SECONDS, latencies[len(latencies) // 4] * _SLOW_LATENCY)
    slow = {}
    for result in measured:
        if result.rate < expected:
            slow[result] = f"{rate_text(result.rate)}, expected at least {rate_text(expected)}"
        elif result.latency > longest:
            slow[result] = f"{time_text(result.latency)} for 4 KiB, expected at most {time_text(longest)}"
    return slow


def summary(results: Sequence[PairResult]) -> str:
    """Summarise the results in one line."""
    if not results:
        return "no pair checked"
    slowest = min(results, key=lambda result: result.rate)
    latency = time_text(max(result.latency for result in results))
    return f"{counted(len(results), 'pair')}, slowest {rate_text(slowest.rate)}, {describe_pair(slowest)}; {latency}"


def describe_pair(result: PairResult) -> str:
    """Describe a pair: decode host, prefill host, transport and devices."""
    paths = f" ({listed(result.paths)})" if result.paths else ""
    return f"decode host {result.decode} <- prefill host {result.prefill} over {result.transport}{paths}"


def _is_tcp(result: PairResult) -> bool:
    return result.transport == TCP or (bool(result.paths) and all(path.startswith("tcp/") for path in result.paths))


def _common(results: Sequence[PairResult], bad: Sequence[PairResult]) -> str:
    """Name the one host that all these pairs, and no other pair, have in common."""
    well = {host for result in results if result not in bad for host in (result.prefill, result.decode)}
    shared = set.intersection(*({result.prefill, result.decode} for result in bad)) - well
    return f": what they have in common is {min(shared)}" if well and len(shared) == 1 else ""
