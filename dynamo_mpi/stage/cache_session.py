# SPDX-License-Identifier: Apache-2.0
"""A rank's side of compile caches: a folder of its own on its node, seeded from an archive, removed at the end.

Either all ranks are seeded, or none is: TensorRT-LLM's autotuner is collective where it tunes, so that ranks with and without what an earlier
start has tuned would wait for each other. Nothing here ends a worker: at worst it compiles, as without.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.claimed_folder import ClaimedFolder
from dynamo_mpi.common.process import host_name
from dynamo_mpi.layout.format import gib
from dynamo_mpi.mpi.placement import spans
from dynamo_mpi.stage.cache_call import HelperCall, Problem
from dynamo_mpi.stage.cache_folder import ROOM, claim_folder
from dynamo_mpi.stage.cache_store import Part
from dynamo_mpi.stage.compile_caches import assign
from dynamo_mpi.stage.file_system import file_system_type, is_in_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableMapping, Sequence

    from dynamo_mpi.mpi.world import World

SEED_SECONDS, SAVE_SECONDS = 120.0, 600.0
"""How long a rank may take to unpack its part, and to write it back."""
_NODE_FOLDER = f"on each node a folder of this user's, on a disk of the node with {gib(ROOM)} free for each rank, not mounted noexec"
_NODE_FOLDER_FIX = "name one with --stage or TMPDIR"
_ENDED = Problem("it has ended", "a worker that runs", "none needed")
_HELD = Problem(
    "the process that reads the archive can't be ended",
    "a shared file system that answers",
    "look whether files in the folder of --cache can be read on that node",
)
_LATE = Problem(
    "", f"an answer of each rank within {SAVE_SECONDS:g} s", "look at the shared file system on that rank's node"
)
_WORKSPACE = "FLASHINFER_WORKSPACE_BASE"


class CachePlan(NamedTuple):
    """What to do, the same on all ranks.

    Args:
        name: the archive's name.
        bases: folders of which each rank takes the first that is good, for its own, see `claim_folder`.
        source: the archive's folder; empty for none.
        parts: its files, by rank.
        target: the folder to which new files are written; empty for none.
        worker: a name of the worker, of which ``source`` keeps that it starts with it.
    """

    name: str
    bases: tuple[str, ...]
    source: str = ""
    parts: tuple[Part, ...] = ()
    target: str = ""
    worker: str = ""

    def pack(self) -> str:
        """Encode it."""
        return json.dumps(self._asdict())

    @classmethod
    def unpack(cls, text: str) -> CachePlan:
        """Decode the result of `pack`."""
        members = json.loads(text)
        members["parts"] = tuple(Part(*part) for part in members["parts"])
        return cls(**members | {"bases": tuple(members["bases"])})


class Seeding(NamedTuple):
    """How the ranks were seeded, on rank 0.

    Args:
        seeded: whether they were.
        problems: what went wrong on ranks, with their hosts; each once.
        files: files of the rank that has the most.
        size: bytes of all ranks together.
        seconds: of the slowest rank.
        is_second: whether another worker on a node has the names of this one's folders.
        have_folders: whether all ranks have a folder.
        in_memory: how many ranks have theirs in memory.
    """

    seeded: bool
    problems: tuple[Problem, ...]
    files: int
    size: int
    seconds: float
    is_second: bool
    have_folders: bool
    in_memory: int


class CacheSession:
    """One rank's compile caches, from `begin` to `remove`.

    Args:
        rank: this rank.
        plan: what to do.
        environ: its environment, which gets the variables.
        on_folder: called with the folder, which must be removed if this process is killed.
        node_ranks: how many ranks this node has.

    Attributes:
        writes: whether new files are written back; the same on all ranks after `finish`.
    """

    def __init__(
        self,
        rank: int,
        plan: CachePlan,
        environ: MutableMapping[str, str],
        on_folder: Callable[[str], object],
        node_ranks: int = 1,
    ) -> None:
        self._node_ranks = node_ranks
        self._rank, self._plan, self._environ, self._on_folder = rank, plan, environ, on_folder
        self._folder: ClaimedFolder | None = None
        self._helper: HelperCall | None = None
        self._problem: Problem | None = None
        self._lock = threading.Lock()
        self._is_over = False
        self.writes = bool(plan.target)

    def begin(self) -> None:
        """Claim a folder, and start to unpack. Not collective; takes as long as looking at the folder."""
        name = f"{self._plan.name}-r{self._rank}"
        self._folder, problem = claim_folder(self._plan.bases, name, self._environ, self._node_ranks)
        if self._folder is None:
            self._problem = Problem(f"no folder for compile caches: {problem}", _NODE_FOLDER, _NODE_FOLDER_FIX)
            return
        self._on_folder(self._folder.path)
        if self._plan.parts:
            request: dict[str, Any] = {
                "do": "seed",
                "source": self._plan.source,
                "part": list(self._plan.parts[self._rank]),
            }
            request["ranks"] = self._node_ranks
            if self._rank == 0:
                request["worker"] = self._plan.worker
            self._helper = HelperCall({**request, "folder": self._folder.path}, self._environ)

    def finish(self, world: World) -> Seeding | None:
        """Wait until this rank is seeded, and agree with the others. Collective. Then the variables are set.

        Returns:
            On rank 0, how it went.
        """
        mine: dict[str, Any] = {"slot": self._folder.slot if self._folder else 0}
        if self._problem is not None:
            mine |= self._problem._asdict()
        elif self._helper is not None:
            mine |= self._helper.result(SEED_SECONDS)
        if self._folder is not None and "problem" not in mine:
            # before the ranks agree: afterwards one that fails would be the only one without tactics
            try:
                for path in assign(self._folder.path, self._environ).folders:
                    os.makedirs(path, 0o700, exist_ok=True)
            except OSError as error:
                mine |= Problem.of(error)._asdict()
        mine["folder"] = self._folder is not None
        with contextlib.suppress(OSError):
            mine["in_memory"] = self._folder is not None and is_in_memory(file_system_type(self._folder.path))
        if "problem" in mine:
            mine["problem"] = f"{host_name()}: {mine['problem']}"
        answers = [json.loads(answer) for answer in world.gather(json.dumps(mine).encode())]
        seeding: Seeding | None = None
        decided = b""
        if world.rank == 0:
            seeding = _judge(answers, bool(self._plan.parts))
            # FlashInfer's files are good for one path: the worker that has the usual one on its nodes writes them
            decided = bytes([seeding.seeded, self.writes and not seeding.is_second and seeding.have_folders])
        seeded, writes = world.broadcast(decided)
        self.writes = bool(writes)
        self._set_up(seeded=bool(seeded))
        return seeding

    def save(self) -> dict[str, Any]:
        """Write this rank's part of a new archive if something was compiled; return its part, and how many files are new. Takes long.

        Returns:
            ``part`` and ``new``; or ``problem``.
        """
        with self._lock:
            if self._folder is None or self._is_over or self._problem is not None:
                return (self._problem or _ENDED)._asdict()
            request = {"do": "save", "folder": self._folder.path, "target": self._plan.target}
            self._helper = helper = HelperCall(request, self._environ)
        return helper.result(SAVE_SECONDS)

    @property
    def is_over(self) -> bool:
        """Whether `end` has been called."""
        return self._is_over

    def end(self) -> None:
        """End what still runs. Idempotent; does not raise."""
        with self._lock:
            self._is_over = True
        if self._helper is not None:
            self._helper.cancel()

    def remove(self) -> None:
        """End what still runs, and remove the folder, which may take seconds. Idempotent; does not raise."""
        self.end()
        if self._folder is not None:
            self._folder.remove()

    def _set_up(self, *, seeded: bool) -> None:
        if self._folder is None:
            return
        assignment = assign(self._folder.path, self._environ)
        if not seeded:
            if self._helper is not None and not self._helper.cancel():
                # it hangs in the kernel, and would go on to write into the folder
                self._problem = _HELD
                return
            try:
                self._folder.clear()
                for folder in assignment.folders:
                    os.makedirs(folder, 0o700, exist_ok=True)
            except OSError as error:
                self._problem = Problem.of(error)
                return
        self._environ.update(assignment.variables)
        home = self._environ.get("HOME") or os.path.expanduser("~")
        if _WORKSPACE in assignment.variables and os.path.isdir(
            cubins := os.path.join(home, ".cache/flashinfer/cubins")
        ):
            # downloaded, not compiled: a node without a way out has no others
            self._environ.setdefault("FLASHINFER_CUBIN_DIR", cubins)


def _judge(answers: Sequence[Mapping[str, Any]], had_archive: bool) -> Seeding:
    problems = problems_in(answers)
    if had_archive and not problems and (problem := unlike_json(answers)):
        problems = (problem,)
    return Seeding(
        had_archive and not problems,
        problems,
        max((int(answer.get("files", 0)) for answer in answers), default=0),
        sum(int(answer.get("bytes", 0)) for answer in answers),
        max((float(answer.get("seconds", 0.0)) for answer in answers), default=0.0),
        any(answer.get("slot") for answer in answers),
        all(answer["folder"] for answer in answers),
        sum(bool(answer.get("in_memory")) for answer in answers),
    )


def problems_in(answers: Sequence[Mapping[str, Any]]) -> tuple[Problem, ...]:
    """Return the problems that ranks' answers have, each once."""
    return tuple(dict.fromkeys(found for answer in answers if (found := Problem.in_answer(answer)) is not None))


