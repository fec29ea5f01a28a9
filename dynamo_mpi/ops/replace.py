# SPDX-License-Identifier: Apache-2.0
"""Requests of a running `dynamo-mpi launch` that it takes a node out, and follows how far it is."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import PhaseTimeoutError, RetryableError, UsageError
from dynamo_mpi.common.record_codec import read_fields
from dynamo_mpi.common.waiting import poll_until
from dynamo_mpi.deploy.replacements import DONE, DRAINING, HEAD_NODE, REFUSED, STARTING, WAITING, Replacement
from dynamo_mpi.deploy.run_files import DEPLOYMENT, REPLACE, read_object

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dynamo_mpi.common.own_files import OwnFolder
    from dynamo_mpi.ops.deployment import RunningLaunch

POLL_SECONDS = 0.5
_FIX_SPARE = "--spare-nodes 1 or a second worker of the role, with the next launch"


@dataclass(frozen=True)
class Outcome:
    """What was done.

    Args:
        replacement: the request, as `launch` has answered it.
        seconds: from the request to the answer.
    """

    replacement: Replacement
    seconds: float

    def __str__(self) -> str:
        done = self.replacement
        if not done.worker:
            return f"{done.node} is out ({done.reason})"
        where = f"{done.worker} serves with {done.to} in its place" if done.to else f"{done.worker} isn't started again"
        return f"{done.node} is out after {self.seconds:.0f} s: {where}" + (f" ({done.reason})" if done.reason else "")


def require_replaceable(node: str, launch: RunningLaunch) -> None:
    """Check what can be known before the request. Pure.

    Args:
        node: the node to take out.
        launch: the deployment.

    Raises:
        UsageError: the deployment doesn't use the node, or nothing can take its place.
    """
    spares = {spare.node: spare.state for spare in launch.spares}
    excluded = [each.node for each in launch.excluded]
    used = {name: worker for worker in launch.workers for name in worker.nodes}
    if node in excluded or (node in spares and node not in used):
        return
    worker = used.get(node)
    if worker is None:
        listed = ", ".join(f"{name} ({own.name})" for name, own in used.items())
        raise UsageError(
            f"the deployment doesn't use a node {node!r}",
            expected=f"one of {listed}" + (f"; spares {', '.join(spares)}" if spares else ""),
            fix="correct NODE, or --run-dir",
        )
    if worker.departed is not None or worker.given_up is not None:
        raise UsageError(
            f"no worker runs on {node}: {worker.name} has ended",
            expected="a node with a worker, or a spare",
            fix="dynamo-mpi status shows what runs",
        )
    others = [
        other.name
        for other in launch.workers
        if other.role == worker.role and other.name != worker.name and other.departed is None and other.given_up is None
    ]
    if not others and not {"ready", "preparing"} & set(spares.values()):
        raise UsageError(
            f"nothing can take the place of {node}: no spare node is left, and {worker.name} is the only {worker.role} worker",
            expected="a spare node, or a second worker of the role, which serves meanwhile",
            fix=_FIX_SPARE,
        )


def replace_node(folder: OwnFolder, run_dir: Path, node: str, seconds: float, log: Callable[[str], None]) -> Outcome:
    """Request that a node is taken out, and wait for it.

    Args:
        folder: the run folder.
        run_dir: its path.
        node: the node; `require_replaceable` has accepted it.
        seconds: time limit.
        log: prints one line.

    Raises:
        UsageError: `launch` refuses.
        RetryableError: the deployment has ended.
        PhaseTimeoutError: the node is still in use after the time limit; `launch` goes on with the request.
    """
    # one that is still open is joined
    began, before = time.monotonic(), sum(not _is_open(each) for each in _answers(folder, node))
    with folder.subfolder(REPLACE, create=True) as requests:
        os.close(requests.open(node, os.O_WRONLY | os.O_CREAT))
    state, reason = "", ""
    answers: list[Replacement] = []

    def late() -> PhaseTimeoutError:
        where = _describe(answers[-1]) if answers else "launch hasn't taken the request"
        return PhaseTimeoutError(
            f"{node} isn't out after {seconds:g} s: {where}",
            expected="a deployment without the node, within --timeout",
            fix="dynamo-mpi status shows how far it is; a longer --timeout where requests or the load take longer",
        )

    for _ in poll_until(began + seconds, POLL_SECONDS, late):
        answers = _answers(folder, node)[before:]
        if answers:
            answer = answers[-1]
            if answer.state == DONE:
                break
            if answer.state == REFUSED and answer.reason == HEAD_NODE:
                raise UsageError(
                    f"launch doesn't take {node} out: {answer.reason}",
                    expected="another node than the head node, which can't be replaced while the deployment runs",
                    fix="a new launch moves the services: dynamo-mpi down, then launch in an allocation without the node",
                )
            if answer.state == REFUSED:
                raise UsageError(
                    f"launch doesn't take {node} out: {answer.reason}",
                    expected="a spare node, or a second worker of the role, which serves meanwhile",
                    fix=_FIX_SPARE,
                )
            if (answer.state, answer.reason) != (state, reason):
                state, reason = answer.state, answer.reason
                log(_describe(answer))
        elif DEPLOYMENT not in folder.names():
            raise RetryableError(
                f"the deployment in {run_dir} has ended, before {node} was taken out",
                expected="a running deployment",
                fix="look at its log: dynamo-mpi status",
            )
    return Outcome(answers[-1], time.monotonic() - began)


def is_requested(folder: OwnFolder, node: str) -> bool:
    """Return whether `launch` has a request for a node, and isn't done with it: to repeat it is to wait for it."""
    return any(map(_is_open, _answers(folder, node)))


def _is_open(answer: Replacement) -> bool:
    return answer.state not in (DONE, REFUSED)


def _answers(folder: OwnFolder, node: str) -> list[Replacement]:
    """Return what `launch` has answered about a node, the last request last."""
    try:
        content = read_object(folder, DEPLOYMENT) or {}
    except ValueError:  # its file system fails for a moment
        return []
    entries = content.get("replacements")
    found = [
        read_fields(Replacement, each, [])
        for each in (entries if isinstance(entries, list) else [])
        if isinstance(each, dict)
    ]
    return [each for each in found if each.node == node]


def _describe(answer: Replacement) -> str:
    why = f" ({answer.reason})" if answer.reason else ""
    texts = {
        WAITING: f"{answer.worker} waits{why}",
        DRAINING: f"{answer.worker} drains",
        STARTING: f"{answer.worker} starts with {answer.to} in the place of {answer.node}",
    }
    return texts.get(answer.state, f"{answer.state}{why}")
