# SPDX-License-Identifier: Apache-2.0
"""Compares spare nodes with the nodes of workers that serve, as a preflight over both would, when both have written down what they have.

A worker's rank 0 has it in its ready file, a spare's check in ``spares/NODE.json`` of the run folder. A network file system may show either
late: what isn't there yet is looked for again.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.checks.node_facts import NodeFacts
from dynamo_mpi.checks.node_probe import domain_of_facts
from dynamo_mpi.common.own_files import read_own, remove_own
from dynamo_mpi.deploy.step_commands import SPARES

if TYPE_CHECKING:
    from collections.abc import Collection

    from dynamo_mpi.checks.spare_rules import Comparison

LOOK_SECONDS = 2.0


class _Worker(NamedTuple):
    """A worker's start that serves, or has served.

    Args:
        mark: changes with its ready file.
        facts: of its rank 0's node.
    """

    mark: tuple[int, int]
    facts: NodeFacts


class SpareComparer:
    """Compares each spare once with each start of a worker. Use it from the main thread.

    Args:
        folder: the deployment's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spares: dict[str, NodeFacts] = {}
        self._workers: dict[str, _Worker] = {}
        # with which starts of workers each spare was compared
        self._compared: dict[str, dict[str, tuple[int, int]]] = {}
        self._looked_at = float("-inf")

    def forget(self, node: str) -> None:
        """Remove what an earlier deployment in the folder has left of a node."""
        remove_own(self._file(node))

    def look(self, nodes: Collection[str]) -> dict[str, Comparison]:
        """Compare those of which, or of whose workers, something new is known; return the results by node.

        Args:
            nodes: those whose check has ended, and that no worker uses yet.
        """
        if not nodes or time.monotonic() < self._looked_at + LOOK_SECONDS:
            return {}
        self._looked_at = time.monotonic()
        self._read_workers()
        found: dict[str, Comparison] = {}
        for node in nodes:
            if node not in self._spares and (facts := _facts(_read(self._file(node)))) is not None:
                self._spares[node] = facts
            if node in self._spares and (comparison := self._compare(node)) is not None:
                found[node] = comparison
        return found

    def domain_of(self, worker: str) -> str:
        """Return the NVLink domain of a worker's GPUs, on the node of its rank 0; empty if there is none, or it isn't known."""
        facts = self._workers.get(worker)
        return "" if facts is None else domain_of_facts(facts.facts.gpus.visible_gpus)

    def _compare(self, node: str) -> Comparison | None:
        from dynamo_mpi.checks.spare_rules import Comparison, compare

        starts = {name: worker.mark for name, worker in self._workers.items()}
        if self._compared.get(node, {}) == starts:
            return None
        self._compared[node] = starts
        found = [compare(worker.facts, self._spares[node]) for worker in self._workers.values()]
        problems, notes = (tuple(dict.fromkeys(text for one in found for text in one[at])) for at in (0, 1))
        return Comparison(problems, notes)

    def _read_workers(self) -> None:
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._folder / "ready"):
                status = entry.stat(follow_symlinks=False)
                name, mark = entry.name.removesuffix(".json"), (status.st_ino, status.st_mtime_ns)
                known = self._workers.get(name)
                if entry.name.startswith(".") or (known is not None and known.mark == mark):
                    continue
                if (facts := _facts(_read(Path(entry.path)).get("node"))) is not None:
                    self._workers[name] = _Worker(mark, facts)

    def _file(self, node: str) -> Path:
        return self._folder / SPARES / f"{node}.json"


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(read_own(path))
        return content if isinstance(content, dict) else {}
    return {}


def _facts(content: Any) -> NodeFacts | None:
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return NodeFacts.of(content)
    return None
