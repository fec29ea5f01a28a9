# SPDX-License-Identifier: Apache-2.0
"""A deployment at one moment: its workers, failures and services, as etcd and the run folder tell."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from urllib.parse import urlsplit

from dynamo_mpi.control_plane.ask_etcd import ask_etcd
from dynamo_mpi.control_plane.probe import etcd_endpoints
from dynamo_mpi.errors import BootstrapError, DiscoveryError
from dynamo_mpi.exit_codes import ExitCode
from dynamo_mpi.operating.untrusted import shown
from dynamo_mpi.operating.views import FAILURES, WORLDS, Failure, Worker, read_failure, read_worker
from dynamo_mpi.services.services import listed_models
from dynamo_mpi.supervision.phases import PHASES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from dynamo_mpi.control_plane.etcd_gateway import EtcdGateway, Value
    from dynamo_mpi.operating.place import Expected, Place

T = TypeVar("T")
ETCD_SECONDS = 5.0
_SERVICE_SECONDS = 1.5
_ROLES = ("agg", "prefill", "decode", "encode")


class Service(NamedTuple):
    """One service of the deployment.

    Args:
        name: ``etcd``, ``nats`` or ``frontend``.
        url: where, without credentials.
        is_up: does it answer?
        note: more, for a person.
    """

    name: str
    url: str
    is_up: bool
    note: str = ""


@dataclass(frozen=True)
class Snapshot:
    """What could be read.

    Args:
        time: when, in seconds since 1970.
        place: where.
        workers: all that have a record.
        failures: of the last hour, the latest last.
        services: where a run folder says that there are any.
        warnings: what is odd.
    """

    time: float
    place: Place
    workers: tuple[Worker, ...] = ()
    failures: tuple[Failure, ...] = ()
    services: tuple[Service, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[Expected, ...]:
        """Workers of the deployment that have no record."""
        there = {worker.launch for worker in self.workers}
        expected = self.place.deployment.workers if self.place.deployment is not None else ()
        return tuple(worker for worker in expected if worker.launch not in there)

    @property
    def open_failures(self) -> tuple[Failure, ...]:
        """Those that no newer start has followed."""
        return tuple(f for f in self.failures if not any(f.is_followed_by(worker) for worker in self.workers))

    @property
    def is_well(self) -> bool:
        """Is nothing missing, down or failed? A worker that still loads is well."""
        place = self.place
        ended_well = place.ended is None or place.ended.exit_code == ExitCode.OK
        services = all(service.is_up for service in self.services)
        return ended_well and not place.is_orphaned and services and not self.missing and not self.open_failures

    def name_of(self, worker: Worker | Failure) -> str:
        """Return what the deployment calls it, or its role."""
        expected = self.place.deployment.workers if self.place.deployment is not None else ()
        return next((own.name for own in expected if own.launch == worker.launch), worker.role)


def read_snapshot(
    place: Place, namespace: str | None = None, model: str | None = None, seconds: float = ETCD_SECONDS
) -> Snapshot:
    """Read it; of a deployment that has ended, only that.

    Args:
        place: where.
        namespace: leave out workers of others.
        model: leave out workers of others.
        seconds: that etcd has.

    Raises:
        DiscoveryError: etcd doesn't answer.
        AuthorisationError: it refuses us.
        UsageError: what is set for it can't be used.
    """
    environ = place.environ
    if place.ended is not None:
        return Snapshot(time.time(), place)
    if environ is None:
        raise _without_services(place)
    services = _Services(place, environ)

    def question(gateway: EtcdGateway) -> tuple[list[Value], list[Value]]:
        within = f"{namespace}/" if namespace else ""
        return gateway.values(WORLDS + within), gateway.values(FAILURES + within)

    try:
        worlds, failures = ask_etcd(environ, seconds, question)
    except DiscoveryError as error:
        raise _unanswered(place, error) from None
    warnings: list[str] = []
    workers = [w for w in _read_all(worlds, read_worker, warnings) if model in (None, w.model)]
    failed = [f for f in _read_all(failures, read_failure, warnings) if model in (None, f.model)]
    for worker in workers:
        warnings += _unknown(worker)
    return Snapshot(
        time.time(),
        place,
        tuple(sorted(workers, key=lambda w: (w.namespace, w.model, _rank_of(w.role), w.launch or "", w.hosts, w.key))),
        tuple(sorted(failed, key=lambda f: f.time)),
        services.states(),
        tuple(warnings),
    )


def _read_all(
    values: Iterable[Value], read: Callable[[str, bytes], tuple[T, list[str]]], warnings: list[str]
) -> list[T]:
    found = []
    for value in values:
        try:
            item, odd = read(value.key, value.data)
        except ValueError as error:
            warnings.append(f"{shown(value.key)} can't be read, and is left out: {error}")
            continue
        found.append(item)
        if odd:
            warnings.append(f"{shown(value.key)}: {', '.join(odd[:4])}")
    return found


def _unknown(worker: Worker) -> list[str]:
    strange = [f"its phase {worker.phase!r:.40}"] if worker.phase not in PHASES else []
    strange += [f"its role {worker.role!r:.40}"] if worker.role not in _ROLES else []
    return [f"{worker.key}: {' and '.join(strange)} isn't known here"] if strange else []


def _rank_of(role: str) -> int:
    return _ROLES.index(role) if role in _ROLES else len(_ROLES)


def _without_services(place: Place) -> DiscoveryError:
    if place.deployment is None:
        is_there = place.run_dir is not None and place.run_dir.is_dir()
        return DiscoveryError(
            f"nothing runs in {place.run_dir}" if is_there else f"there is no folder {place.run_dir}",
            needed="a deployment, with its services.json",
            fix="start it, or --run-dir DIR of another",
        )
    return DiscoveryError(
        f"the services of the deployment in {place.run_dir} aren't up yet",
        needed="its etcd",
        fix=f"wait, or look at {place.run_dir}/logs/services.log",
    )


def _unanswered(place: Place, error: DiscoveryError) -> DiscoveryError:
    if place.run_dir is not None:
        fix = f"look at {place.run_dir}/services/etcd.log; where its node is lost, dynamo-mpi down --run-dir {place.run_dir}"
    else:
        fix = "--run-dir DIR of the deployment, or where there is none ETCD_ENDPOINTS and ETCD_AUTH_*"
    return DiscoveryError(f"etcd does not answer ({error.found})", needed="an etcd that this host reaches", fix=fix)


class _Services:
    """Asks NATS and the frontend while etcd is asked.

    Args:
        place: says where they are.
        environ: has NATS's address.
    """

    def __init__(self, place: Place, environ: Mapping[str, str]) -> None:
        self._end = time.monotonic() + _SERVICE_SECONDS
        self._found: dict[str, Service] = {}
        self._threads: list[threading.Thread] = []
        if not place.has_services:
            return
        self._found["etcd"] = Service("etcd", ", ".join(map(_without_password, etcd_endpoints(environ))), True)
        for name, url, look in (
            ("nats", environ.get("NATS_SERVER", ""), _look_at_nats),
            ("frontend", place.frontend, _look_at_frontend),
        ):
            if url:
                self._found[name] = Service(name, _without_password(url), False, "no answer in time")
                thread = threading.Thread(target=self._ask, args=(name, url, look), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)

    def states(self) -> tuple[Service, ...]:
        """Return what has come so far, or comes in time."""
        for thread in self._threads:
            thread.join(max(0.0, self._end - time.monotonic()))
        return tuple(self._found.values())

    def _ask(self, name: str, url: str, look: Callable[[str], Service]) -> None:
        try:
            self._found[name] = look(url)
        except (OSError, ValueError, BootstrapError) as error:
            note = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
            self._found[name] = Service(name, _without_password(url), False, shown(note))


def _look_at_nats(url: str) -> Service:
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    with socket.create_connection((parts.hostname or "", parts.port or 4222), timeout=_SERVICE_SECONDS) as connection:
        # it speaks first, before it wants a password or TLS
        is_nats = connection.recv(4) == b"INFO"
    return Service("nats", _without_password(url), is_nats, "" if is_nats else "something else than NATS listens there")


def _look_at_frontend(url: str) -> Service:
    models = listed_models(url)
    if models is None:
        return Service("frontend", url, False, "it doesn't list its models")
    return Service("frontend", url, True, f"serves {shown(', '.join(models))}" if models else "serves no model")


def _without_password(url: str) -> str:
    scheme, separator, rest = url.rpartition("://")
    return shown(f"{scheme}{separator}{rest.rpartition('@')[2]}")
