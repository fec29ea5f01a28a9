# SPDX-License-Identifier: Apache-2.0
"""The process of a node that copies a model: ``python -m dynamo_mpi.stage.helper``, started by the node's first rank.

It is a process of its own, so that neither the ranks nor the node agent, which watches them, wait for a disk or the network. It gets one JSON
line on stdin, the secret in it, and writes JSON lines on stdout: how far the nodes are, and how it has ended. It ends with its rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.affinity import release
from dynamo_mpi.common.process import host_name, raise_nofile_limit_to_hard, set_process_title
from dynamo_mpi.stage.coordinator import CHANGED, FAILED, Coordinator
from dynamo_mpi.stage.manifest import Manifest, SourceChangedError, StageError
from dynamo_mpi.stage.member import Feeder, Place
from dynamo_mpi.stage.open_files import OpenFiles
from dynamo_mpi.stage.partial import PartialCopy
from dynamo_mpi.stage.store import State, Store
from dynamo_mpi.stage.transfer import Transfer
from dynamo_mpi.stage.wire import CONTROL, LineChannel, Listener, Peer, connect_to

if TYPE_CHECKING:
    from dynamo_mpi.stage.member import Member

TITLE = "dynamo_mpi: stages a model"
"""The process's title."""
DONE = "done"
"""How staging ends otherwise: this node has its copy."""
# each reader reads so many extents at least: if all were read at once, none would travel meanwhile
_ROUNDS = 4
_STREAMS = 4
_CONNECT_SECONDS = 20.0
_POLL_SECONDS = 0.1
_STATUS_SECONDS = 0.5
_DAMAGED_SECONDS = 5.0
_END_SECONDS = 10.0
_DISCARD_SECONDS = 60.0
_CANCELLED = "the worker has stopped"


class HelperPlan(NamedTuple):
    """What a node's helper is to do.

    Args:
        folder: where this node keeps copies.
        manifest: the model, from `Manifest.to_json`.
        lock: descriptor of the copy's lock.
        node: this node's number in the ring; -1 if it isn't in it: it has a copy, or waits for another worker's.
        ring: the nodes that copy; if ``fed``, before them one that has a copy.
        coordinator: where the coordinator listens.
        coordinates: whether that is this process.
        listener: descriptor of the listening socket.
        token: the secret of this world's helpers, hexadecimal.
        readers: how many extents a node reads at once.
        seconds: the time limit.
        digests: whether to read an earlier copy to check it.
        fed: whether the first node of the ring feeds the others from its copy.
    """

    folder: str
    manifest: str
    lock: int
    node: int
    ring: tuple[Peer, ...]
    coordinator: Peer
    coordinates: bool
    listener: int
    token: str
    readers: int
    seconds: float
    digests: bool = False
    fed: bool = False

    def to_json(self) -> str:
        """Encode it as one line."""
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, line: str) -> HelperPlan:
        """Decode the result of `to_json`."""
        members = json.loads(line)
        members["ring"] = tuple(Peer(*peer) for peer in members["ring"])
        return cls(**members | {"coordinator": Peer(*members["coordinator"])})