def unlike_json(answers: Sequence[Mapping[str, Any]]) -> Problem | None:
    """Return which ranks' parts lack tactics that others have, if any: seeded, the others would wait for them for ever."""
    every = {path for answer in answers for path in answer.get("json", ())}
    lack = [rank for rank, answer in enumerate(answers) if set(answer.get("json", ())) != every]
    if not lack:
        return None
    return Problem(
        f"{', '.join(sorted(every))} is missing or not whole on rank{'s'[: len(lack) > 1]} {spans(lack)}, not on the others",
        "tactics of the autotuner of all ranks, or of none",
        "none needed: kernels are compiled, and a later start writes an archive",
    )


def write_back(session: CacheSession, answer: Callable[[bytes], object]) -> None:
    """Write a rank's part in a thread, and call ``answer`` with the result for rank 0, unless nothing is to be written."""
    if not session.writes:
        return

    def run() -> None:
        answer(json.dumps(session.save()).encode())

    threading.Thread(target=run, name="caches", daemon=True).start()


def collect(
    size: int, own: Mapping[str, Any], others: Callable[[float], tuple[int, bytes] | None]
) -> list[dict[str, Any]]:
    """Return all ranks' results, in rank order; those of ranks that don't answer in time are problems.

    Args:
        size: ranks.
        own: rank 0's.
        others: returns the next rank's result, and the rank; None if there is none in the seconds that it gets.
    """
    results = {0: dict(own)}
    end = time.monotonic() + SAVE_SECONDS + 10.0
    while len(results) < size and (one := others(max(0.0, end - time.monotonic()))) is not None:
        rank, body = one
        with contextlib.suppress(ValueError):
            answer = json.loads(body)
            if isinstance(answer, dict) and 0 < rank < size:
                results[rank] = answer
    return [
        results.get(rank) or _LATE._replace(problem=f"rank {rank} has not answered")._asdict() for rank in range(size)
    ]
