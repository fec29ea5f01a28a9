# SPDX-License-Identifier: Apache-2.0
"""A rank's side of staging. All ranks begin and finish it together; the first rank of each node has a helper process do the work meanwhile.

Staging never ends a worker because it isn't possible: then all ranks load from the original folder. It does if the model changes meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.errors import DynamoMpiError, RetryableError
from dynamo_mpi.common.folder_walk import reason
from dynamo_mpi.common.host_address import host_address
from dynamo_mpi.common.ports import LOOPBACK
from dynamo_mpi.common.process import host_name, package_path
from dynamo_mpi.common.subprocess import ManagedProcess, Streams
from dynamo_mpi.layout.format import gib
from dynamo_mpi.stage.coordinator import CHANGED, FAILED, Status
from dynamo_mpi.stage.helper import DONE, HelperPlan
from dynamo_mpi.stage.manifest import Manifest, StageError
from dynamo_mpi.stage.site import problem_of
from dynamo_mpi.stage.store import State, Store
from dynamo_mpi.stage.wire import Peer
from dynamo_mpi.supervisor.heartbeat_protocol import TOKEN_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.mpi.world import World
    from dynamo_mpi.stage.plan import StagePlan

SETTING = "--stage (DYN_MPI_STAGE)"
MEMORY_COST = "in memory, where it counts against the job's limit, and on GB200 against the KV cache"
_BUSY_SECONDS, _POLL_SECONDS = 0.5, 0.02
GRACE_SECONDS = 15.0
"""How long after the time limit a helper that doesn't answer is killed: it ends by itself before, and removes what it has copied."""
_CANCEL_SECONDS = 10.0


class Outcome(NamedTuple):
    """How staging has ended.

    Args:
        path: the folder of the copy, the same on all nodes; empty to load from the original folder.
        problem: why the original folder is used, on rank 0.
        figures: what it took, on rank 0: for the log and the worker record.
    """

    path: str = ""
    problem: str = ""
    figures: Mapping[str, Any] = {}


