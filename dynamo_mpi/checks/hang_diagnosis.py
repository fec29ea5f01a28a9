# SPDX-License-Identifier: Apache-2.0
"""Finds which ranks block others in a fabric check that does not end, from what each rank waits for. Pure.

Blocked ranks keep others from their next step, and so on: the ranks at the earliest step are the cause.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.checks.fabric_steps import EXCHANGE
from dynamo_mpi.common.errors import DynamoMpiError, ExitCode
from dynamo_mpi.layout.finding import error
from dynamo_mpi.layout.format import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.checks.fabric_steps import Step
    from dynamo_mpi.layout.finding import Finding

_FORM = re.compile(r"probe step (-?\d+), (\d+) bytes: waits for ranks? ([\d, ]+)")
_NO_PING = re.compile(r"no ping in wait (\d+): ([\d, ]+|none)")
_SLOWEST = re.compile(r"slowest so far: rank (\d+), (\d+) bytes/s")
_MOST_PAIRS = 6
# a pair is reported if it is this many times slower than the fastest
_SLOW = 8
START = -1
"""The step before the first: NCCL's ranks connect."""


class WaitState(NamedTuple):
    """What a rank waits for.

    Args:
        step: number of the step that it is in.
        size: bytes of the message.
        waits: the ranks that it still waits for.
        slow_peer: the rank with which its exchange of messages was the slowest so far; None for none.
        rate: the rate of that exchange, in bytes per second.
        wait: for a late collective, the number of the wait in its step.
        without_ping: the ranks whose ping has not arrived; None if this rank has not pinged.
    """

    step: int
    size: int
    waits: tuple[int, ...]
    slow_peer: int | None = None
    rate: float = 0.0
    wait: int = 0
    without_ping: tuple[int, ...] | None = None

    def __str__(self) -> str:
        ranks = "rank" if len(self.waits) == 1 else "ranks"
        text = f"probe step {self.step}, {self.size} bytes: waits for {ranks} {listed(self.waits)}"
        if self.without_ping is not None:
            text += f"; no ping in wait {self.wait}: {listed(self.without_ping) or 'none'}"
        return (
            text
            if self.slow_peer is None
            else f"{text}; slowest so far: rank {self.slow_peer}, {self.rate:.0f} bytes/s"
        )


def read_note(text: str) -> WaitState | None:
    """Parse the state that a rank reported; None if it is in no step."""
    found = _FORM.search(text)
    if found is None:
        return None
    note = WaitState(int(found[1]), int(found[2]), _numbers(found[3]))
    without_ping, slow = _NO_PING.search(text), _SLOWEST.search(text)
    if without_ping is not None:
        note = note._replace(
            wait=int(without_ping[1]), without_ping=() if without_ping[2] == "none" else _numbers(without_ping[2])
        )
    return note if slow is None else note._replace(slow_peer=int(slow[1]), rate=float(slow[2]))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


class HangError(DynamoMpiError):
    """A check did not end in time. Not a `PhaseTimeoutError`, because it names the blocking ranks itself."""

    exit_code = ExitCode.DEADLINE

    @classmethod
    def of(cls, finding: Finding) -> HangError:
        """Make it from the finding."""
        return cls(f"{finding.rule}: {finding.message}", expected=finding.expected, fix=finding.fix)