class Helper:
    """Copies one model for one node.

    Args:
        plan: what to do.
        write: called with each message for the rank.
    """

    def __init__(self, plan: HelperPlan, write: Any) -> None:
        self._plan, self._write = plan, write
        self._end = time.monotonic() + plan.seconds
        self._manifest = Manifest.from_json(plan.manifest)
        self._hosts = tuple(peer.host for peer in plan.ring)
        self._coordinator: Coordinator | None = None
        self._member: Member | None = None
        self._can_receive = threading.Event()
        self._is_cancelled = threading.Event()
        self._alone: Helper | None = None

    def run(self) -> dict[str, Any]:
        """Return how it has ended, for the rank."""
        plan, began = self._plan, time.monotonic()
        figures: dict[str, Any] = {}
        try:
            store = Store(plan.folder)
            leading: threading.Thread | None = None
            if plan.coordinates and plan.ring:
                self._coordinator = Coordinator(self._manifest, self._hosts, fed=plan.fed)
                leading = threading.Thread(target=self._lead, args=(self._coordinator,), name="lead", daemon=True)
                leading.start()
            self._require_wanted()
            if plan.node >= 0:
                figures = self._feed(store) if plan.fed and plan.node == 0 else self._copy(store)
            else:
                if self._coordinator is not None:
                    self._listen()
                figures = self._await_other(store)
            # a node that has its copy may still lead the others
            if leading is not None:
                leading.join()
        except SourceChangedError as error:
            return {"result": CHANGED, "text": str(error)}
        except StageError as error:
            return {"result": FAILED, "text": str(error)}
        except OSError as error:
            return {"result": FAILED, "text": f"the staging process has failed: {error}"}
        finally:
            # the other nodes must get the reason before their connection to this process closes
            if self._coordinator is not None:
                self._coordinator.join(_END_SECONDS)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "result": DONE,
            "seconds": round(time.monotonic() - began, 3),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
            "memory_bytes": usage.ru_maxrss << 10,
            **figures,
        }

    def cancel(self) -> None:
        """Let `run` fail soon, which removes what has been copied; called by another thread."""
        self._is_cancelled.set()
        if self._alone is not None:
            self._alone.cancel()
        if self._member is not None:
            self._member.close()
        if self._coordinator is not None:
            self._coordinator.fail(FAILED, _CANCELLED)

    def _require_wanted(self) -> None:
        if self._is_cancelled.is_set():
            raise StageError(_CANCELLED)

    def _lead(self, coordinator: Coordinator) -> None:
        limit = threading.Timer(max(0.0, self._end - time.monotonic()), self._late, (coordinator,))
        limit.daemon = True
        limit.start()
        reporting = threading.Thread(target=self._report, args=(coordinator, limit), name="report", daemon=True)
        reporting.start()
        coordinator.run()
        limit.cancel()

    def _late(self, coordinator: Coordinator) -> None:
        status = coordinator.status()
        coordinator.fail(
            FAILED, f"not all nodes have the model within {self._plan.seconds:g} s; the slowest is {status.slowest}"
        )

    def _report(self, coordinator: Coordinator, until: threading.Timer) -> None:
        while not until.finished.wait(_STATUS_SECONDS):
            self._write({"status": list(coordinator.status())})

    def _admit(self, node: int, number: int, stream: socket.socket) -> None:
        if number == CONTROL and self._coordinator is not None:
            self._coordinator.attach(node, LineChannel(stream))
            return
        # making room may take minutes
        self._can_receive.wait(max(0.0, self._end - time.monotonic()))
        member = self._member
        is_predecessor = number < _STREAMS and node == (self._plan.node - 1) % len(self._hosts)
        if is_predecessor and isinstance(member, Transfer):
            member.add_incoming(stream, first=number == 0)
        else:
            stream.close()

    def _copy(self, store: Store) -> dict[str, Any]:
        """Copy the model together with the other nodes of the ring."""
        plan, channel = self._plan, self._connect()
        try:
            removed = store.make_room(self._manifest.size, self._manifest.folder_name)
            copy = PartialCopy(store, self._manifest)
        except StageError as error:
            channel.send(FAILED, str(error))
            raise
        try:
            transfer = Transfer(self._place(), self._manifest, copy, channel)
            self._take_part(transfer, channel)
            copy.publish(transfer.digests())
        except BaseException:
            copy.discard()
            raise
        finally:
            channel.close()
        store.share(plan.lock)
        return {**transfer.figures(), "removed": removed}

    def _feed(self, store: Store) -> dict[str, Any]:
        """Send this node's copy to the others."""
        channel = self._connect()
        try:
            marker = store.read_marker(self._manifest.folder_name)
            files = OpenFiles(store.copy_path(marker.folder_name), marker, os.O_RDONLY | os.O_NOFOLLOW)
            feeder = Feeder(self._place(), marker, files, channel)
            self._take_part(feeder, channel)
        finally:
            channel.close()
        return feeder.figures()

    def _place(self) -> Place:
        plan = self._plan
        most = len(self._manifest.extents()) // (_ROUNDS * max(1, len(self._hosts)))
        return Place(plan.node, self._hosts, max(1, min(plan.readers, most)), plan.fed, plan.coordinator.host)

    def _take_part(self, member: Member, channel: LineChannel) -> None:
        """Copy, or feed the others, until all nodes of the ring have a copy that can be published.

        Raises:
            StageError: it has ended otherwise.
        """
        plan, place = self._plan, self._place()
        self._member = member
        self._can_receive.set()
        try:
            self._require_wanted()
            if place.successor != plan.node:
                # in a thread: if staging ends meanwhile, this node doesn't wait for a successor that has ended
                member.run(self._connect_to_successor, member, plan.ring[place.successor])
            member.start()
            end = member.wait(self._end + _END_SECONDS - time.monotonic())
        except StageError as error:
            channel.send(FAILED, str(error))
            raise
        finally:
            member.close()
        if end[0] != "publish":
            raise (SourceChangedError if end[0] == CHANGED else StageError)(end[1])

    def _connect_to_successor(self, member: Member, successor: Peer) -> None:
        for number in range(_STREAMS):
            stream = connect_to(successor, self._plan.token, self._plan.node, number, _CONNECT_SECONDS)
            member.add_outgoing(stream, first=number == 0)

    def _connect(self) -> LineChannel:
        """Accept the other nodes, and connect to the coordinator."""
        plan = self._plan
        if plan.listener >= 0:
            self._listen()
        if self._coordinator is None:
            return LineChannel(connect_to(plan.coordinator, plan.token, plan.node, CONTROL, _CONNECT_SECONDS))
        ours, its = socket.socketpair()
        self._coordinator.attach(plan.node, LineChannel(its))
        return LineChannel(ours)

    def _listen(self) -> None:
        Listener(socket.socket(fileno=self._plan.listener), self._plan.token, self._admit)

    def _await_other(self, store: Store) -> dict[str, Any]:
        """Wait for the copy that another worker makes; make one for this node alone if that worker ends without one."""
        plan, damaged_since = self._plan, 0.0
        while (state := store.take(plan.lock, self._manifest, digests=plan.digests)) is State.BUSY:
            self._require_wanted()
            now = time.monotonic()
            if now > self._end:
                raise StageError(f"another worker on this node has not copied the model within {plan.seconds:g} s")
            is_damaged = os.path.lexists(store.copy_path(self._manifest.folder_name))
            damaged_since = (damaged_since or now) if is_damaged else 0.0
            if is_damaged and now - damaged_since > _DAMAGED_SECONDS:
                raise StageError(
                    f"{store.copy_path(self._manifest.folder_name)} has been changed, and other workers use it"
                )
            time.sleep(_POLL_SECONDS)
        if state is State.COMPLETE:
            return {}
        damaged = {"damaged": host_name()} if plan.digests and store.is_damaged(self._manifest) else {}
        alone = plan._replace(node=0, ring=(Peer(host_name(), "", 0),), coordinates=True, listener=-1, fed=False)
        own = self._alone = Helper(alone._replace(seconds=max(0.0, self._end - time.monotonic())), self._write)
        self._require_wanted()
        result = own.run()
        if result["result"] != DONE:
            raise (SourceChangedError if result["result"] == CHANGED else StageError)(result["text"])
        return {name: result[name] for name in ("read_bytes", "received_bytes", "sent_bytes", "removed")} | damaged


def main() -> None:
    """Run as a node's helper."""
    set_process_title(TITLE)
    raise_nofile_limit_to_hard()
    for number in (signal.SIGINT, signal.SIGTERM):
        # sent to all processes of a terminal or step: its rank decides, and closes the pipe
        signal.signal(number, signal.SIG_IGN)
    # its rank is often bound to some CPUs
    release()
    plan = HelperPlan.from_json(sys.stdin.readline())
    lock = threading.Lock()

    def write(message: dict[str, Any]) -> None:
        with lock, contextlib.suppress(OSError):
            os.write(1, json.dumps(message).encode() + b"\n")

    helper = Helper(plan, write)
    threading.Thread(target=_end_with_rank, args=(helper,), daemon=True).start()
    write(helper.run())
    os._exit(0)


def _end_with_rank(helper: Helper) -> None:
    sys.stdin.read()
    helper.cancel()
    time.sleep(_DISCARD_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
