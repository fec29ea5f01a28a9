# SPDX-License-Identifier: Apache-2.0
"""Whether a deployment is ready as its records say, and what is still missing. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.ops.format import format_position

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dynamo_mpi.discovery.failure_records import StoredFailure
    from dynamo_mpi.discovery.records import StoredRecord, WorkerRecord
    from dynamo_mpi.ops.status import DeploymentStatus

_PAIR = frozenset({"prefill", "decode"})
# in the order in which a worker enters them
_ORDER = ("environment", "mpi_init", "preflight", "hardware_check", "load", "warmup", "register", "serve")


class MissingItem(NamedTuple):
    """What a deployment still waits for.

    Args:
        name: the worker or the role.
        position: how far it is.
    """

    name: str
    position: str

    def __str__(self) -> str:
        return f"{self.name}: {self.position}"


def needed_roles(roles: Iterable[str]) -> frozenset[str]:
    """Return the roles that a model needs if workers of these exist: agg stands alone, prefill and decode need each other."""
    there = frozenset(roles)
    return frozenset({"agg"}) if "agg" in there and not there & _PAIR else there - {"encode"} | _PAIR


def is_complete(roles: Iterable[str]) -> bool:
    """Return whether a model can answer whose workers of these roles serve."""
    there = frozenset(roles)
    return "agg" in there or there >= _PAIR


def missing_items(status: DeploymentStatus, roles: Sequence[str] = ()) -> list[MissingItem]:
    """Return what isn't ready yet.

    Args:
        status: what is there.
        roles: that are asked for; without any, all that `launch` has started, or else all that the models need.
    """
    expected = [worker for worker in status.deployment.expected if not roles or worker.role in roles]
    if expected:
        found = (
            _missing(own.name, [w for w in status.workers if w.record.launch == own.launch], status.time)
            for own in expected
        )
        return [item for item in found if item is not None]
    models = models_of(status)
    if not models:
        return [MissingItem(role, "not there") for role in roles] or [MissingItem("workers", "none is there")]
    items = []
    for namespace, model in models:
        own_workers = [w for w in status.workers if (w.record.namespace, w.record.model) == (namespace, model)]
        prefix = f"{model} " if len(models) > 1 else ""
        for role in roles or sorted(needed_roles(w.record.role for w in own_workers), reverse=True):
            items.append(_missing(prefix + role, [w for w in own_workers if w.record.role == role], status.time))
    return [item for item in items if item is not None]


def models_of(status: DeploymentStatus) -> list[tuple[str, str]]:
    """Return the models that there are workers of, with their namespaces."""
    return sorted({(worker.record.namespace, worker.record.model) for worker in status.workers})


def unrecoverable_failure(
    status: DeploymentStatus, failures: Sequence[StoredFailure], missing: Sequence[MissingItem], roles: Sequence[str]
) -> StoredFailure | None:
    """Return the failure that no other worker makes up for: nothing of what is missing can come from the workers that still exist.

    None while `launch` runs: it decides whether it starts a worker again, and with which code it ends if it doesn't.

    Args:
        status: what is there.
        failures: the new ones.
        missing: what isn't ready.
        roles: that were asked for.
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
    return _ORDER.index(worker.phase) if worker.phase in _ORDER else -1
