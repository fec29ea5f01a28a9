# SPDX-License-Identifier: Apache-2.0
"""Doctor's checks of etcd and NATS, with a worker's addresses and credentials."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.credentials import SERVICES_FILE
from dynamo_mpi.common.credentials import clients_of as clients_of_file
from dynamo_mpi.common.errors import AuthorizationError, DiscoveryError, DynamoMpiError, ExitCode
from dynamo_mpi.deploy.run_files import is_run_dir, open_run_dir, read_services
from dynamo_mpi.deploy.step_commands import SERVICES
from dynamo_mpi.discovery.connectivity import check_etcd_endpoints, nats_server, require_nats_server
from dynamo_mpi.discovery.endpoints import strip_credentials
from dynamo_mpi.discovery.etcd import SAFE_ETCD, EtcdAuth, is_outdated_etcd
from dynamo_mpi.discovery.etcd_http import HttpEtcdClient
from dynamo_mpi.discovery.records import worlds_of
from dynamo_mpi.layout.format import counted, listed
from dynamo_mpi.ops.doctor.check import Check, Context, Probe, Section, error, of_error, ok, skipped, warning
from dynamo_mpi.ops.run_dirs import NoRunDirError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


# a lease of 30 s is renewed three times; a slower answer indicates a disk that is too busy
_SLOW_SECONDS = 0.5
# certificates that a job creates for itself are valid from the minute before
_SKEW_SECONDS = 30.0
_LEASE_SECONDS = 10
# prefixes of Dynamo's keys, and of ours
PREFIXES = ("v1/", "dynamo_mpi/")


class EtcdAnswers(NamedTuple):
    """The answers of one endpoint.

    Args:
        endpoint: its URL.
        version: etcd's.
        seconds: duration of reading our records.
        skew: seconds by which its clock is ahead of ours; None if it isn't known.
        worlds: number of worker records in it.
    """

    endpoint: str
    version: str
    seconds: float
    skew: float | None
    worlds: int


def clients_of(context: Context) -> Mapping[str, str]:
    """Return the environment for the services' clients: with the run folder's or the services file's variables, or our own. It may contain
    credentials."""
    if context.run_dir is not None:
        return client_environment(context.run_dir, context.environ)
    with contextlib.suppress(DynamoMpiError):
        return clients_of_file(context.environ)
    return context.environ


def client_environment(run_dir: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return ``environ`` with the variables from a deployment's services.json; unchanged if there are none."""
    with contextlib.suppress(OSError, DynamoMpiError), open_run_dir(run_dir) as folder:
        services = read_services(folder)
        return {**environ, **({} if services is None else services.environment)}
    return dict(environ)


def check_run_dir(context: Context) -> Iterator[Check]:
    """Check whether the run folder has running services."""
    if context.run_dir is None:
        yield from _check_services_file(context)
        return
    path, problem = context.run_dir / SERVICES, "isn't there"
    try:
        with open_run_dir(context.run_dir) as folder:
            if read_services(folder) is not None:
                yield ok("run-dir", f"{path} says how to reach the services")
                return
            if folder.names() and not is_run_dir(folder):
                yield of_error("run-dir", NoRunDirError(context.run_dir))
                return
            problem = "can't be read" if SERVICES in folder.names() else problem
    except OSError:
        pass
    except DynamoMpiError as error:
        yield of_error("run-dir", error)
        return
    yield warning(
        "run-dir",
        f"{path} {problem}: the environment's addresses are asked",
        "that of a deployment whose services answer",
        "--run-dir DIR; dynamo-mpi launch makes it",
    )


def _check_services_file(context: Context) -> Iterator[Check]:
    if not (path := context.environ.get(SERVICES_FILE)):
        return
    try:
        clients_of_file(context.environ)
        yield ok("services-file", f"{path} says how to reach the services")
    except DynamoMpiError as error:
        yield of_error("services-file", error)


def check_etcd(context: Context) -> Iterator[Check]:
    """Check etcd. If no address is set, it is no error that none runs."""
    environ = clients_of(context)
    try:
        problems = check_etcd_endpoints(environ, context.left())
    except DiscoveryError as problem:
        yield of_error("etcd", problem) if is_named(environ) or context.in_rank else judge_unnamed(problem)
        return
    yield judge_endpoints(problems)
    endpoint = next(url for url, text in problems.items() if not text)
    try:
        yield from judge_answers(ask(endpoint, environ, time.monotonic() + context.left()))
        yield from check_write(context, endpoint)
    except AuthorizationError as problem:
        yield judge_refusal(problem, EtcdAuth.from_env(environ))
    except DiscoveryError as problem:
        needed = "an answer of its JSON gateway, by which launch and doctor ask"
        yield warning("etcd-read", problem.problem, needed, "etcd --enable-grpc-gateway, which is on by default")


def judge_unnamed(problem: DiscoveryError) -> Check:
    """Evaluate an etcd that doesn't answer at the default address."""
    needed = "an etcd for workers that are started by hand; launch, local and head_node bring their own"
    return warning("etcd", f"{problem.problem}, and ETCD_ENDPOINTS isn't set", needed, problem.fix)


