# SPDX-License-Identifier: Apache-2.0
"""A deployment at one moment: its workers, failures and services, from etcd and the run folder."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from dynamo_mpi.common.display import sanitize, shell_word
from dynamo_mpi.common.errors import AuthorizationError, DiscoveryError, DynamoMpiError, ExitCode
from dynamo_mpi.common.phases import FORMER_PHASES, PHASES
from dynamo_mpi.deploy.services import listed_models
from dynamo_mpi.discovery.endpoints import strip_credentials
from dynamo_mpi.discovery.etcd import EtcdClient, etcd_endpoints
from dynamo_mpi.discovery.etcd_http import query_etcd
from dynamo_mpi.discovery.failure_records import StoredFailure, list_failures
from dynamo_mpi.discovery.model_cards import UnlikeModel, cards_of, read_cards, unlike_models
from dynamo_mpi.discovery.records import StoredRecord, list_workers
from dynamo_mpi.layout.layout import ROLES
from dynamo_mpi.ops.deployment import DamagedServicesError, LauncherKilledError
from dynamo_mpi.ops.run_dirs import NoRunDirError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.ops.deployment import Deployment, ExpectedWorker

ETCD_SECONDS = 5.0
_SERVICE_SECONDS = 1.5


class Service(NamedTuple):
    """One service of the deployment.

    Args:
        name: ``etcd``, ``nats`` or ``frontend``.
        url: its URL, without credentials.
        is_up: whether it answers.
        note: additional text.
    """

    name: str
    url: str
    is_up: bool
    note: str = ""


@dataclass(frozen=True)
class DeploymentStatus:
    """The status of a deployment.

    Args:
        time: when it was read, in seconds since 1970.
        deployment: the deployment.
        workers: all worker records.
        failures: of the last hour, the latest last.
        services: the services, if a run folder names them.
        warnings: anomalies.
        unlike: the models whose workers' cards differ; the warnings have them too.
    """

    time: float
    deployment: Deployment
    workers: tuple[StoredRecord, ...] = ()
    failures: tuple[StoredFailure, ...] = ()
    services: tuple[Service, ...] = ()
    warnings: tuple[str, ...] = ()
    unlike: tuple[UnlikeModel, ...] = ()

    @property
    def missing(self) -> tuple[ExpectedWorker, ...]:
        """Workers of the deployment that have no record, but those that have departed, or were given up."""
        return tuple(worker for worker in self._absent if worker.departed is None and worker.given_up is None)

    @property
    def departed(self) -> tuple[ExpectedWorker, ...]:
        """Workers of the deployment that ended on request, and aren't restarted."""
        return tuple(worker for worker in self._absent if worker.departed is not None)

    @property
    def given_up(self) -> tuple[ExpectedWorker, ...]:
        """Workers of the deployment that can't be started again, while others of their role serve."""
        return tuple(worker for worker in self._absent if worker.given_up is not None)

    @property
    def lost_roles(self) -> frozenset[str]:
        """Roles of the deployment whose workers have all departed."""
        departed = self.departed
        return frozenset(w.role for w in departed) - {w.role for w in self.deployment.expected if w not in departed}

    @property
    def _absent(self) -> tuple[ExpectedWorker, ...]:
        there = {worker.record.launch for worker in self.workers}
        return tuple(worker for worker in self.deployment.expected if worker.launch not in there)

    @property
    def open_failures(self) -> tuple[StoredFailure, ...]:
        """Failures that no newer start has followed."""
        return tuple(f for f in self.failures if not any(f.is_followed_by(worker) for worker in self.workers))

    @property
    def is_well(self) -> bool:
        """Whether nothing is missing, down or failed. A worker that still loads is no problem."""
        end = self.deployment.end
        ended_well = end is None or end.exit_code == ExitCode.OK
        services = all(service.is_up for service in self.services)
        alive = not self.deployment.launcher_is_dead
        complete = not self.missing and not self.given_up and not self.lost_roles
        return ended_well and alive and services and complete and not self.open_failures

    def name_of(self, worker: StoredRecord | StoredFailure) -> str:
        """Return the deployment's name for a worker, or its role."""
        record = worker.record
        return next((own.name for own in self.deployment.expected if own.launch == record.launch), record.role)


def read_status(
    deployment: Deployment, namespace: str | None = None, model: str | None = None, seconds: float = ETCD_SECONDS
) -> DeploymentStatus:
    """Read the status; if the deployment has ended, only its end.

    Args:
        deployment: the deployment.
        namespace: only workers of this namespace.
        model: only workers of this model.
        seconds: etcd's time limit.

    Raises:
        DiscoveryError: etcd doesn't answer.
        AuthorizationError: it rejects our credentials.
        ConfigFileError: the run folder's services.json makes no sense.
        UsageError: the settings for etcd can't be used, or there is no such run folder.
    """
    environ = deployment.environ
    if deployment.end is not None:
        return DeploymentStatus(time.time(), deployment)
    if environ is None:
        raise _without_services(deployment)
    services = _Services(deployment, environ)

    def query(etcd: EtcdClient) -> tuple[list[StoredRecord], list[StoredFailure], list[str], list[UnlikeModel]]:
        odd: dict[str, list[str]] = {}
        workers, unread = list_workers(etcd, namespace or "", odd)
        failures, unread_failures = list_failures(etcd, namespace or "", problems=odd)
        return workers, failures, _warnings(unread | unread_failures, odd), _unlike_models(etcd, namespace, model)

    try:
        workers, failures, warnings, unlike = query_etcd(environ, seconds, query)
    except DiscoveryError as error:
        raise _unanswered(deployment, error) from None
    workers = [worker for worker in workers if model in (None, worker.record.model)]
    warnings += [each.text for each in unlike]
    for worker in workers:
        warnings += _unknown(worker)
    return DeploymentStatus(
        time.time(),
        deployment,
        tuple(sorted(workers, key=_order)),
        tuple(sorted((f for f in failures if model in (None, f.record.model)), key=lambda f: f.record.time)),
        services.states(),
        tuple(warnings),
        tuple(unlike),
    )


