# SPDX-License-Identifier: Apache-2.0
"""Answers workers' failures: has their nodes asked, decides, and keeps what follows: where each worker is, which nodes are left out."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.deploy.blame import HARDWARE_CHECK
from dynamo_mpi.deploy.excluded import ExcludedNode, exclude
from dynamo_mpi.deploy.recovery import (
    Degrade,
    FailureEvent,
    MoveToSpare,
    NodeHealth,
    RestartInPlace,
    Situation,
    Stop,
    decide,
    restarts_in_window,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.deploy.blame import Blame
    from dynamo_mpi.deploy.node_inquiry import Inquiry, NodeProber
    from dynamo_mpi.deploy.nodes import Placement, Worker
    from dynamo_mpi.deploy.recovery import Action
    from dynamo_mpi.deploy.run_dir import RunDir
    from dynamo_mpi.deploy.spares import SparePool


class _Case(NamedTuple):
    """A failure, until it is decided what follows.

    Args:
        event: the failure.
        found: its first cause.
        inquiry: asks the nodes; None if nothing depends on them.
        unfit: nodes that needn't be asked, as the driver has called a GPU broken, each with the reason.
    """

    event: FailureEvent
    found: Blame
    inquiry: Inquiry | None
    unfit: Mapping[str, str]


# of the history: an hour of failures in a row
_MOST_EVENTS = 1000


class FailureHandler:
    """Decides what follows each failure. Use it from the main thread.

    Args:
        placement: where the workers begin.
        max_restarts: starts of one worker in an hour after its first.
        spares: the spare nodes.
        prober: asks nodes.
        run_dir: gets ``excluded.json``.
        excluded: nodes that an earlier start of the job has left out.
    """

    def __init__(
        self,
        placement: Placement,
        max_restarts: int,
        spares: SparePool,
        prober: NodeProber,
        run_dir: RunDir,
        excluded: Sequence[ExcludedNode] = (),
    ) -> None:
        self._workers = {worker.name: worker for worker in placement.workers}
        self.head, self.max_restarts, self.spares, self.prober = placement.head, max_restarts, spares, prober
        self._run_dir, self._order = run_dir, placement.order
        self._excluded = list(excluded)
        self._events: list[FailureEvent] = []
        self._drained: set[str] = set()
        self._cases: dict[str, _Case] = {}
        # by worker, those of its nodes that were last choices, with the files that differ
        self._doubts: dict[str, dict[str, str]] = {}

    @property
    def workers(self) -> tuple[Worker, ...]:
        """The workers, each with the nodes that it has now."""
        return tuple(self._workers.values())

    @property
    def excluded(self) -> tuple[ExcludedNode, ...]:
        """Nodes that are left out for the rest of the job."""
        return tuple(self._excluded)

    @property
    def may_hang(self) -> bool:
        """Whether a worker's launcher may outlive its ranks: srun does with ``--no-kill``."""
        return self.prober.watch is not None

    @property
    def lost_head(self) -> str:
        """Why the head node is lost; empty if it isn't."""
        return self.prober.lost.get(self.head, "")

    def nearest_spares(self, worker: str, node: str, domain: str = "") -> tuple[str, ...]:
        """Return the spares that suit a worker, the best first.

        Args:
            worker: the worker.
            node: those near it come first.
            domain: before them, those of this NVLink domain, that of the worker's other nodes; empty for the one that it had before.
        """
        domain = domain or self.spares.domain_of(worker)
        fitting = tuple(spare for spare in self.spares.available if not self.spares.why_unfit(spare, worker))
        spares, domains = self.prober.order(fitting, node), self.spares.domains
        return tuple(sorted(spares, key=lambda spare: bool(domain) and domains.get(spare) != domain))

    def last_choices(self, worker: str) -> dict[str, str]:
        """Return the spares on which only files differ from those with which a worker has started, and which ones."""
        pool = self.spares
        doubts = {spare: pool.doubt(spare, worker) for spare in pool.available if not pool.problem(spare, worker)}
        return {spare: files for spare, files in doubts.items() if files}

    def unfit_spares(self, worker: str) -> str:
        """Return the spares that don't suit a worker, with the reasons, as the end of a sentence; empty for none."""
        reasons = {spare: self.spares.why_unfit(spare, worker) for spare in self.spares.available}
        unfit = [f"{spare} ({why})" for spare, why in reasons.items() if why]
        return f"; not fit for {worker}: {', '.join(unfit)}" if unfit else ""

    def look_at_nodes(self) -> list[str]:
        """Leave out spares that are lost or drained by now; return a warning for each other node that an administrator has begun to drain."""
        lost, drained = self.prober.lost, self.prober.drained
        for node in self.spares.available:
            if why := lost.get(node) or drained.get(node):
                self.spares.fail(node, why)
        lines = []
        for node, why in drained.items():
            worker = next((each.name for each in self.workers if node in each.nodes), "")
            if node in self._drained or not (worker or node == self.head):
                continue
            self._drained.add(node)
            if node == self.head:
                lines.append(
                    f"{node} is drained ({why}); etcd, NATS and the frontend run there, so it can't be replaced"
                )
            else:
                lines.append(f"{node} is drained ({why}); {worker} goes on: dynamo-mpi replace {node} moves it")
        return lines

    def lost_nodes(self, worker: Worker) -> dict[str, str]:
        """Return those of a worker's nodes that are known to be lost, and why."""
        lost = self.prober.lost
        return {node: lost[node] for node in worker.nodes if node in lost}

    def failed(self, worker: Worker, found: Blame, served: float, environment: Mapping[str, str]) -> None:
        """Take a failure, and begin to ask the worker's nodes, and a spare.

        Args:
            worker: the worker.
            found: the first cause.
            served: how long this start has served, in seconds.
            environment: the environment of the probes.
        """
        event = FailureEvent(
            worker.name,
            time.monotonic(),
            found.code,
            found.phase,
            found.cause,
            found.host,
            served,
            found.is_mistake,
            error=found.error,
        )
        self._events = [*self._events[-_MOST_EVENTS:], event]
        inquiry = None
        if self._has_questions(worker, found):
            asked = {node for case in self._cases.values() if case.inquiry is not None for node in case.inquiry.nodes}
            # those that are being made ready compute
            nearest = self.nearest_spares(worker.name, found.host)
            idle = [node for node in nearest if node in self.spares.ready and node not in asked]
            nodes = (*(node for node in worker.nodes if node not in found.unfit), *idle[: len(worker.nodes)])
            is_explained = self._is_explained(worker, found)
            inquiry = self.prober.begin(
                nodes, environment, found.suspects, reporter=found.reporter, has_probes=not is_explained
            )
        may_follow = self.max_restarts or self.spares.spares
        self._cases[worker.name] = _Case(event, found, inquiry, found.unfit if may_follow else {})

    def due(self, worker: Worker, others: Sequence[str]) -> Action | None:
        """Return what follows the worker's failure, once; None while its nodes are asked, or if it hasn't failed.

        Args:
            worker: the worker.
            others: other workers of its role that serve, or will.
        """
        if worker.name not in self._cases:
            return None
        event, found, inquiry, unfit = self._cases[worker.name]
        health: tuple[NodeHealth, ...] | None = ()
        if inquiry is not None:
            for node in set(inquiry.nodes) - {*worker.nodes, *self.spares.available}:
                inquiry.drop(node)
            if self._is_explained(worker, found):
                inquiry.close()
            health = inquiry.poll()
        if health is None:
            return None
        del self._cases[worker.name]
        health = (*health, *(NodeHealth(node, why) for node, why in unfit.items()))
        self._leave_out_spares(health)
        before = tuple(other for other in self._events if other is not event)
        # a bad node is the cause, whichever node was blamed
        bad = next((each.node for each in health if each.problem and each.node in worker.nodes), event.host)
        event = replace(event, host=bad)
        domain = inquiry.domain_of(worker.nodes) if inquiry is not None else ""
        spares = self.nearest_spares(worker.name, bad, domain)
        case = Situation(
            worker.nodes,
            (*before, event),
            self.max_restarts,
            health,
            spares,
            self.head,
            tuple(others),
            tuple(self.last_choices(worker.name)),
            self._doubts.pop(worker.name, {}) if not event.served else {},
            self.unfit_spares(worker.name),
        )
        action = decide(case)
        is_moved = isinstance(action, MoveToSpare) and action.is_forced
        self._events = [*before, replace(event, is_moved=is_moved)]
        if isinstance(action, MoveToSpare):
            self.move(worker, action)
        elif isinstance(action, Degrade | Stop):
            self.leave_out(action.reasons, worker.name)
        return action

    def move(self, worker: Worker, action: MoveToSpare) -> None:
        """Give a worker spares in the places of nodes, which are left out from then on."""
        doubts = self.last_choices(worker.name)
        self._doubts[worker.name] = {spare: doubts[spare] for _, spare in action.moves if spare in doubts}
        for _, spare in action.moves:
            if spare in self.spares.available:
                self.spares.take(spare, worker.name)
        self._workers[worker.name] = worker.moved(action.moves, self._order)
        self.leave_out(action.reasons, worker.name)

    def leave_out(self, reasons: Mapping[str, str], worker: str = "") -> None:
        """Leave nodes out for the rest of the job."""
        known = {each.node for each in self._excluded}
        new = [exclude(node, reason, worker) for node, reason in reasons.items() if node not in known]
        if new:
            self._excluded += new
            self._run_dir.write_excluded(self._excluded)

    def restarts(self, worker: str) -> int:
        """Return how often a worker has failed within the last hour, moves from bad nodes not counted."""
        return restarts_in_window(self._events, worker)

    def is_open(self, worker: str) -> bool:
        """Return whether it isn't decided yet what follows a worker's failure."""
        return worker in self._cases

    def close(self) -> None:
        """End all probes."""
        for case in self._cases.values():
            if case.inquiry is not None:
                case.inquiry.close()
        self._cases.clear()

    def describe(self) -> dict[str, Any]:
        """Return what `deployment.json` says about nodes, as plain data."""
        drained = self.prober.drained
        return {
            "spares": self.spares.describe(),
            "excluded": [
                {"node": each.node, "reason": each.reason, "time": each.time, "worker": each.worker}
                for each in self._excluded
            ],
            "drained": [{"node": node, "reason": reason} for node, reason in drained.items()],
        }

    def _has_questions(self, worker: Worker, found: Blame) -> bool:
        """Return whether the answer to the last event depends on the nodes."""
        if found.is_mistake or not (self.max_restarts or self.spares.spares):
            return False  # no start may follow
        if not found.is_killed or any(self.prober.is_doubtful(node) for node in worker.nodes):
            return True
        # once, a killed rank is no node's fault: the worker starts again at once, and its own checks look at its GPUs
        spares = self.spares.available
        case = Situation(worker.nodes, tuple(self._events), self.max_restarts, (), spares, self.head)
        return self.restarts(worker.name) > 1 or decide(case) != RestartInPlace(0.0)

    def _is_explained(self, worker: Worker, found: Blame) -> bool:
        """Return whether a lost node is all there is to find out: nothing is known against the worker's other nodes and the spares that
        would be used, and no NVLink domain is to be kept. The next start looks at the GPUs of both, and waits for their memory."""
        doubted = (*found.suspects, found.reporter)
        gone = {node for node in worker.nodes if self.prober.is_known_lost(node, doubted)}
        used = self.nearest_spares(worker.name, found.host)[: len(gone)]
        return (
            bool(gone)
            and found.phase != HARDWARE_CHECK
            and not found.unfit
            and set(used) <= set(self.spares.ready)
            and not any(self.spares.domains.values())
            and not any(self.prober.is_doubtful(node) for node in {*worker.nodes, *used} - gone)
        )

    def _leave_out_spares(self, health: Sequence[NodeHealth]) -> None:
        bad = {each.node: each.problem for each in health if each.problem}
        for node in self.spares.available:
            if node in bad:
                self.spares.fail(node, bad[node])
