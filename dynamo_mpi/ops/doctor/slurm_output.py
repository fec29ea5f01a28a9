# SPDX-License-Identifier: Apache-2.0
"""Parses the output of Slurm's commands. Pure; versions differ in the stream (stdout, stderr) and in prefixes."""

from __future__ import annotations

import re
from typing import NamedTuple

_PREFIX = re.compile(r"^srun: ")
_VERSION = re.compile(r"\b(\d+)\.(\d+)(?:\.(\d+))?")
_SPECIFIC = "specific pmix plugin versions available:"
# D-HH:MM:SS and its shorter forms: squeue's format of the remaining time
_LEFT = re.compile(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)")
# the first host of a list: text and brackets with ranges, up to a comma or a blank
_RANGES = re.compile(r"\[(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\]")
_FIRST_HOST = re.compile(r"[\s,]*((?:[^\s,\[\]]|\[\d[\d,-]*\])+)(?=[\s,]|$)")


class MpiPlugins(NamedTuple):
    """What ``srun --mpi=list`` offers.

    Args:
        types: values of ``--mpi=``.
        pmix_versions: the PMIx plugins behind ``pmix``: ``pmix_v4``.
    """

    types: tuple[str, ...]
    pmix_versions: tuple[str, ...] = ()

    @property
    def pmix(self) -> tuple[str, ...]:
        """All types of PMIx."""
        return tuple(name for name in self.types if name.startswith("pmix")) + self.pmix_versions


def read_mpi_list(text: str) -> MpiPlugins | None:
    """Read ``srun --mpi=list``; None if it has another format.

    Up to 21.08 each line begins with ``srun:`` and PMIx's versions are among the types; since 22.05 they have a line of their own.
    """
    types: list[str] = []
    versions: tuple[str, ...] = ()
    begun = False
    for line in (_PREFIX.sub("", line).strip() for line in text.splitlines()):
        if re.fullmatch(r"MPI( plugin)? types are\.*", line):
            begun = True
        elif line.startswith(_SPECIFIC):
            versions = tuple(name.strip() for name in line.removeprefix(_SPECIFIC).split(",") if name.strip())
        elif begun and re.fullmatch(r"[a-z0-9_]+", line):
            types.append(line)
    return MpiPlugins(tuple(types), versions) if begun else None


def pmix_refusal(text: str) -> str:
    """Return srun's error about a PMIx plugin that it can't load; empty if there is none."""
    return next(
        (line.strip() for line in text.splitlines() if "can not load PMIx" in line or "Invalid MPI type" in line), ""
    )


def read_version(text: str) -> tuple[int, int] | None:
    """Read ``srun --version``: ``slurm 23.11.4``, on Debian ``slurm-wlm 22.05.8``."""
    match = _VERSION.search(text) if text.startswith("slurm") else None
    return (int(match[1]), int(match[2])) if match else None


def takes_containers(help_text: str) -> bool:
    """Return from ``srun --help`` whether Pyxis is installed: its plugin adds the option."""
    return re.search(r"^\s*--container-image\b", help_text, re.MULTILINE) is not None


def read_controllers(text: str) -> dict[str, bool]:
    """Read ``scontrol ping``: ``Slurmctld(primary) at n1 is UP``; the controllers, and whether each is up."""
    return {
        match[1]: match[2] == "UP" for match in re.finditer(r"^Slurmctld\(\w+\) at (\S+) is (\w+)", text, re.MULTILINE)
    }


def read_time_left(text: str) -> int | None:
    """Read the seconds of ``squeue --format=%L``; None for no limit, and for another text."""
    match = _LEFT.fullmatch(text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def first_node(nodelist: str) -> str:
    """Return the first node of Slurm's compressed list; empty if Slurm would refuse it.

    ``n[03-05,7],m1`` begins with ``n03``, ``rack[0-3]node[0-15]`` with ``rack0node0``. Text behind brackets, as in ``r[0-1]-ib``, is taken,
    as by Slurm 24.11; 22.05 refuses it.
    """
    match = _FIRST_HOST.match(nodelist)
    ranges = _RANGES.findall(match[1]) if match else []
    if match is None or any(_is_reversed(one) for text in ranges for one in text.split(",")):
        return ""
    return _RANGES.sub(lambda found: re.split("[-,]", found[1])[0], match[1])


def _is_reversed(text: str) -> bool:
    low, _, high = text.partition("-")
    return bool(high) and int(low) > int(high)
