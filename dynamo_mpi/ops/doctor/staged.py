# SPDX-License-Identifier: Apache-2.0
"""Doctor's check of the models that are staged on this node."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dynamo_mpi.ops.doctor.check import Check, Context, ok, warning
from dynamo_mpi.ops.staged import Staged, describe, read_staged
from dynamo_mpi.stage.manifest import StageError
from dynamo_mpi.stage.site import AUTO, NONE, site_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

_NEEDED = "a folder on a disk of this node that only this user can write; otherwise workers load the model's own folder"
_FIX = "DYN_MPI_STAGE=DIR names another, none turns staging off"


def check_staged(context: Context) -> Iterator[Check]:
    """Check the folder that workers stage to, if the environment names one."""
    setting = context.environ.get("DYN_MPI_STAGE") or AUTO
    if setting == NONE:
        return
    site = site_folder(context.environ) if setting == AUTO else None
    if setting == AUTO and site is None:
        return
    if site is not None and site.problem:
        yield warning("staged", f"{site.variable} ({site.path}) {site.problem}", _NEEDED, _FIX)
        return
    try:
        yield judge_staged(read_staged(site.path if site is not None else setting))
    except FileNotFoundError:
        above = os.path.dirname(setting.rstrip("/"))
        if os.path.isdir(above):
            yield ok("staged", f"nothing: {setting} isn't there yet")  # a worker creates it
        else:
            yield warning("staged", f"there is no {above}, in which workers would create {setting}", _NEEDED, _FIX)
    except (OSError, StageError) as error:
        yield warning("staged", str(error), _NEEDED, _FIX)


def judge_staged(staged: Staged) -> Check:
    """Evaluate what is staged."""
    found = "\n".join([staged.summary, *map(describe, staged.entries)])
    unused = [entry.name for entry in staged.entries if not entry.complete and not entry.in_use]
    if unused:
        needed = "whole copies: others take room until a worker needs it"
        return warning("staged", found, needed, f"dynamo-mpi stage --unstage {' '.join(unused)}")
    return ok("staged", found)
