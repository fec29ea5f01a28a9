# SPDX-License-Identifier: Apache-2.0
"""Whether a deployment is ready according to its records, what is still missing, and how operators read times, nodes and progress. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.phases import FORMER_PHASES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dynamo_mpi.discovery.failure_records import FailureRecord, StoredFailure
    from dynamo_mpi.discovery.records import Progress, StoredRecord, WorkerRecord
    from dynamo_mpi.ops.status import DeploymentStatus

_NODES = 4
DEPARTED = "ended on request"
"""Position of a worker that `launch` doesn't restart."""
GIVEN_UP = "given up"
"""Position of a worker that `launch` can't restart: no node is left for it."""


def format_seconds(seconds: float) -> str:
    """Format a duration: ``40 s``, ``12 min``, ``5.2 h``, ``3 d``."""
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} d"


def format_since(then: float | None, now: float) -> str:
    """Format the time since a moment; ``-`` if it isn't known."""
    return format_seconds(now - then) if then else "-"


def format_nodes(names: Sequence[str]) -> str:
    """Format the names of nodes; of many, the first, the last, and their number."""
    if not names:
        return "-"
    return ",".join(names) if len(names) <= _NODES else f"{names[0]} … {names[-1]} ({len(names)})"


def format_progress(progress: Progress | None) -> str:
    """Return ``11/16, slowest n03``, or ``37.6 GB read, slowest n03`` if ranks don't report when they are done; empty if it isn't known."""
    if progress is None:
        return ""
    slowest = progress.slowest_host or ("" if progress.slowest_rank is None else f"rank {progress.slowest_rank}")
    is_over = progress.done is not None and progress.done >= progress.ranks
    late = f", slowest {slowest}" if slowest and not is_over else ""
    if progress.done is not None:
        return f"{progress.done}/{progress.ranks}{late}"
    return "" if progress.read is None else f"{progress.read / 1e9:.1f} GB read{late}"


def format_position(worker: WorkerRecord, now: float) -> str:
    """Format a worker's phase and progress: ``load 3/6, slowest n3, 40 s``."""
    parts = [f"{worker.phase} {format_progress(worker.progress)}".rstrip()]
    if since := worker.phase_since or worker.started:
        parts.append(format_seconds(now - since))
    return ", ".join(parts)


def format_failure(failure: FailureRecord, name: str, now: float) -> str:
    """Return a failure on one line."""
    where = f", rank {failure.rank}" if failure.rank >= 0 else ""
    where += f" on {failure.host}" if failure.host else ""
    phase = f" in {failure.phase}" if failure.phase else ""
    again = f", start {failure.attempt}" if failure.attempt > 1 else ""
    when = format_seconds(now - failure.time)
    return f"{name}{again}: exit code {failure.exit_code}{phase}{where}, {when} ago: {failure.error or 'no error text'}"


_PAIR = frozenset({"prefill", "decode"})
# in the order in which a worker enters them
_ORDER = ("environment", "mpi_init", "preflight", "hardware_check", "stage", "load", "warmup", "register", "serve")


class MissingItem(NamedTuple):
    """A worker or role that isn't ready yet.

    Args:
        name: its name.
        position: its phase and progress.
    """

    name: str
    position: str

    def __str__(self) -> str:
        return f"{self.name}: {self.position}"


def needed_roles(roles: Iterable[str]) -> frozenset[str]:
    """Return the roles that a model needs if workers of these exist: agg needs no other, prefill and decode need each other."""
    there = frozenset(roles)
    return frozenset({"agg"}) if "agg" in there and not there & _PAIR else there - {"encode"} | _PAIR


def is_complete(roles: Iterable[str]) -> bool:
    """Return whether a model can answer if workers of these roles serve."""
    there = frozenset(roles)
    return "agg" in there or there >= _PAIR


def missing_items(status: DeploymentStatus, roles: Sequence[str] = ()) -> list[MissingItem]:
    """Return the workers and roles that aren't ready yet, and the models whose workers' cards differ.

    Args:
        status: the deployment's status.
        roles: the required roles; if empty, those that `launch` has started, or else those that the models need.
    """
    expected = [worker for worker in status.deployment.expected if not roles or worker.role in roles]
    if expected:
        departed = status.departed
        found = [
            _missing(own.name, [w for w in status.workers if w.record.launch == own.launch], status.time)
            for own in expected
            if own not in departed and own not in status.given_up
        ]
        lost = [
            MissingItem(own.name, DEPARTED) for own in expected if own in departed and own.role in status.lost_roles
        ]
        return [item for item in found if item is not None] + lost + unlike_items(status, roles)
    models = models_of(status)
    if not models:
        return [MissingItem(role, "not there") for role in roles] or [MissingItem("workers", "none is there")]
    items = []
    for namespace, model in models:
        own_workers = [w for w in status.workers if (w.record.namespace, w.record.model) == (namespace, model)]
        prefix = f"{model} " if len(models) > 1 else ""
        for role in roles or sorted(needed_roles(w.record.role for w in own_workers), reverse=True):
            items.append(_missing(prefix + role, [w for w in own_workers if w.record.role == role], status.time))
    return [item for item in items if item is not None] + unlike_items(status, roles)


def unlike_items(status: DeploymentStatus, roles: Sequence[str] = ()) -> list[MissingItem]:
    """Return the models of the workers whose cards differ: requests to some of the workers would be made for the others.

    Args:
        status: the deployment's status.
        roles: only workers of these roles; all if empty.
    """
    models = models_of(status)
    found = [each for each in status.unlike if (each.namespace, each.model) in models]
    # runtimes differ in the kind of a decode worker's card
    return [
        MissingItem(each.model, each.text)
        for each in found
        if not roles or ("prefill" in roles if each.kind == "prefill" else set(roles) - {"prefill"})
    ]


def models_of(status: DeploymentStatus) -> list[tuple[str, str]]:
    """Return the models of the workers, with their namespaces."""
    return sorted({(worker.record.namespace, worker.record.model) for worker in status.workers})


def unrecoverable_failure(
    status: DeploymentStatus, failures: Sequence[StoredFailure], missing: Sequence[MissingItem], roles: Sequence[str]
) -> StoredFailure | None:
    """Return the failure that makes readiness impossible: the existing workers can't provide what is missing.

    None while `launch` runs: it decides whether to restart a worker, and its exit code if not.

    Args:
        status: the deployment's status.
        failures: the new ones.
        missing: the missing items.
        roles: the required roles.
    """
    if not missing or status.deployment.launch is not None:
        return None
    for failure in failures:
        failed = failure.record
        if roles and failed.role not in roles:
            continue
        ours = (failed.namespace, failed.model, failed.role)
        living = (w for w in status.workers if (w.record.namespace, w.record.model, w.record.role) == ours)
        if all(failure.has_same_name(worker) for worker in living):
            return failure
    return None


def _missing(name: str, workers: Sequence[StoredRecord], now: float) -> MissingItem | None:
    if any(worker.record.is_serving for worker in workers):
        return None
    if not workers:
        return MissingItem(name, "not there")
    return MissingItem(name, format_position(max((w.record for w in workers), key=_how_far), now))


def _how_far(worker: WorkerRecord) -> int:
    phase = FORMER_PHASES.get(worker.phase, worker.phase)
    return _ORDER.index(phase) if phase in _ORDER else -1
