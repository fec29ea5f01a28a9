# SPDX-License-Identifier: Apache-2.0
"""Whether a deployment is ready as its records say, and what it still lacks. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.operating.wording import spell_position

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dynamo_mpi.operating.snapshot import Snapshot
    from dynamo_mpi.operating.views import Failure, Worker

_PAIR = frozenset({"prefill", "decode"})
# in the order in which a worker comes to them
_ORDER = ("environment", "world", "preflight", "probe", "load", "prove", "register", "serve")


class Lack(NamedTuple):
    """What is still awaited.

    Args:
        name: the worker or the role.
        position: where it stands.
    """

    name: str
    position: str

    def __str__(self) -> str:
        return f"{self.name}: {self.position}"


def needed_roles(roles: Iterable[str]) -> frozenset[str]:
    """Return the roles that a model needs of which these are there: agg stands alone, prefill and decode need each other."""
    there = frozenset(roles)
    return frozenset({"agg"}) if "agg" in there and not there & _PAIR else there - {"encode"} | _PAIR


def is_whole(roles: Iterable[str]) -> bool:
    """Can a model answer whose workers of these roles serve?"""
    there = frozenset(roles)
    return "agg" in there or there >= _PAIR


def lacks_of(snapshot: Snapshot, roles: Sequence[str] = ()) -> list[Lack]:
    """Return what isn't ready yet.

    Args:
        snapshot: what is there.
        roles: that are asked for; without any, all that `launch` has started, or else all that the models need.
    """
    deployment = snapshot.place.deployment
    if deployment is not None:
        expected = [worker for worker in deployment.workers if not roles or worker.role in roles]
        there = {own.launch: [w for w in snapshot.workers if w.launch == own.launch] for own in expected}
        lacks = [_lack(own.name, there[own.launch], snapshot.time) for own in expected]
        if expected:
            return [lack for lack in lacks if lack is not None]
    models = models_of(snapshot)
    if not models:
        return [Lack(role, "not there") for role in roles] or [Lack("workers", "none is there")]
    lacks = []
    for namespace, model in models:
        own_workers = [w for w in snapshot.workers if (w.namespace, w.model) == (namespace, model)]
        prefix = f"{model} " if len(models) > 1 else ""
        for role in roles or sorted(needed_roles(w.role for w in own_workers), reverse=True):
            lacks.append(_lack(prefix + role, [w for w in own_workers if w.role == role], snapshot.time))
    return [lack for lack in lacks if lack is not None]


def models_of(snapshot: Snapshot) -> list[tuple[str, str]]:
    """Return the models that there are workers of, with their namespaces."""
    return sorted({(worker.namespace, worker.model) for worker in snapshot.workers})


def hopeless(
    snapshot: Snapshot, failures: Sequence[Failure], lacks: Sequence[Lack], roles: Sequence[str]
) -> Failure | None:
    """Return the failure that nobody takes up: nothing of what is lacking can come from the workers that are still there.

    None while `launch` runs: whether it starts a worker again, and with which code it ends if it doesn't, is its to say.

    Args:
        snapshot: what is there.
        failures: the new ones.
        lacks: what isn't ready.
        roles: that were asked for.
    """
    if not lacks or snapshot.place.deployment is not None:
        return None
    for failure in failures:
        if roles and failure.role not in roles:
            continue
        ours = (failure.namespace, failure.model, failure.role)
        living = (w for w in snapshot.workers if (w.namespace, w.model, w.role) == ours)
        others = [w for w in living if not w.key.endswith(f"/{failure.lease}")]
        if not others:
            return failure
    return None


def _lack(name: str, workers: Sequence[Worker], now: float) -> Lack | None:
    if any(worker.serves for worker in workers):
        return None
    if not workers:
        return Lack(name, "not there")
    return Lack(name, spell_position(max(workers, key=_how_far), now))


def _how_far(worker: Worker) -> int:
    return _ORDER.index(worker.phase) if worker.phase in _ORDER else -1
