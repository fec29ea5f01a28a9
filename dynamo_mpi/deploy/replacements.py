# SPDX-License-Identifier: Apache-2.0
"""Takes nodes out of a running deployment by request (`dynamo-mpi replace NODE`): the node's worker drains, and starts again on a spare.

Where the role has another worker, it drains only while that one serves; without a spare too, and then isn't started again.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from dynamo_mpi.deploy.recovery import Degrade, MoveToSpare

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_mpi.deploy.failures import FailureHandler
    from dynamo_mpi.deploy.nodes import Worker
    from dynamo_mpi.deploy.run_dir import RunDir
    from dynamo_mpi.deploy.workers import WorkerSet

WAITING, DRAINING, STARTING, DONE, REFUSED = "waiting", "draining", "starting", "done", "refused"
REASON = "taken out by request"
HEAD_NODE = "it is the head node: etcd, NATS and the frontend run there"
_NO_SPARE = "no spare node is left, and no other worker of its role serves"
# of the history
_MOST = 50


@dataclass(frozen=True)
class Replacement:
    """One request, and how far it is.

    Args:
        node: the node to take out.
        worker: the worker that uses it; empty if it is a spare.
        to: the spare that takes its place; empty for none.
        state: ``waiting`` for another worker of the role, ``draining``, ``starting``, ``done`` or ``refused``.
        reason: why it is refused, or what it waits for.
        time: when it was requested, in seconds since 1970.
    """

    node: str
    worker: str = ""
    to: str = ""
    state: str = WAITING
    reason: str = ""
    time: float = 0.0


class Replacements:
    """The requests to one deployment. Use it from the main thread.

    Args:
        failures: where the workers are.
        workers: drains and starts them.
        run_dir: has the requests.
        say: prints one line.
        seconds: the time that a worker has to drain.
    """

    def __init__(
        self,
        failures: FailureHandler,
        workers: WorkerSet,
        run_dir: RunDir,
        say: Callable[[str], None],
        seconds: float,
    ) -> None:
        self._failures, self._workers, self._run_dir, self._say, self._seconds = (
            failures,
            workers,
            run_dir,
            say,
            seconds,
        )
        self._requests: list[Replacement] = []

    def poll(self) -> None:
        """Take new requests, and go on with the open ones."""
        for node in self._run_dir.take_replace_requests():
            if any(each.node == node and each.state not in (DONE, REFUSED) for each in self._requests):
                continue  # repeated, after its time limit say: it has the open one's answers
            request = self._accept(Replacement(node, time=time.time()))
            self._requests = [*self._requests[-_MOST:], request]
            self._log_state(request)
        for place, request in enumerate(self._requests):
            if request.state not in (DONE, REFUSED):
                after = self._advance(request)
                if after != request:
                    self._requests[place] = after
                    if after.state != request.state:
                        self._log_state(after)

    def describe(self) -> list[dict[str, Any]]:
        """Return all requests as plain data."""
        return [asdict(request) for request in self._requests]

    def _accept(self, request: Replacement) -> Replacement:
        node, spares = request.node, self._failures.spares
        if node in {each.node for each in self._failures.excluded}:
            return replace(request, state=DONE, reason="it is left out already")
        if node in spares.available:
            spares.fail(node, REASON)
            return replace(request, state=DONE, reason="it was a spare")
        if node == self._failures.head:
            return replace(request, state=REFUSED, reason=HEAD_NODE)
        worker = next((each for each in self._failures.workers if node in each.nodes), None)
        if worker is None or not self._workers.lives(worker.name):
            return replace(request, state=REFUSED, reason="no worker and no spare of this deployment is there")
        request = replace(request, worker=worker.name)
        if why := self._workers.why_not_drained(worker.name):
            return replace(request, state=REFUSED, reason=f"{worker.name} can't drain: {why}")
        if not self._others(worker) and not self._failures.nearest_spares(worker.name, node):
            return replace(
                request, state=REFUSED, reason=f"{_NO_SPARE} while it is away{self._failures.unfit_spares(worker.name)}"
            )
        return request

    def _advance(self, request: Replacement) -> Replacement:
        worker = next(each for each in self._failures.workers if each.name == request.worker)
        if request.state in (WAITING, STARTING) and not self._workers.lives(worker.name):
            why = self._workers.given_up.get(worker.name, "it isn't started again")
            return replace(request, state=REFUSED, reason=f"{worker.name} has ended meanwhile: {why}")
        if request.state == WAITING:
            return self._begin(request, worker)
        if request.state == DRAINING and not self._workers.is_planned(worker.name):
            if request.node in worker.nodes and request.to:
                return replace(request, state=REFUSED, reason=f"{worker.name} failed meanwhile")
            return replace(request, state=STARTING if request.to else DONE)
        if request.state == STARTING and self._workers.serves(worker.name):
            return replace(request, state=DONE)
        return request

    def _begin(self, request: Replacement, worker: Worker) -> Replacement:
        if request.node not in worker.nodes:  # it has failed, and left the node, while the request waited
            return replace(request, state=DONE, reason="its worker has left it")
        if self._workers.is_planned(worker.name):  # another of its nodes is taken out
            return replace(request, reason=f"{worker.name} drains already")
        others = self._others(worker)
        if others and not any(self._workers.serves(name) for name in others):
            return replace(request, reason=f"until {' or '.join(others)} serves")
        if self._failures.is_open(worker.name):
            return replace(request, reason=f"{worker.name} has just failed")
        spares = self._failures.nearest_spares(worker.name, request.node)
        reasons = {request.node: REASON}
        if spares:
            move = MoveToSpare(((request.node, spares[0]),), 0.0, reasons)
            self._failures.spares.take(spares[0], worker.name)
            self._workers.plan(worker, move, self._seconds)
            return replace(request, state=DRAINING, to=spares[0], reason="")
        if not others:
            return replace(request, state=REFUSED, reason=f"{_NO_SPARE}{self._failures.unfit_spares(worker.name)}")
        reason = f"{request.node} was {REASON}, and no spare is left{self._failures.unfit_spares(worker.name)}"
        self._workers.plan(worker, Degrade(reason, reasons), self._seconds)
        return replace(request, state=DRAINING, reason="")

    def _others(self, worker: Worker) -> list[str]:
        workers = self._failures.workers
        same = [each.name for each in workers if each.role == worker.role and each.name != worker.name]
        return [name for name in same if self._workers.lives(name)]

    def _log_state(self, request: Replacement) -> None:
        to = f", {request.to} takes its place" if request.to else ""
        why = f" ({request.reason})" if request.reason else ""
        worker = f" of {request.worker}" if request.worker else ""
        self._say(f"replace {request.node}{worker}: {request.state}{to}{why}")
