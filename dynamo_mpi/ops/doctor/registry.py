# SPDX-License-Identifier: Apache-2.0
"""All sections, in the order of the report. Sections that need a flag are passed to `chosen` as ``further``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.ops.doctor import environment, fabric, gpus, host, mpi, packages, ports, services, slurm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.ops.doctor.context import Section

SECTIONS: tuple[Section, ...] = (
    packages.SECTION,
    mpi.SECTION,
    slurm.SECTION,
    gpus.SECTION,
    fabric.SECTION,
    services.SECTION,
    ports.SECTION,
    host.SECTION,
    environment.SECTION,
)


def chosen(only: str | None, further: Sequence[Section] = ()) -> tuple[Section, ...]:
    """Return the sections to run.

    Args:
        only: names with commas between; None for all.
        further: additional sections, at the end.

    Raises:
        UsageError: a section doesn't exist.
    """
    everything = (*SECTIONS, *further)
    if only is None:
        return everything
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = [section.name for section in everything]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--only: there is no section {', '.join(unknown)}", needed=f"some of {', '.join(known)}")
    if not names:
        raise UsageError("--only names no section", needed=f"some of {', '.join(known)}")
    return tuple(section for section in everything if section.name in names)
