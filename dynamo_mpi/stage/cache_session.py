# SPDX-License-Identifier: Apache-2.0
"""A rank's side of compile caches: a folder of its own on its node, seeded from an archive, removed at the end.

Either all ranks are seeded, or none is: TensorRT-LLM's autotuner is collective where it tunes, so that ranks with and without what an earlier
start has tuned would wait for each other. Nothing here ends a worker: at worst it compiles, as without.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.claimed_folder import ClaimedFolder, claim
from dynamo_mpi.common.folder_walk import reason
from dynamo_mpi.common.process import host_name
from dynamo_mpi.common.subprocess import ManagedProcess, Streams
from dynamo_mpi.layout.format import gib
from dynamo_mpi.stage.cache_store import Part
from dynamo_mpi.stage.compile_caches import assign
from dynamo_mpi.stage.file_system import file_system_type, free_bytes, is_shared
from dynamo_mpi.stage.session import package_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableMapping, Sequence

    from dynamo_mpi.mpi.world import World

SEED_SECONDS, SAVE_SECONDS = 120.0, 600.0
"""How long a rank may take to unpack its part, and to write it back."""
_ROOM = 1 << 30
_WORKSPACE = "FLASHINFER_WORKSPACE_BASE"


class CachePlan(NamedTuple):
    """What to do, the same on all ranks.

    Args:
        name: the archive's name.
        bases: folders of which each rank takes the first that is good, for its own.
        source: the archive's folder; empty for none.
        parts: its files, by rank.
        target: the folder to which new files are written; empty for none.
    """

    name: str
    bases: tuple[str, ...]
    source: str = ""
    parts: tuple[Part, ...] = ()
    target: str = ""

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
    """

    seeded: bool
    problems: tuple[str, ...]
    files: int
    size: int
    seconds: float
    is_second: bool


class CacheSession:
    """One rank's compile caches, from `begin` to `remove`.

    Args:
        rank: this rank.
        plan: what to do.
        environ: its environment, which gets the variables.
        on_folder: called with the folder, which must be removed if this process is killed.

    Attributes:
        writes: whether new files are written back; the same on all ranks after `finish`.
    """

    def __init__(
        self, rank: int, plan: CachePlan, environ: MutableMapping[str, str], on_folder: Callable[[str], object]
    ) -> None:
        self._rank, self._plan, self._environ, self._on_folder = rank, plan, environ, on_folder
        self._folder: ClaimedFolder | None = None
        self._helper: HelperCall | None = None
        self._problem = ""
        self._lock = threading.Lock()
        self._is_over = False
        self.writes = bool(plan.target)

    def begin(self) -> None:
        """Claim a folder, and start to unpack. Not collective; takes as long as looking at the folder."""
        base, problem = pick_base(self._plan.bases)
        try:
            if not base:
                raise OSError(0, problem)
            self._folder = claim(base, f"{self._plan.name}-r{self._rank}")
        except OSError as error:
            self._problem = f"no folder for compile caches: {reason(error)}"
            return
        self._on_folder(self._folder.path)
        if self._plan.parts:
            request = {"do": "seed", "source": self._plan.source, "part": list(self._plan.parts[self._rank])}
            self._helper = HelperCall({**request, "folder": self._folder.path}, self._environ)

    def finish(self, world: World) -> Seeding | None:
        """Wait until this rank is seeded, and agree with the others. Collective. Then the variables are set.

        Returns:
            On rank 0, how it went.
        """
        mine: dict[str, Any] = {"slot": self._folder.slot if self._folder else 0}
        if self._problem:
            mine["problem"] = self._problem
        elif self._helper is not None:
            mine |= self._helper.result(SEED_SECONDS)
        if "problem" in mine:
            mine["problem"] = f"{host_name()}: {mine['problem']}"
        answers = [json.loads(answer) for answer in world.gather(json.dumps(mine).encode())]
        seeding: Seeding | None = None
        decided = b""
        if world.rank == 0:
            seeding = _judge(answers, bool(self._plan.parts))
            # FlashInfer's files are good for one path: the worker that has the usual one on its nodes writes them
            decided = bytes([seeding.seeded, self.writes and not seeding.is_second])
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
            if self._folder is None or self._is_over:
                return {"problem": self._problem or "it has ended"}
            request = {"do": "save", "folder": self._folder.path, "target": self._plan.target}
            self._helper = helper = HelperCall(request, self._environ)
        return helper.result(SAVE_SECONDS)

    @property
    def is_over(self) -> bool:
        """Whether `remove` has been called."""
        return self._is_over

    def remove(self) -> None:
        """End what still runs, and remove the folder. Idempotent; does not raise."""
        with self._lock:
            self._is_over = True
        if self._helper is not None:
            self._helper.cancel()
        if self._folder is not None:
            self._folder.remove()

    def _set_up(self, *, seeded: bool) -> None:
        if self._folder is None:
            return
        if not seeded and self._helper is not None and not self._helper.cancel():
            # it hangs in the kernel, and would go on to write into the folder
            return
        assignment = assign(self._folder.path, self._environ)
        try:
            if not seeded:
                self._folder.clear()
            for folder in assignment.folders:
                os.makedirs(folder, 0o700, exist_ok=True)
        except OSError:
            return
        self._environ.update(assignment.variables)
        home = self._environ.get("HOME") or os.path.expanduser("~")
        if _WORKSPACE in assignment.variables and os.path.isdir(
            cubins := os.path.join(home, ".cache/flashinfer/cubins")
        ):
            # downloaded, not compiled: a node without a way out has no others
            self._environ.setdefault("FLASHINFER_CUBIN_DIR", cubins)


