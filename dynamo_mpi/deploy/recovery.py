# SPDX-License-Identifier: Apache-2.0
"""What follows a worker's failure: a start in place, a move to a spare node, fewer workers, or the end. Pure.

| in this order | action |
|---|---|
| a mistake (64 to 66, 77, 78), which another start would repeat | `Stop`, its code |
| the head node is lost | `Stop`, 75 |
| the last three starts ended in the same phase with the same cause, without serving meanwhile | `Stop`, its code; 70 for 75: no requeue |
| a node is lost or unhealthy; an unhealthy head node keeps the services | `MoveToSpare`; without a spare `Degrade`, or `Stop` with 75 |
| the worker has failed more often than ``max_restarts`` in an hour, moves from bad nodes not counted | `Stop`, its code |
| a healthy node is blamed a second time in an hour, or drained by an administrator | `MoveToSpare`, where there is a spare |
| else | `RestartInPlace` |

The first start comes at once, the next ones after 1 s, 2 s and so on, up to 60 s; a start that has served for `SETTLED_SECONDS` begins anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WINDOW_SECONDS = 3600.0
SAME_FAILURES = 3
"""So many ends in the same phase with the same cause are no accident."""
SETTLED_SECONDS = 30.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0


@dataclass(frozen=True)
class FailureEvent:
    """One end of a worker.

    Args:
        worker: its name.
        time: when, in seconds of the launcher's monotonic clock.
        code: its exit code.
        phase: where it ended.
        cause: the same text for the same cause; see `blame.Blame`.
        host: the node that is blamed; empty for none.
        served: how long this start has served, in seconds.
        is_mistake: whether another start would end the same way.
        is_moved: whether it was answered by leaving out a node that was lost or unhealthy.
        error: the error, in a line.
    """

    worker: str
    time: float
    code: int
    phase: str = ""
    cause: str = ""
    host: str = ""
    served: float = 0.0
    is_mistake: bool = False
    is_moved: bool = False
    error: str = ""


@dataclass(frozen=True)
class NodeHealth:
    """What was found out about a node after a failure.

    Args:
        node: its name.
        problem: why no worker can run there; empty if one can.
        drained: what Slurm says if an administrator takes the node out: a spare is better, if there is one; empty if not.
        is_lost: whether the problem is that the node is gone, with all that ran there.
    """

    node: str
    problem: str = ""
    drained: str = ""
    is_lost: bool = False


@dataclass(frozen=True)
class Situation:
    """What is known when a worker has failed.

    Args:
        nodes: the worker's nodes.
        events: the failures of all workers of the deployment; the last one is this worker's.
        max_restarts: starts of one worker in an hour after its first, moves away from bad nodes not counted.
        health: of the worker's nodes, as far as it is known.
        spares: nodes that can take another's place, the best first.
        head: the node of the services.
        others: other workers of the role that serve, or will.
        last_choices: spares on which only files differ: for a worker that otherwise can't start, and whose role has no other.
        doubts: the worker's nodes that were last choices, with the files that differ, if it hasn't served there.
        unfit: what is said about spares that don't suit the worker.
    """

    nodes: tuple[str, ...]
    events: tuple[FailureEvent, ...]
    max_restarts: int
    health: tuple[NodeHealth, ...] = ()
    spares: tuple[str, ...] = ()
    head: str = ""
    others: tuple[str, ...] = ()
    last_choices: tuple[str, ...] = ()
    doubts: Mapping[str, str] = field(default_factory=dict)
    unfit: str = ""


@dataclass(frozen=True)
class RestartInPlace:
    """Start the worker again on its nodes, after ``seconds``."""

    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class MoveToSpare:
    """Start the worker again after ``seconds``, with spares in the places of nodes that are left out for the rest of the job.

    Args:
        moves: pairs of a node and the spare that takes its place.
        seconds: the pause before the start.
        reasons: by node, why it is left out.
        is_forced: whether a node was lost or unhealthy.
    """

    moves: tuple[tuple[str, str], ...]
    seconds: float
    reasons: dict[str, str] = field(default_factory=dict)
    is_forced: bool = True


@dataclass(frozen=True)
class Degrade:
    """Go on without the worker: others of its role serve.

    Args:
        reason: why it can't be started.
        reasons: by node, why it is left out.
    """

    reason: str
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stop:
    """End the deployment; the other workers drain.

    Args:
        code: the exit code; only 75 is worth a requeue.
        reason: why; empty if the worker's own end says it.
        reasons: by node, why it is left out.
    """

    code: int
    reason: str = ""
    reasons: dict[str, str] = field(default_factory=dict)


Action = RestartInPlace | MoveToSpare | Degrade | Stop


def decide(case: Situation) -> Action:
    """Return what to do about the last event."""
    newest = case.events[-1]
    if newest.is_mistake:
        # a mistake there is the spare's: elsewhere the worker can start
        spare, files = next(iter(case.doubts.items()), ("", ""))
        return (
            Stop(ExitCode.TEMPORARY, f"{newest.worker} can't start on {spare}: {files}", dict(case.doubts))
            if spare
            else Stop(newest.code)
        )
    bad = {each.node: each.problem for each in case.health if each.problem and each.node in case.nodes}
    if any(each.node == case.head and each.is_lost for each in case.health):
        return Stop(ExitCode.TEMPORARY, f"the head node {case.head} is lost: {bad[case.head]}", bad)
    own = [event for event in recent(case.events) if event.worker == newest.worker]
    if not bad and is_crash_loop(own):
        where = f" in {newest.phase}" if newest.phase else ""
        code = ExitCode.ENGINE if newest.code == ExitCode.TEMPORARY else newest.code
        return Stop(code, f"{newest.worker} ended {SAME_FAILURES} times{where} with the same cause")
    if bad:
        return _leave_out(case, bad)
    restarts = restarts_in_window(case.events, newest.worker)
    if restarts > case.max_restarts:
        return Stop(newest.code)
    seconds = pause(own)
    left = {each.node: each.drained for each in case.health if each.drained and each.node in case.nodes}
    if blamed := blamed_again(case):
        left.setdefault(blamed, _twice(case, blamed))
    left = {node: reason for node, reason in left.items() if node != case.head}
    if left and len(case.spares) >= len(left):
        return MoveToSpare(tuple(zip(left, case.spares, strict=False)), seconds, left, is_forced=False)
    return RestartInPlace(seconds)


def recent(events: Sequence[FailureEvent]) -> list[FailureEvent]:
    """Return the events of the hour before the last one."""
    return [event for event in events if event.time > events[-1].time - WINDOW_SECONDS]


def restarts_in_window(events: Sequence[FailureEvent], worker: str) -> int:
    """Return a worker's failures in the hour before the last event, without those that a bad node was the answer to."""
    return sum(event.worker == worker and not event.is_moved for event in recent(events)) if events else 0


