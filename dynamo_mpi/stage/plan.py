# SPDX-License-Identifier: Apache-2.0
"""What to stage, as rank 0 plans it for all ranks."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.stage.manifest import scan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.mpi.placement import HasHost


class StagePlan(NamedTuple):
    """What to stage, the same on all ranks.

    Args:
        folder: where each node keeps copies.
        manifest: the model, from `Manifest.to_json`.
        firsts: the first rank of each node.
        network: the network in which the nodes reach each other; empty for each host's own address.
        readers: how many extents a node reads at once.
        seconds: the time limit.
        digests: whether to read earlier copies to check them.
        auto: whether the user hasn't named the folder.
    """

    folder: str
    manifest: str
    firsts: tuple[int, ...]
    network: str
    readers: int
    seconds: float
    digests: bool
    auto: bool = False

    def pack(self) -> str:
        """Encode it."""
        return json.dumps(self._asdict())

    @classmethod
    def unpack(cls, text: str) -> StagePlan:
        """Decode the result of `pack`."""
        members = json.loads(text)
        return cls(**members | {"firsts": tuple(members["firsts"])})


def plan_staging(
    model: str, folder: str, ranks: Sequence[HasHost], network: str, limits: tuple[int, float, bool]
) -> StagePlan:
    """Return the plan for a model.

    Args:
        model: its folder.
        folder: where each node keeps copies.
        ranks: each rank's host.
        network: the network in which the nodes reach each other; empty for each host's own address.
        limits: readers of a node, the time limit in seconds, and whether to read earlier copies to check them.

    Raises:
        StageError: the model's folder can't be copied.
        UsageError: copies would be in the model's folder itself.
    """
    inside = os.path.realpath(model)
    if os.path.commonpath((inside, os.path.realpath(folder))) == inside:
        raise UsageError(
            f"--stage is {folder}: the model's own folder {model}, or in it",
            expected="a folder on a disk of each node, apart from the model",
            fix="correct --stage (DYN_MPI_STAGE, STAGE_DIR)",
        )
    firsts: dict[str, int] = {}
    for rank, place in enumerate(ranks):
        firsts.setdefault(place.host, rank)
    readers, seconds, digests = limits
    return StagePlan(folder, scan(model).to_json(), tuple(firsts.values()), network, readers, seconds, digests)