class HelperCall:
    """One request to a helper process of its own.

    Args:
        request: the request.
        environ: this process's environment.
    """

    def __init__(self, request: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self._process: ManagedProcess | None = None
        self._problem = "the helper process has ended without an answer"
        try:
            self._process = process = ManagedProcess(
                "compile caches",
                [sys.executable, "-m", "dynamo_mpi.stage.cache_helper"],
                environment={**environ, "PYTHONPATH": package_path(environ)},
                streams=Streams(subprocess.PIPE, subprocess.PIPE),
                end_with=signal.SIGTERM,
            )
            if process.popen.stdin is not None:
                with contextlib.suppress(OSError), process.popen.stdin as stdin:
                    stdin.write(json.dumps(request).encode() + b"\n")
        except OSError as error:
            self._problem = f"no process can be started: {error.strerror}"

    def result(self, seconds: float) -> dict[str, Any]:
        """Return the answer; a ``problem`` if there is none within ``seconds``."""
        process = self._process
        if process is None or process.popen.stdout is None:
            return {"problem": self._problem}
        lines: list[bytes] = []
        reading = threading.Thread(target=lambda: lines.extend(process.popen.stdout or ()), daemon=True)
        reading.start()
        reading.join(seconds)
        if reading.is_alive():
            self.cancel()
            return {"problem": f"no answer within {seconds:g} s: the shared file system may hang"}
        process.wait(1.0)
        try:
            answer = json.loads(lines[-1])
            return answer if isinstance(answer, dict) else {"problem": self._problem}
        except (IndexError, ValueError):
            return {"problem": self._problem}

    def cancel(self, seconds: float = 1.0) -> bool:
        """End the process, which removes what it has written in part; return whether it has ended."""
        if self._process is None:
            return True
        self._process.send(signal.SIGTERM)
        return self._process.wait(seconds) or self._process.kill(seconds)


def pick_base(bases: Sequence[str]) -> tuple[str, str]:
    """Return the first folder of a disk of this node that has room and from which code can be loaded; otherwise why each is none."""
    problems = []
    for base in bases:
        try:
            os.makedirs(base, 0o700, exist_ok=True)
            kind = file_system_type(base)
            if is_shared(kind):
                problems.append(f"{base} is on a shared file system ({kind})")
            elif os.statvfs(base).f_flag & os.ST_NOEXEC:
                problems.append(f"{base} is mounted noexec")
            elif (free := free_bytes(base)) < _ROOM:
                problems.append(f"{base} has too little room: {gib(free)} of {gib(_ROOM)}")
            else:
                return base, ""
        except OSError as error:
            problems.append(f"{base}: {error.strerror}")
    return "", "; ".join(problems)


def _judge(answers: Sequence[Mapping[str, Any]], had_archive: bool) -> Seeding:
    problems = tuple(dict.fromkeys(str(answer["problem"]) for answer in answers if "problem" in answer))
    return Seeding(
        had_archive and not problems,
        problems,
        max((int(answer.get("files", 0)) for answer in answers), default=0),
        sum(int(answer.get("bytes", 0)) for answer in answers),
        max((float(answer.get("seconds", 0.0)) for answer in answers), default=0.0),
        any(answer.get("slot") for answer in answers),
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
    return [results.get(rank, {"problem": f"rank {rank} has not answered"}) for rank in range(size)]