def is_named(environ: Mapping[str, str]) -> bool:
    """Return whether an address of etcd is set."""
    return any(environ.get(name) for name in ("ETCD_ENDPOINTS", "HEAD_NODE_IP", "HEAD_NODE"))


def judge_endpoints(problems: Mapping[str, str]) -> Check:
    """Evaluate etcd's endpoints, of which at least one answers."""
    dead = [f"{strip_credentials(url)}: {text}" for url, text in problems.items() if text]
    if dead:
        needed = "all of them; those that answer are tried first"
        return warning(
            "etcd",
            f"{len(dead)} of {len(problems)} endpoints do not answer: {listed(dead)}",
            needed,
            "correct ETCD_ENDPOINTS, or look at those members",
        )
    return ok("etcd", f"{listed(map(strip_credentials, problems))}: healthy")


def ask(endpoint: str, environ: Mapping[str, str], end: float) -> EtcdAnswers:
    """Read the version and our records.

    Raises:
        DiscoveryError: no answer in time, or a refusal.
    """
    with HttpEtcdClient(endpoint, EtcdAuth.from_env(environ), end) as gateway:
        server = gateway.server_info()
        skew = None if server.clock is None else server.clock - time.time()
        gateway.authenticate()
        start = time.monotonic()
        worlds = len(gateway.get_prefix(worlds_of("")))
        return EtcdAnswers(endpoint, server.version, time.monotonic() - start, skew, worlds)


def judge_answers(answers: EtcdAnswers) -> Iterator[Check]:
    """Evaluate etcd's answers."""
    found = (
        f"etcd {answers.version}: read in {1000 * answers.seconds:.0f} ms; {counted(answers.worlds, 'worker')} recorded"
    )
    if answers.seconds > _SLOW_SECONDS:
        needed = f"an answer within {1000 * _SLOW_SECONDS:.0f} ms: leases, and so workers, are lost where etcd stalls"
        yield warning("etcd-read", found, needed, "a local disk for etcd's data, and a head node that isn't overloaded")
    else:
        yield ok("etcd-read", found)
    if is_outdated_etcd(answers.version):
        found = f"etcd {answers.version} has known security holes: a client without credentials can make it refuse all others"
        yield warning("etcd-version", found, SAFE_ETCD, f"{SAFE_ETCD} on PATH of the head node, or DYN_MPI_ETCD=PATH")
    if answers.skew is not None:
        yield judge_clock(answers.skew)


def judge_clock(skew: float) -> Check:
    """Evaluate the difference of the clocks, which is known to about a second."""
    if abs(skew) < _SKEW_SECONDS:
        return ok("clock", "this host's clock and etcd's agree")
    found = f"etcd's host is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this one"
    needed = "the same time everywhere: certificates, time limits and the order of failures go by it"
    return warning("clock", found, needed, "have NTP or chrony set up: timedatectl, chronyc tracking")


def check_write(context: Context, endpoint: str) -> Iterator[Check]:
    """Write to a worker's prefixes, if ``--write`` is set; the lease is revoked at once."""
    if not context.write:
        yield skipped("etcd-write", "not tried", "--write writes a key under each prefix, and deletes it")
        return
    with HttpEtcdClient(endpoint, EtcdAuth.from_env(clients_of(context)), time.monotonic() + context.left()) as gateway:
        gateway.authenticate()
        lease = gateway.grant(_LEASE_SECONDS).id
        try:
            for prefix in PREFIXES:
                gateway.put(f"{prefix}doctor/{lease:x}", b"", lease)
        finally:
            gateway.revoke(lease)
    yield ok("etcd-write", f"{listed(PREFIXES)} can be written")


def judge_refusal(problem: AuthorizationError, auth: EtcdAuth) -> Check:
    """Evaluate an etcd that answers but rejects our credentials."""
    who = f"user {auth.username!r}" if auth.username else "a client without a user"
    return error(
        "etcd-auth",
        f"{problem.problem} ({who})",
        f"readwrite on the prefixes {listed(PREFIXES)}",
        "correct ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD, or etcdctl role grant-permission --prefix=true ROLE readwrite PREFIX",
        ExitCode.NOT_AUTHORISED,
    )


def check_nats(context: Context) -> Iterator[Check]:
    """Check NATS, if it is used."""
    environ = clients_of(context)
    server = nats_server(environ, environ.get("DYN_REQUEST_PLANE", "tcp"))
    if server is None:
        yield skipped("nats", "not used: NATS_SERVER isn't set, and requests go by tcp")
        return
    start = time.monotonic()
    require_nats_server(server, environ, context.left())
    yield ok("nats", f"{strip_credentials(server)} lets us in, after {1000 * (time.monotonic() - start):.0f} ms")


SECTION = Section(
    "services",
    (Probe("run-dir", check_run_dir), Probe("etcd", check_etcd), Probe("nats", check_nats)),
)