def find_blocking_ranks(
    notes: Mapping[int, WaitState | None],
    silent: Sequence[int],
    steps: Sequence[Step],
    hosts: Sequence[str],
    seconds: float,
    name: Callable[[Sequence[int]], str],
) -> Finding:
    """Return the finding that names the ranks between which the check hangs.

    Args:
        notes: what the ranks that answered wait for.
        silent: ranks that did not answer.
        steps: the steps of the check.
        hosts: each rank's node.
        seconds: the time limit.
        name: names ranks with their hosts.
    """
    needed = f"all ranks finish the check within {seconds:g} s"
    stuck = {rank: note for rank, note in notes.items() if note is not None and note.step < len(steps)}
    if silent:
        waiting = sorted(rank for rank, note in stuck.items() if set(note.waits) & set(silent))
        found = f"the check hangs: {name(silent)} {'does' if len(silent) == 1 else 'do'} not answer"
        found += f"; {name(waiting)} {'waits' if len(waiting) == 1 else 'wait'} for that" if waiting else ""
        return error(
            "N2",
            found,
            expected=needed,
            fix=f"look at {listed(dict.fromkeys(hosts[rank] for rank in silent))}: the process is stopped or hung, or its host is",
        )
    if not stuck:
        return error(
            "N2",
            f"the check did not end in {seconds:g} s, and no rank reports what it waits for",
            expected=needed,
            fix="--probe-seconds sets a longer limit, --probe none skips the check",
        )
    first = min(note.step for note in stuck.values())
    if first == START:
        ranks = sorted(rank for rank, note in stuck.items() if note.step == first)
        return error(
            "N2",
            f"the check hangs while NCCL's ranks connect: {name(ranks)}",
            expected=needed,
            fix=_cure(list(dict.fromkeys(hosts))),
        )
    step = steps[first]
    there = {rank: note for rank, note in stuck.items() if note.step == first}
    size = min(note.size for note in there.values())
    if step.operation != EXCHANGE:
        ranks = sorted(set(there) | {rank for note in there.values() for rank in note.waits})
        found = f"the check hangs {f'in an {step.operation} of {size} bytes' if size else f'before an {step.operation}'} over {name(ranks)}"
        cut = _pairs_without_ping(there)
        if not cut:
            return error(
                "N2", found + _slowest(notes, name), expected=needed, fix=_cure(sorted({hosts[rank] for rank in ranks}))
            )
        described, suspects = _pairs(cut, hosts, name)
        return error("N2", f"{found}: no message arrives between {described}", expected=needed, fix=_cure(suspects))
    pairs = sorted({(min(rank, peer), max(rank, peer)) for rank, note in there.items() for peer in note.waits})
    described, suspects = _pairs(pairs, hosts, name)
    found = f"the check hangs: a message of {size} bytes does not arrive between {described}"
    return error("N2", found, expected=needed, fix=_cure(suspects))


def _pairs(
    pairs: Sequence[tuple[int, int]], hosts: Sequence[str], name: Callable[[Sequence[int]], str]
) -> tuple[str, list[str]]:
    """Describe pairs and the rank that all have in common; return the text and the suspected nodes."""
    described = "; ".join(f"{name([one])} and {name([other])}" for one, other in pairs[:_MOST_PAIRS])
    described += f"; and {len(pairs) - _MOST_PAIRS} other pairs" if len(pairs) > _MOST_PAIRS else ""
    ends = [{hosts[one], hosts[other]} for one, other in pairs]
    common = set.intersection(*ends) if len(pairs) > 1 else set()
    if len(common) == 1:
        described += f"; what they have in common is {min(common)}"
    return described, sorted(common or set.union(*ends))


def _pairs_without_ping(notes: Mapping[int, WaitState]) -> list[tuple[int, int]]:
    """Return the pairs of a collective whose pings don't arrive, from the states of the ranks at the earliest wait. Only ranks that have
    sent pings count."""
    pinged = {rank: note for rank, note in notes.items() if note.without_ping is not None}
    earliest = min((note.wait for note in pinged.values()), default=0)
    return sorted(
        {
            (min(rank, peer), max(rank, peer))
            for rank, note in pinged.items()
            for peer in note.without_ping or ()
            if note.wait == earliest and peer in pinged
        }
    )


def _slowest(notes: Mapping[int, WaitState | None], name: Callable[[Sequence[int]], str]) -> str:
    """Name the slowest pairs so far, if they are slow: a late collective may only be waiting for them."""
    rates = {(rank, note.slow_peer): note.rate for rank, note in notes.items() if note and note.slow_peer is not None}
    most = max(rates.values(), default=0.0)
    slow = sorted({(min(pair), max(pair)) for pair, rate in rates.items() if rate * _SLOW < most})
    described = "; ".join(f"{name([one])} and {name([other])}" for one, other in slow[:_MOST_PAIRS])
    return (
        f"; before that, the slowest were {described}, by a factor of {most / min(rates.values()):.0f}"
        if described
        else ""
    )


def _cure(hosts: Sequence[str]) -> str:
    return (
        f"look at the network of {listed(hosts[:_MOST_PAIRS])} (cable, interface, firewall; NCCL_SOCKET_IFNAME, "
        "OMPI_MCA_btl_tcp_if_include), or leave the node out (sbatch --exclude=...); --probe-seconds sets a longer limit"
    )
