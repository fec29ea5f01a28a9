# SPDX-License-Identifier: Apache-2.0
"""Who keeps whom waiting in a fabric probe that does not end: out of what each rank says it waits for. Pure.

Ranks that are stuck keep others from their next step, and those others again: the ranks at the earliest step are where it began.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.checks.fabric_steps import EXCHANGE
from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.exit_codes import ExitCode
from dynamo_mpi.layout.finding import error
from dynamo_mpi.layout.format import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.checks.fabric_steps import Step
    from dynamo_mpi.layout.finding import Finding

_FORM = re.compile(r"probe step (-?\d+), (\d+) bytes: waits for ranks? ([\d, ]+)")
_UNHEARD = re.compile(r"not heard in wait (\d+): ([\d, ]+|nobody)")
_SLOWEST = re.compile(r"slowest so far: rank (\d+), (\d+) bytes/s")
_MOST_PAIRS = 6
# how much slower than the fastest a pair has to be to be worth a word
_SLOW = 8
START = -1
"""The step before the first: NCCL's ranks find each other."""


class WaitState(NamedTuple):
    """Where a rank stands.

    Args:
        step: number of the step that it is in.
        size: bytes of the message.
        waits: the ranks that it still waits for.
        slow_peer: the rank that it has exchanged messages with most slowly so far; None for none.
        rate: how fast, in bytes a second.
        wait: of a collective that is late, which of the step's waits it is.
        unheard: the ranks whose call has not come meanwhile; None where it has not called.
    """

    step: int
    size: int
    waits: tuple[int, ...]
    slow_peer: int | None = None
    rate: float = 0.0
    wait: int = 0
    unheard: tuple[int, ...] | None = None

    def __str__(self) -> str:
        ranks = "rank" if len(self.waits) == 1 else "ranks"
        text = f"probe step {self.step}, {self.size} bytes: waits for {ranks} {listed(self.waits)}"
        if self.unheard is not None:
            text += f"; not heard in wait {self.wait}: {listed(self.unheard) or 'nobody'}"
        return (
            text
            if self.slow_peer is None
            else f"{text}; slowest so far: rank {self.slow_peer}, {self.rate:.0f} bytes/s"
        )


def read_note(text: str) -> WaitState | None:
    """Find a note in what a rank answered; None where it is in no step."""
    found = _FORM.search(text)
    if found is None:
        return None
    note = WaitState(int(found[1]), int(found[2]), _numbers(found[3]))
    unheard, slow = _UNHEARD.search(text), _SLOWEST.search(text)
    if unheard is not None:
        note = note._replace(wait=int(unheard[1]), unheard=() if unheard[2] == "nobody" else _numbers(unheard[2]))
    return note if slow is None else note._replace(slow_peer=int(slow[1]), rate=float(slow[2]))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


class HangError(DynamoMpiError):
    """A probe did not end in its time. No `PhaseTimeoutError`: it says itself where the ranks are."""

    exit_code = ExitCode.DEADLINE

    @classmethod
    def of(cls, finding: Finding) -> HangError:
        """Make it of the finding that says so."""
        return cls(f"{finding.rule}: {finding.message}", needed=finding.needed, fix=finding.fix)