def is_crash_loop(own: Sequence[FailureEvent]) -> bool:
    """Return whether a worker's last starts have all ended in the same phase with the same cause, without having served for a while."""
    last = own[-SAME_FAILURES:]
    if len(last) < SAME_FAILURES or any(event.served >= SETTLED_SECONDS or event.is_moved for event in last):
        return False
    return len({(event.phase, event.cause, event.code) for event in last}) == 1


def pause(own: Sequence[FailureEvent]) -> float:
    """Return the seconds before a worker's next start."""
    failures = 0
    for event in reversed(own):
        failures += 1
        if event.served >= SETTLED_SECONDS:
            break
    return 0.0 if failures <= 1 else min(FIRST_PAUSE_SECONDS * 2.0 ** (failures - 2), LONGEST_PAUSE_SECONDS)


def blamed_again(case: Situation) -> str:
    """Return the worker's node that the last failure blames, if another one of the last hour did, too; not the head node: it has the
    services, and can't be left out."""
    host = case.events[-1].host
    count = sum(event.host == host for event in recent(case.events))
    return host if host and host != case.head and host in case.nodes and count > 1 else ""


def _twice(case: Situation, host: str) -> str:
    events = [event for event in recent(case.events) if event.host == host]
    return f"{len(events)} failures within an hour began there; the last one: {events[-1].error or 'no error text'}"


def _leave_out(case: Situation, bad: dict[str, str]) -> Action:
    worker = case.events[-1].worker
    lost = [node for node in case.nodes if node in bad]
    spares = case.spares if case.others else (*case.spares, *case.last_choices)
    if len(spares) >= len(lost):
        return MoveToSpare(tuple(zip(lost, spares, strict=False)), 0.0, bad)
    reason = f"no spare node is left for {', '.join(lost)} of {worker} ({bad[lost[0]]}){case.unfit}"
    if case.others:
        return Degrade(reason, bad)
    return Stop(ExitCode.TEMPORARY, reason, bad)