class Staging:
    """One staging, from `begin` to `finish`.

    Args:
        world: all ranks.
        plan: what to stage.
        on_status: called on rank 0 with how far the nodes are, twice a second, in a thread.
    """

    def __init__(self, world: World, plan: StagePlan, on_status: Callable[[Status], object] = lambda _: None) -> None:
        self._world, self._plan, self._on_status = world, plan, on_status
        self._manifest = Manifest.from_json(plan.manifest)
        self._began = time.monotonic()
        self._lock = -1
        self._store: Store | None = None
        self._mark = ""
        self._listener: socket.socket | None = None
        self._process: ManagedProcess | None = None
        self._reader: threading.Thread | None = None
        self._result: dict[str, Any] = {}
        self._path = self._problem = ""
        self._in_memory = False
        self.awaited: tuple[str, ...] = ()
        """The nodes, after `begin` on a node's first rank, on which another worker copies the model: this one waits for it."""

    def begin(self) -> None:
        """Agree on which nodes copy, and start. Collective; takes as long as looking at the copies on the slowest node."""
        is_first = self._world.rank in self._plan.firsts
        mine = self._prepare() if is_first else {}
        arranged = self._agree(mine, self._arrange)
        if len(self._plan.firsts) > 1 and "problem" not in arranged:
            # before anything is written or removed: all nodes have their marks now, and keep them until all have looked
            arranged |= self._agree(self._look_for(arranged["marks"]) if is_first else {}, self._first_problem)
        if self._store is not None:
            self._store.unmark(self._mark)
            self._store.close()
        self._problem = arranged.get("problem", "")
        if not is_first or self._problem:
            self._release()
            return
        self.awaited = tuple(arranged["awaited"])
        state = State(mine["state"])
        ring = {rank: Peer(*peer) for rank, peer in arranged["ring"]}
        node = list(ring).index(self._world.rank) if self._world.rank in ring else -1
        coordinates = self._world.rank == 0 and bool(ring)
        if state is State.COMPLETE and node < 0 and not self._plan.digests and not coordinates:
            self._result = {"result": DONE}
        else:
            self._start(node, tuple(ring.values()), arranged)
        if self._listener is not None:
            self._listener.close()

    def _agree(
        self, mine: Mapping[str, Any], decide: Callable[[Mapping[int, dict[str, Any]]], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return what rank 0 decides by the answers of the nodes' first ranks. Collective."""
        answers = self._world.gather(json.dumps(mine).encode())
        decided = b""
        if self._world.rank == 0:
            decided = json.dumps(decide({rank: json.loads(answers[rank]) for rank in self._plan.firsts})).encode()
        agreed: dict[str, Any] = json.loads(self._world.broadcast(decided))
        return agreed

    def finish(self) -> Outcome:
        """Wait until the nodes have their copies, and decide on rank 0. Collective; then rank 0 sends its decision, see `accept`.

        Raises:
            RetryableError: on rank 0: the model has changed meanwhile. The other ranks still wait for a message.
        """
        mine = self._await() if self._world.rank in self._plan.firsts and not self._problem else {}
        answers = [json.loads(answer) for answer in self._world.gather(json.dumps(mine).encode())]
        if self._world.rank:
            return Outcome()
        results = [(rank, answers[rank]) for rank in self._plan.firsts if answers[rank]]
        for kind in (CHANGED, FAILED):
            for _, result in results:
                if result["result"] != kind:
                    continue
                if kind == CHANGED:
                    raise RetryableError(
                        result["text"],
                        expected="a model that stays as it is while a worker starts",
                        fix="start the worker again when nothing writes to the model's folder any more",
                    )
                self._problem = self._problem or result["text"]
        if self._problem:
            self._release()
            return Outcome(problem=self._problem)
        return Outcome(self._path, figures=self._figures([result for _, result in results]))

    def accept(self, path: str) -> None:
        """Note what rank 0 has decided, on the other ranks: the folder of the copy, or an empty path to load from the original folder."""
        if not path:
            self._release()

    def cancel(self, seconds: float = _CANCEL_SECONDS) -> None:
        """End the helper, which removes what it has copied in ``seconds`` at most; the other ranks aren't waited for. Idempotent."""
        if self._process is None or self._process.exit_code() is not None:
            return
        if self._process.popen.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.popen.stdin.close()
        self._process.wait(seconds)
        self._process.kill()

    # the first rank of a node

    def _prepare(self) -> dict[str, Any]:
        """Look at this node's copy, and listen if it must be made."""
        if self._plan.auto and (unfit := problem_of(self._plan.folder)):
            return {"problem": f"{host_name()}: {self._plan.folder} {unfit}"}
        try:
            store = self._store = Store(self._plan.folder)
            self._lock = store.open_lock(self._manifest.folder_name)
            self._path = store.copy_path(self._manifest.folder_name)
            end = time.monotonic() + _BUSY_SECONDS
            # a lock may also be held for a moment by a process that looks at it
            while (state := store.take(self._lock, self._manifest)) is State.BUSY and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
            self._in_memory = store.in_memory
            answer: dict[str, Any] = {"host": host_name(), "state": state.value, "path": self._path}
            # what is to be checked first feeds no other node
            answer["feeds"] = state is State.COMPLETE and not self._plan.digests and store.can_feed(self._manifest)
            if len(self._plan.firsts) > 1 and (state is State.MISSING or self._world.rank == 0):
                address = host_address(self._plan.network or None, "--liveness-network (DYN_MPI_LIVENESS_NETWORK)")
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                try:
                    self._listener = socket.create_server((address, 0), family=family, backlog=128)
                except OSError as error:
                    raise StageError(f"no other node can reach this one: {error.strerror or error}") from None
                answer |= {"address": address, "port": self._listener.getsockname()[1]}
            if len(self._plan.firsts) > 1:
                self._mark = store.mark()
                answer["mark"] = self._mark
        except (StageError, DynamoMpiError) as error:
            return {"problem": f"{host_name()}: {error}"}
        except OSError as error:
            return {"problem": f"{host_name()}: {self._plan.folder} can't be used: {reason(error)}"}
        return answer

    def _look_for(self, marks: Mapping[str, str]) -> dict[str, Any]:
        """Return a problem if another node's mark is in this node's folder.

        Args:
            marks: the hosts, by their marks.
        """
        for mark, host in marks.items():
            if mark != self._mark and self._store is not None and self._store.has_mark(mark):
                return {
                    "problem": f"{self._plan.folder} is the same folder on {host_name()} and {host}, not on a disk of each node"
                }
        return {}

    @staticmethod
    def _first_problem(answers: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
        return next((answer for answer in answers.values() if answer), {})

    def _arrange(self, nodes: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
        """Return which nodes copy, on rank 0."""
        for answer in nodes.values():
            if "problem" in answer:
                return {"problem": answer["problem"]}
        first = nodes[0]
        for answer in nodes.values():
            if answer["path"] != first["path"]:
                problem = f"the copy would be {answer['path']} on {answer['host']}, {first['path']} on {first['host']}"
                return {"problem": problem}

        def peer(answer: Mapping[str, Any]) -> list[Any]:
            return [answer["host"], answer.get("address", LOOPBACK), answer.get("port", 0)]

        ring = [[rank, peer(answer)] for rank, answer in nodes.items() if answer["state"] == State.MISSING.value]
        # one is enough: each node sends as much as it gets
        feeders = [[rank, peer(answer)] for rank, answer in nodes.items() if answer["feeds"]]
        feeder = feeders[:1] if ring else []
        marks = {answer["mark"]: answer["host"] for answer in nodes.values() if "mark" in answer}
        token = secrets.token_hex(TOKEN_BYTES)
        awaited = [answer["host"] for answer in nodes.values() if answer["state"] == State.BUSY.value]
        arranged = {"ring": feeder + ring, "fed": bool(feeder), "coordinator": peer(first), "token": token}
        return arranged | {"marks": marks, "awaited": awaited}

    def _start(self, node: int, ring: tuple[Peer, ...], arranged: Mapping[str, Any]) -> None:
        plan = self._plan
        listener = -1 if self._listener is None else self._listener.fileno()
        coordinates = self._world.rank == 0 and bool(ring)
        own = HelperPlan(
            plan.folder,
            plan.manifest,
            self._lock,
            node,
            ring,
            Peer(*arranged["coordinator"]),
            coordinates,
            listener if len(ring) > 1 or coordinates else -1,
            arranged["token"],
            plan.readers,
            plan.seconds,
            plan.digests,
            arranged["fed"],
        )
        inherited = tuple(number for number in (self._lock, own.listener) if number >= 0)
        try:
            self._process = ManagedProcess(
                "the staging process",
                [sys.executable, "-m", "dynamo_mpi.stage.helper"],
                environment={**os.environ, "PYTHONPATH": package_path(os.environ)},
                streams=Streams(subprocess.PIPE, subprocess.PIPE, inherited=inherited),
            )
        except OSError as error:
            self._result = {"result": FAILED, "text": f"no process can be started: {error.strerror}"}
            return
        stdin, stdout = self._process.popen.stdin, self._process.popen.stdout
        if stdin is not None and stdout is not None:  # as pipes were asked for
            with contextlib.suppress(OSError):
                stdin.write(own.to_json().encode() + b"\n")
                stdin.flush()
            self._reader = threading.Thread(target=self._read, args=(stdout,), name="stage", daemon=True)
            self._reader.start()

    def _read(self, stdout: IO[bytes]) -> None:
        for line in stdout:
            message = json.loads(line)
            if "status" in message:
                self._on_status(Status(*message["status"]))
            else:
                self._result = message

    def _await(self) -> dict[str, Any]:
        """Return how this node's helper has ended."""
        if self._reader is not None and self._process is not None:
            self._reader.join(max(0.0, self._began + self._plan.seconds + GRACE_SECONDS - time.monotonic()))
            self._process.kill()
        host = host_name()
        if not self._result:
            code = self._process.exit_code() if self._process is not None else None
            return {"result": FAILED, "text": f"{host}: the staging process has ended with code {code}"}
        if self._result["result"] == FAILED and host not in self._result["text"]:
            return {**self._result, "text": f"{host}: {self._result['text']}"}
        return self._result

    def _figures(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        copied = [result for result in results if result.get("read_bytes", 0) or result.get("received_bytes", 0)]
        damaged = [result["damaged"] for result in results if "damaged" in result]
        return ({"damaged": damaged} if damaged else {}) | {
            "path": self._path,
            "bytes": self._manifest.size,
            "in_memory": self._in_memory,
            "nodes": len(results),
            "nodes_copied": len(copied),
            "read_bytes": sum(result["read_bytes"] for result in copied),
            "seconds": round(time.monotonic() - self._began, 3),
            "helper_memory_bytes": max((result.get("memory_bytes", 0) for result in results), default=0),
        }

    def _release(self) -> None:
        """Let go of this node's copy: nothing uses it."""
        if self._listener is not None:
            self._listener.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def describe(figures: Mapping[str, Any]) -> str:
    """Describe how staging has ended, in one line."""
    size, seconds = gib(figures["bytes"]), figures["seconds"]
    several = figures["nodes"] > 1
    nodes = f"{figures['nodes']} node{'s' if several else ''}"
    cost = f", {MEMORY_COST}" if figures["in_memory"] else ""
    if not figures["nodes_copied"]:
        return f"stage: {nodes} had the model already ({size}) in {figures['path']}{cost}"
    return (
        f"stage: {nodes} {'have' if several else 'has'} the model ({size}) in {figures['path']}{cost}, after {seconds:.1f} s; "
        f"{gib(figures['read_bytes'])} were read from its own folder"
    )


def describe_status(status: Status, rate: float) -> str:
    """Describe how far the nodes are.

    Args:
        status: how far they are.
        rate: bytes that the slowest node gets each second.
    """
    left = f", {(status.total - status.have) / rate:.0f} s left" if rate > 0 else ""
    return (
        f"stage {status.have / 2**30:.1f}/{gib(status.total)}, {rate / 2**30:.2f} GiB/s, slowest {status.slowest}{left}"
    )
