# SPDX-License-Identifier: Apache-2.0
"""Slurm's short form of lists of hosts, ``n[1-4,7],gpu[01-02]``, read without Slurm.

In an allocation Slurm's own ``scontrol show hostnames`` is asked. This is for a dry run, which has to work where there is no Slurm.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.layout.engine_config import MAX_RANKS

if TYPE_CHECKING:
    from collections.abc import Iterator

# what Slurm takes for a name of a host, outside of brackets
_NAME = re.compile(r"[A-Za-z0-9_.-]*")
# a part of a list: names and brackets in turn; commas in brackets don't separate
_PART = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
_PIECE = re.compile(r"([^\[\]]*)(?:\[([^\[\]]*)\])?")
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


def expand(written: str, origin: str) -> tuple[str, ...]:
    """Return the hosts of a list, each once, in their order.

    Args:
        written: such as ``n[1-4]`` or ``rack[1-2]n[08-11],head``; numbers are as wide as the first one of their range.
        origin: the flag or variable that it comes from, for the error.

    Raises:
        UsageError: it is no list of hosts, or a list of more hosts than a deployment can have.
    """
    hosts: dict[str, None] = {}
    try:
        for host in _hosts(written.strip()):
            hosts[host] = None
            if len(hosts) > MAX_RANKS:
                raise ValueError(f"it has more than {MAX_RANKS} hosts")
    except ValueError as error:
        raise UsageError(
            f"{origin} is {written!r}: {error}",
            expected="Slurm's list of nodes, such as n[1-4] or n1,n2",
            fix="write it as squeue and sinfo show it, in quotes",
        ) from None
    return tuple(hosts)


def _hosts(written: str) -> Iterator[str]:
    if (opened := written.count("[")) != (closed := written.count("]")):
        raise ValueError("a [ isn't closed" if opened > closed else "a ] has no [ before it")
    at = 0
    while at < len(written):
        part = _PART.match(written, at)
        if part is None:
            raise ValueError(f"{written[at : at + 20]!r} begins no host")
        yield from _of_part(part[0])
        at = part.end()
        if at < len(written) and (written[at] != "," or at + 1 == len(written)):
            raise ValueError(f"{written[at : at + 20]!r} is no further host")
        at += 1
    if not written:
        raise ValueError("it names no host")


def _of_part(part: str) -> Iterator[str]:
    """Yield the hosts of a part without commas outside of brackets; the last bracket counts fastest, as in Slurm."""
    choices: list[list[str]] = []
    for name, ranges in _PIECE.findall(part):
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no part of a host's name")
        choices.append([name])
        if ranges:
            choices.append([number for one in ranges.split(",") for number in _numbers(one)])
    if "[]" in part:
        raise ValueError("a bracket is empty")
    if "[" in part and not part.endswith("]"):
        raise ValueError(f"{part!r} goes on after its brackets, which Slurm doesn't take")
    for chosen in itertools.product(*choices):
        yield "".join(chosen)


def _numbers(written: str) -> list[str]:
    """Return the numbers of ``08-11`` or ``7``, as wide as the first one."""
    found = _RANGE.fullmatch(written)
    if found is None:
        raise ValueError(f"{written!r} is no range of numbers")
    first, last = int(found[1]), int(found[2] or found[1])
    if not first <= last < first + MAX_RANKS:
        raise ValueError(f"{written!r} is no range of at most {MAX_RANKS} numbers")
    return [f"{number:0{len(found[1])}}" for number in range(first, last + 1)]