def _unlike_models(etcd: EtcdClient, namespace: str | None, model: str | None) -> list[UnlikeModel]:
    try:
        entries = etcd.get_prefix(cards_of(namespace or ""))
    except AuthorizationError:  # an operator's rights may end with our own keys
        return []
    return unlike_models((space, card) for space, card in read_cards(entries) if model in (None, card.model))


def _order(worker: StoredRecord) -> tuple[object, ...]:
    record = worker.record
    rank = ROLES.index(record.role) if record.role in ROLES else len(ROLES)
    return (record.namespace, record.model, rank, record.launch or "", record.hosts, worker.key)


def _warnings(unreadable: Mapping[str, str], odd: Mapping[str, list[str]]) -> list[str]:
    skipped_checks = [f"{sanitize(key)} can't be read, and is ignored: {why}" for key, why in unreadable.items()]
    return skipped_checks + [f"{sanitize(key)}: {', '.join(problems[:4])}" for key, problems in odd.items()]


def _unknown(worker: StoredRecord) -> list[str]:
    phase, role = worker.record.phase, worker.record.role
    strange = [f"its phase {phase!r:.40}"] if FORMER_PHASES.get(phase, phase) not in PHASES else []
    strange += [f"its role {role!r:.40}"] if role not in ROLES else []
    return [f"{sanitize(worker.key)}: {' and '.join(strange)} isn't known here"] if strange else []


def _without_services(deployment: Deployment) -> DynamoMpiError:
    if deployment.is_missing:
        return NoRunDirError(deployment.run_dir)
    if deployment.launcher_is_dead:
        return LauncherKilledError(deployment.run_dir)
    if deployment.services_problem:
        return DamagedServicesError(deployment.run_dir, deployment.services_problem)
    if deployment.launch is None:
        return DiscoveryError(
            f"nothing runs in {deployment.run_dir}",
            expected="a deployment, with its services.json",
            fix="start it, or --run-dir DIR of another",
        )
    return DiscoveryError(
        f"the services of the deployment in {deployment.run_dir} aren't up yet",
        expected="its etcd",
        fix=f"wait, or look at {deployment.run_dir}/logs/services.log",
    )


def _unanswered(deployment: Deployment, error: DiscoveryError) -> DiscoveryError:
    if deployment.run_dir is not None:
        command = f"dynamo-mpi down --run-dir {shell_word(deployment.run_dir)}"
        fix = f"look at {deployment.run_dir}/services/etcd.log; where its node is lost, {command}"
    else:
        fix = "--run-dir DIR of the deployment, or where there is none ETCD_ENDPOINTS and ETCD_AUTH_*"
    return DiscoveryError(f"etcd does not answer ({error.problem})", expected="an etcd that this host reaches", fix=fix)


class _Services:
    """Checks NATS and the frontend while etcd is queried.

    Args:
        deployment: has their addresses.
        environ: has NATS's address.
    """

    def __init__(self, deployment: Deployment, environ: Mapping[str, str]) -> None:
        self._end = time.monotonic() + _SERVICE_SECONDS
        self._found: dict[str, Service] = {}
        self._threads: list[threading.Thread] = []
        if not deployment.has_services:
            return
        self._found["etcd"] = Service("etcd", ", ".join(map(_display, etcd_endpoints(environ))), True)
        for name, url, look in (
            ("nats", environ.get("NATS_SERVER", ""), _check_nats),
            ("frontend", deployment.frontend, _check_frontend),
        ):
            if url:
                self._found[name] = Service(name, _display(url), False, "no answer in time")
                thread = threading.Thread(target=self._ask, args=(name, url, look), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)

    def states(self) -> tuple[Service, ...]:
        """Return the answers so far, and those that arrive in time."""
        for thread in self._threads:
            thread.join(max(0.0, self._end - time.monotonic()))
        return tuple(self._found.values())

    def _ask(self, name: str, url: str, look: Callable[[str], Service]) -> None:
        try:
            self._found[name] = look(url)
        except (OSError, ValueError, DynamoMpiError) as error:
            note = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
            self._found[name] = Service(name, _display(url), False, sanitize(note))


def _check_nats(url: str) -> Service:
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    with socket.create_connection((parts.hostname or "", parts.port or 4222), timeout=_SERVICE_SECONDS) as connection:
        # NATS sends its INFO line before it requires a password or TLS
        is_nats = connection.recv(4) == b"INFO"
    return Service("nats", _display(url), is_nats, "" if is_nats else "something else than NATS listens there")


def _check_frontend(url: str) -> Service:
    models = listed_models(url)
    if models is None:
        return Service("frontend", _display(url), False, "it doesn't list its models")
    return Service(
        "frontend", _display(url), True, f"serves {sanitize(', '.join(models))}" if models else "serves no model"
    )


def _display(url: str) -> str:
    return sanitize(strip_credentials(url))
