# SPDX-License-Identifier: Apache-2.0
"""The key of an archive of compile caches: all that makes them valid. Pure."""

from __future__ import annotations

import hashlib
import platform
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.checks.rank_facts import RankFacts
    from dynamo_mpi.checks.rank_report import ComparedFile
    from dynamo_mpi.layout.layout import LayoutSpec, Place

_MODEL_LABEL = "model config"
# they are part of the image, like the engine, and compile nothing
_WITHOUT = ("nvidia-nccl-", "mpi4py", "ai-dynamo")


class KeyUnknownError(Exception):
    """What the caches depend on isn't known; the text says what."""


def key_of(
    subject: LayoutSpec, files: Sequence[ComparedFile], rows: Sequence[RankFacts], *, without_gpus: bool
) -> dict[str, Any]:
    """Return the key for a worker: engine, versions, each rank's GPU, driver, host and place, the model's config, the layout.

    Args:
        subject: the worker.
        files: the files that the preflight compared, the model's config among them.
        rows: the ranks' hosts and GPUs.
        without_gpus: whether the user allows that there are none.

    Raises:
        KeyUnknownError: a GPU or its driver isn't known.
    """
    versions = next((row.facts.versions for row in rows if row.facts.versions), ())
    # host code is compiled too; one rank of each node knows for what
    platforms = {row.host: dict(row.facts.platform) for row in rows if row.facts.speaks_for_node}
    digest = hashlib.sha256()
    for file in files:
        if file.label == _MODEL_LABEL:
            digest.update(file.content.encode("utf-8", "surrogateescape") + b"\0")
    per_node = subject.cluster.gpus_per_node
    return {
        "engine": subject.engine,
        "versions": {name: version for name, version in versions if not name.startswith(_WITHOUT)},
        "python": f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}",
        "machine": platform.machine(),
        # files name the headers of packages by their paths
        "prefix": sys.prefix,
        "hosts": [platforms.get(row.host, {}) for row in rows],
        "gpus": [_gpu_of(row, without_gpus=without_gpus) for row in rows],
        "model": digest.hexdigest(),
        "role": subject.role,
        "layout": subject.layout_as_json(),
        "places": [_place_of(subject.layout.place(row.rank, per_node)) for row in rows],
    }


def _place_of(place: Place) -> list[int]:
    experts = place.moe_tp_rank, place.moe_ep_rank
    return [place.node, place.gpu, place.tp_rank, place.pp_rank, place.cp_rank, *experts]


def _gpu_of(row: RankFacts, *, without_gpus: bool) -> list[str | int]:
    if without_gpus:
        return []
    gpu = row.gpus.facts_of(row.gpus.taken_by(row.rank))
    if gpu is None and len({(each.name, each.sm) for each in row.gpus.gpus}) == 1:
        # which one isn't known, but all are alike
        gpu = row.gpus.gpus[0]
    if gpu is None or not row.gpus.driver:
        why = row.gpus.problem or "NVML doesn't say"
        raise KeyUnknownError(f"the GPU of rank {row.rank} on {row.host}, or its driver, isn't known: {why}")
    return [gpu.name, gpu.sm, row.gpus.driver]