def find_blocking_ranks(
    notes: Mapping[int, WaitState | None],
    silent: Sequence[int],
    steps: Sequence[Step],
    hosts: Sequence[str],
    seconds: float,
    name: Callable[[Sequence[int]], str],
) -> Finding:
    """Say between whom it hangs.

    Args:
        notes: where the ranks that answered stand.
        silent: ranks that did not answer.
        steps: what the probe does.
        hosts: each rank's node.
        seconds: that it had.
        name: names ranks with their hosts.
    """
    needed = f"all ranks through the probe within {seconds:g} s"
    stuck = {rank: note for rank, note in notes.items() if note is not None and note.step < len(steps)}
    if silent:
        waiting = sorted(rank for rank, note in stuck.items() if set(note.waits) & set(silent))
        found = f"the probe hangs: {name(silent)} {'does' if len(silent) == 1 else 'do'} not answer"
        found += f"; {name(waiting)} {'waits' if len(waiting) == 1 else 'wait'} for that" if waiting else ""
        return error(
            "N2",
            found,
            needed=needed,
            fix=f"look at {listed(dict.fromkeys(hosts[rank] for rank in silent))}: the process is stopped or stuck, or its host is",
        )
    if not stuck:
        return error(
            "N2",
            f"the probe did not end in {seconds:g} s, and no rank says what it waits for",
            needed=needed,
            fix="--probe-seconds gives it longer, --probe none leaves it out",
        )
    first = min(note.step for note in stuck.values())
    if first == START:
        ranks = sorted(rank for rank, note in stuck.items() if note.step == first)
        return error(
            "N2",
            f"the probe hangs where NCCL's ranks find each other: {name(ranks)}",
            needed=needed,
            fix=_cure(list(dict.fromkeys(hosts))),
        )
    step = steps[first]
    there = {rank: note for rank, note in stuck.items() if note.step == first}
    size = min(note.size for note in there.values())
    if step.operation != EXCHANGE:
        ranks = sorted(set(there) | {rank for note in there.values() for rank in note.waits})
        found = f"the probe hangs {f'in an {step.operation} of {size} bytes' if size else f'before an {step.operation}'} over {name(ranks)}"
        cut = _unheard(there)
        if not cut:
            return error(
                "N2", found + _slowest(notes, name), needed=needed, fix=_cure(sorted({hosts[rank] for rank in ranks}))
            )
        told, suspects = _pairs(cut, hosts, name)
        return error("N2", f"{found}: nothing comes through between {told}", needed=needed, fix=_cure(suspects))
    pairs = sorted({(min(rank, peer), max(rank, peer)) for rank, note in there.items() for peer in note.waits})
    told, suspects = _pairs(pairs, hosts, name)
    found = f"the probe hangs: a message of {size} bytes does not arrive between {told}"
    return error("N2", found, needed=needed, fix=_cure(suspects))


def _pairs(
    pairs: Sequence[tuple[int, int]], hosts: Sequence[str], name: Callable[[Sequence[int]], str]
) -> tuple[str, list[str]]:
    """Name pairs, what they have in common, and the nodes to look at."""
    told = "; ".join(f"{name([one])} and {name([other])}" for one, other in pairs[:_MOST_PAIRS])
    told += f"; and {len(pairs) - _MOST_PAIRS} other pairs" if len(pairs) > _MOST_PAIRS else ""
    ends = [{hosts[one], hosts[other]} for one, other in pairs]
    common = set.intersection(*ends) if len(pairs) > 1 else set()
    if len(common) == 1:
        told += f"; what they have in common is {min(common)}"
    return told, sorted(common or set.union(*ends))


def _unheard(notes: Mapping[int, WaitState]) -> list[tuple[int, int]]:
    """Return the pairs of a collective that do not hear each other's calls, out of what the ranks at the earliest wait say. Who has not
    called can't be missed."""
    called = {rank: note for rank, note in notes.items() if note.unheard is not None}
    earliest = min((note.wait for note in called.values()), default=0)
    return sorted(
        {
            (min(rank, peer), max(rank, peer))
            for rank, note in called.items()
            for peer in note.unheard or ()
            if note.wait == earliest and peer in called
        }
    )


def _slowest(notes: Mapping[int, WaitState | None], name: Callable[[Sequence[int]], str]) -> str:
    """Name the slowest pairs so far, where they are slow: a collective that is late may just be waiting for them."""
    rates = {(rank, note.slow_peer): note.rate for rank, note in notes.items() if note and note.slow_peer is not None}
    most = max(rates.values(), default=0.0)
    slow = sorted({(min(pair), max(pair)) for pair, rate in rates.items() if rate * _SLOW < most})
    told = "; ".join(f"{name([one])} and {name([other])}" for one, other in slow[:_MOST_PAIRS])
    return f"; before that, the slowest were {told}, by a factor of {most / min(rates.values()):.0f}" if told else ""


def _cure(hosts: Sequence[str]) -> str:
    return (
        f"look at the network of {listed(hosts[:_MOST_PAIRS])} (cable, interface, firewall; NCCL_SOCKET_IFNAME, "
        "OMPI_MCA_btl_tcp_if_include), or leave the node out (sbatch --exclude=...); --probe-seconds gives it longer"
    )
