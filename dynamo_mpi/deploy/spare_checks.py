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
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.checks.node_facts import NodeFacts
from dynamo_mpi.checks.node_probe import domain_of_facts
from dynamo_mpi.common.own_files import read_own, remove_own
from dynamo_mpi.deploy.step_commands import SPARES

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

LOOK_SECONDS = 2.0
_MOST_SHOWN = 3


class Judgement(NamedTuple):
    """How a spare compares with the workers that have served.

    Args:
        problems: by worker, why it can't use the spare.
        doubts: by worker, why it can use the spare only if it starts with other files than the last time.
        notes: what a worker's preflight would warn of.
        is_old: whether a worker has started since the spare's check.
    """

    problems: Mapping[str, str]
    doubts: Mapping[str, str]
    notes: tuple[str, ...]
    is_old: bool


class _Seen(NamedTuple):
    """What a file says about a node.

    Args:
        mark: changes with the file: its time, and its number.
        facts: the node's.
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
        self._spares: dict[str, _Seen] = {}
        self._workers: dict[str, _Seen] = {}
        # with which starts of workers each spare was compared
        self._compared: dict[str, dict[str, tuple[int, int]]] = {}
        self._looked_at = float("-inf")

    def forget(self, node: str) -> None:
        """Remove what an earlier check has written of a spare."""
        remove_own(self._file(node))
        self._spares.pop(node, None)
        self._compared.pop(node, None)

    def look(self, nodes: Collection[str]) -> dict[str, Judgement]:
        """Compare those of which, or of whose workers, something new is known; return the results by node.

        Args:
            nodes: those whose check has ended, and that no worker uses yet.
        """
        if not nodes or time.monotonic() < self._looked_at + LOOK_SECONDS:
            return {}
        self._looked_at = time.monotonic()
        self._read_workers()
        found: dict[str, Judgement] = {}
        for node in nodes:
            if node not in self._spares and (seen := _read(self._file(node))) is not None:
                self._spares[node] = seen
            if node in self._spares and (judgement := self._judge(node)) is not None:
                found[node] = judgement
        return found

    def domain_of(self, worker: str) -> str:
        """Return the NVLink domain of a worker's GPUs, on the node of its rank 0; empty if there is none, or it isn't known."""
        seen = self._workers.get(worker)
        return "" if seen is None else domain_of_facts(seen.facts.gpus.visible_gpus)

    def _judge(self, node: str) -> Judgement | None:
        from dynamo_mpi.checks.spare_rules import compare

        starts = {name: worker.mark for name, worker in self._workers.items()}
        if self._compared.get(node, {}) == starts:
            return None
        self._compared[node] = starts
        mark, spare = self._spares[node]
        # of a file that was changed meanwhile, a worker that hasn't started since will read what others have by now
        files: dict[str, str] = {}
        for seen in sorted(self._workers.values(), key=lambda seen: seen.mark):
            files |= seen.facts.files
        problems: dict[str, str] = {}
        doubts: dict[str, str] = {}
        notes: list[str] = []
        for name, (_, facts) in self._workers.items():
            found = compare(facts._replace(files={path: files[path] for path in facts.files}), spare)
            notes += found.notes
            for reasons, kept in ((found.problems, problems), (found.files, doubts)):
                if reasons:
                    kept[name] = "; ".join(reasons[:_MOST_SHOWN])
        return Judgement(problems, doubts, tuple(dict.fromkeys(notes)), max(starts.values()) >= mark)

    def _read_workers(self) -> None:
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._folder / "ready"):
                name, dot, end = entry.name.rpartition(".")
                known = self._workers.get(name)
                # others are being written
                if not name or dot + end != ".json" or (known is not None and known.mark == _mark(entry)):
                    continue
                if (seen := _read(Path(entry.path), "node")) is not None:
                    self._workers[name] = seen

    def _file(self, node: str) -> Path:
        return self._folder / SPARES / f"{node}.json"


def _mark(path: os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(path, follow_symlinks=False)
    return status.st_mtime_ns, status.st_ino


def _read(path: Path, member: str = "") -> _Seen | None:
    """Read a file, or a member of it; None if it isn't there, or is something else."""
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError):
        mark, content = _mark(path), json.loads(read_own(path))
        return _Seen(mark, NodeFacts.of(content[member] if member else content))
    return None
