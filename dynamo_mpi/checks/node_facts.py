# SPDX-License-Identifier: Apache-2.0
"""What the preflight compares between ranks, of one node: written down by a worker, and by a spare node, so that both can be compared before
the spare is needed (`spare_rules`)."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi import __version__
from dynamo_mpi.checks.gpu_facts import NodeGpus, read_gpus
from dynamo_mpi.checks.host_facts import HostFacts, collect
from dynamo_mpi.checks.rank_report import weight_files
from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.process import host_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dynamo_mpi.checks.rank_report import RankReport, ReportRequest

_CONFIGS = ("config.json", "hf_quant_config.json")
UNREADABLE = "unreadable: "


class NodeFacts(NamedTuple):
    """One node.

    Args:
        host: its name.
        version: dynamo_mpi's.
        python: the interpreter's kind and version, to its second number.
        model_dir: the model's folder; empty if it isn't known.
        weights: number of the model's weight files.
        weight_names: digest of their names.
        files: digest of each further file that must be the same everywhere, by its path; or why it can't be read, after ``unreadable:``.
        host_facts: `HostFacts`, packed; empty for an engine that has no requirements of hosts.
        gpu_facts: `NodeGpus`, packed; empty for one that needs no GPU.
        caches: of a spare, the folder of ``--cache``, or why it can't be read, after ``unreadable:``; empty for none.
    """

    host: str
    version: str
    python: str
    model_dir: str
    weights: int
    weight_names: str
    files: dict[str, str]
    host_facts: tuple[str, ...] = ()
    gpu_facts: tuple[str, ...] = ()
    caches: str = ""

    @property
    def facts(self) -> HostFacts | None:
        """The facts about the host."""
        return HostFacts.unpack(self.host_facts) if self.host_facts else None

    @property
    def gpus(self) -> NodeGpus:
        """The GPUs."""
        return NodeGpus.unpack(self.gpu_facts) if self.gpu_facts else NodeGpus()

    @property
    def problems(self) -> list[str]:
        """The files that can't be read."""
        return [each.removeprefix(UNREADABLE) for each in self.files.values() if each.startswith(UNREADABLE)]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> NodeFacts:
        """Read what `_asdict` has become in JSON.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        found = cls(
            str(content["host"]),
            str(content["version"]),
            str(content["python"]),
            str(content["model_dir"]),
            int(content["weights"]),
            str(content["weight_names"]),
            {str(path): str(digest) for path, digest in dict(content["files"]).items()},
            tuple(map(str, content["host_facts"])),
            tuple(map(str, content["gpu_facts"])),
            str(content["caches"]),
        )
        _ = found.facts, found.gpus
        return found


def facts_of_worker(request: ReportRequest, report: RankReport) -> NodeFacts:
    """Return the facts of rank 0's node, as the preflight has found them. Pure.

    Args:
        request: rank 0's request to all ranks.
        report: its own report.
    """
    return NodeFacts(
        report.host,
        report.version,
        _python(),
        request.model_dir,
        len(request.weights),
        _digest("\n".join(request.weights)),
        {file.path: _digest(file.content) for file in request.files},
        # without what is a rank's own; anybody may read a ready file
        HostFacts.unpack(report.host_facts)._replace(variables=(), cpus=(), allowed=()).pack()
        if report.host_facts
        else (),
        report.gpu_facts,
    )


def facts_of_node(model: str, engine_configs: Sequence[str], environ: Mapping[str, str]) -> NodeFacts:
    """Read the facts of this node. Never raises: what can't be read is in `NodeFacts.files`.

    Args:
        model: the model's folder, or its id on the hub; empty if there is none.
        engine_configs: engine configs of workers.
        environ: as a rank would have it.
    """
    # as workers spell paths
    folder, files = "", _digests(str(Path(path)) for path in engine_configs)
    names: tuple[str, ...] = ()
    if model:
        from dynamo_mpi.layout.model_files import find_model

        try:
            folder = str(Path(find_model(model, environ).config).parent)
            names = weight_files(entries := os.listdir(folder))
            files |= _digests(os.path.join(folder, name) for name in _CONFIGS if name in entries)
            weights = (os.path.join(folder, name) for name in names)
            files |= {path: f"{UNREADABLE}{path} can't be read" for path in weights if not os.access(path, os.R_OK)}
        except DynamoMpiError as error:
            files[model] = f"{UNREADABLE}{error.problem}"
        except OSError as error:
            files[model] = f"{UNREADABLE}{model} can't be read: {error.strerror}"
    return NodeFacts(
        host_name(),
        __version__,
        _python(),
        folder,
        len(names),
        _digest("\n".join(names)),
        files,
        collect(_mpi_library(), environ, speaks_for_node=True)._replace(variables=(), cpus=(), allowed=()).pack(),
        read_gpus(environ).pack(),
        _caches(environ.get("DYN_MPI_CACHE", "")),
    )


def _caches(folder: str) -> str:
    if not folder or os.access(folder, os.R_OK | os.X_OK):
        return folder
    return f"{UNREADABLE}{folder} can't be read" if os.path.isdir(folder) else f"{UNREADABLE}{folder} is no folder here"


def _mpi_library() -> str:
    from dynamo_mpi.mpi.world import load_mpi_library

    try:
        return load_mpi_library()
    except DynamoMpiError:
        return ""


def _digests(paths: Iterable[str]) -> dict[str, str]:
    found = {}
    for path in paths:
        try:
            with open(path, "rb") as file:
                found[path] = _digest(file.read().decode("utf-8", "surrogateescape"))
        except OSError as error:
            found[path] = f"{UNREADABLE}{path} can't be read: {error.strerror}"
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _python() -> str:
    return f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}"
