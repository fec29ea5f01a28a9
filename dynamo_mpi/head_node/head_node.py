# SPDX-License-Identifier: Apache-2.0
"""etcd, NATS and the frontend: what starts after what, when they are ready, and how they end.

A service counts as ready when *its own process* holds the port and answers there: on a shared node another job's etcd may answer
at the usual one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NoReturn

from dynamo_mpi.errors import BootstrapError, UsageError
from dynamo_mpi.exit_codes import ExitCode
from dynamo_mpi.head_node.environment import frontend_environment, server_environment
from dynamo_mpi.head_node.ports import Ports
from dynamo_mpi.services import programs
from dynamo_mpi.services.certificates import make_certificates
from dynamo_mpi.services.etcd import Etcd
from dynamo_mpi.services.failures import LOG_LINES, PartError
from dynamo_mpi.services.frontend import Frontend
from dynamo_mpi.services.host_address import service_address
from dynamo_mpi.services.nats import Nats, authorization
from dynamo_mpi.services.ports import ANY_ADDRESS, LOOPBACK
from dynamo_mpi.services.processes import Child
from dynamo_mpi.services.service import ServiceT, is_up, lost_its_port

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from dynamo_mpi.head_node.run_folder import RunFolder
    from dynamo_mpi.head_node.settings import Port, Settings
    from dynamo_mpi.services.certificates import Certificates
    from dynamo_mpi.services.interrupts import Interrupts

SCHEMA = 1
NATS_USER = "dynamo"
POLL_SECONDS, WATCH_SECONDS, SIGNAL_SECONDS = 0.05, 0.2, 0.5
# together less than the 30 s that Slurm leaves between SIGTERM and SIGKILL (KillWait)
STOP_SECONDS = {"frontend": 10.0, "nats": 5.0, "etcd": 5.0}


@dataclass
class _Start(Generic[ServiceT]):
    """A service on its way up."""

    make: Callable[[int], ServiceT]
    ports: Ports
    base: Mapping[str, str]
    service: ServiceT


class HeadNode:
    """The services, and their end. Use it from the main thread.

    Args:
        settings: what to start.
        run: the job's folder, held.
        private: a folder of this node's own, for data and keys.
        interrupts: looked at wherever we wait.
        say: takes one line of progress.
    """

    def __init__(
        self, settings: Settings, run: RunFolder, private: Path, interrupts: Interrupts, say: Callable[[str], None]
    ) -> None:
        self._settings, self._run, self._private = settings, run, private
        self._interrupts, self._say = interrupts, say
        self._started = time.monotonic()
        self._children: dict[str, Child] = {}

    def start(self) -> None:
        """Start all parts, wait until they answer, and publish how to reach them.

        Raises:
            UsageError: something is missing or can't be as asked.
            DiscoveryError: no port is free.
            PartError: a part ended, or was not ready in time.
            Interrupted: somebody wants an end.
        """
        settings = self._settings
        etcd_binary, nats_binary = programs.find_etcd(), programs.find_nats_server()
        if settings.frontend:
            programs.require_packages(programs.FRONTEND_PACKAGES)
        address = service_address(settings.address, "--address / DYN_MPI_ADDRESS / HEAD_NODE_IP")
        http_host = self._http_host(address)
        scratch = self._private / "scratch"
        scratch.mkdir()
        certificates, config, credentials = self._credentials(address)
        base = server_environment(os.environ, scratch)

        def make_etcd(port: int) -> Etcd:
            return Etcd(etcd_binary, port, self._private / "etcd", host=address, certificates=certificates)

        def make_nats(port: int) -> Nats:
            return Nats(nats_binary, port, self._private / "nats", host=address, config=config)

        starting_etcd = self._begin(make_etcd, settings.etcd_port, address, base)
        starting_nats = self._begin(make_nats, settings.nats_port, address, base)
        etcd, nats = self._settle(starting_etcd), self._settle(starting_nats)
        environment = {"ETCD_ENDPOINTS": etcd.url, "NATS_SERVER": nats.url, **credentials}
        url = None
        if settings.frontend:
            arguments = settings.frontend_arguments

            def make_frontend(port: int) -> Frontend:
                return Frontend(port, environment, host=http_host, reach=address, arguments=arguments)

            base = frontend_environment(os.environ, scratch, (address, http_host))
            url = self._settle(self._begin(make_frontend, settings.http_port, http_host, base)).url
        self._run.publish(services(url, settings.job_id, environment))
        self._say(f"{self._seconds():5.1f} s  ready: {self._run.services}")

    def watch(self) -> None:
        """Return never: raises ``Interrupted``, or ``PartError`` when a part ends."""
        while True:
            self._check_parts()
            self._interrupts.pause(WATCH_SECONDS)

    def stop(self) -> None:
        """End everything, etcd last. A further signal, or time, turns asking into killing. Idempotent."""
        with contextlib.suppress(OSError):  # a file system that fails us is no reason to leave them running
            self._run.retract()
        # at most one: a second may have come since the first was noticed
        signals_before = min(self._interrupts.count, 1)
        for name, seconds in STOP_SECONDS.items():
            if name in self._children:
                self._end(self._children[name], seconds, signals_before)

    def _http_host(self, address: str) -> str:
        chosen = self._settings.http_host
        if chosen is None:
            return address
        return chosen if chosen in ANY_ADDRESS else service_address(chosen, "--http-host / DYN_MPI_HTTP_HOST")

    def _credentials(self, address: str) -> tuple[Certificates | None, Path | None, dict[str, str]]:
        """Make what clients have to show; returns etcd's part, NATS's part, and the clients' variables."""
        if not self._settings.credentials:
            self._say("without credentials: whoever reaches etcd and NATS can use them")
            return None, None, {}
        if ":" in address:
            raise UsageError(
                f"etcd is to listen at {address} with certificates, and Dynamo's runtime takes no IPv6 address in an https:// endpoint",
                fix="an IPv4 --address, or --credentials none",
            )
        names = (address, LOOPBACK, "localhost", socket.gethostname())
        try:
            certificates = make_certificates(self._private / "certificates", names)
        except BootstrapError:
            self._interrupts.check()  # Ctrl-C and scancel end openssl as well
            raise
        password = secrets.token_hex(24)
        config = self._private / "nats.conf"
        config.touch(mode=0o600)
        config.write_text(authorization(NATS_USER, password))
        nats = {"NATS_AUTH_USERNAME": NATS_USER, "NATS_AUTH_PASSWORD": password}
        return certificates, config, {**certificates.client_environment(), **nats}

    def _begin(
        self, make: Callable[[int], ServiceT], port: Port, host: str, base: Mapping[str, str]
    ) -> _Start[ServiceT]:
        settings = self._settings
        wanted = {settings.etcd_port.number, settings.nats_port.number, settings.http_port.number}
        ports = Ports(port, host, settings.job_id, wanted - {port.number})
        start = _Start(make, ports, base, make(ports.next()))
        self._spawn(start)
        return start

    def _settle(self, start: _Start[ServiceT]) -> ServiceT:
        """Wait until a service answers; if its port was taken meanwhile, start it on the next."""
        while True:
            service, child = start.service, self._children[start.service.name]
            if child.exit_code() is not None:
                if not lost_its_port(child):
                    self._ended(child)
                start.service = start.make(start.ports.next())
                self._spawn(start)
            elif is_up(service, child):
                self._say(f"{self._seconds():5.1f} s  {service.name} at {service.url}")
                return service
            self._wait(service.name)

    def _spawn(self, start: _Start[ServiceT]) -> None:
        self._interrupts.check()
        name = start.service.name
        environment = {**start.base, **start.service.environment()}
        log = self._run.new_log(name)
        self._children[name] = Child.start(name, start.service.command(), environment=environment, log=log)

    def _wait(self, waiting_for: str) -> None:
        for name, child in self._children.items():
            if name != waiting_for and child.exit_code() is not None and not lost_its_port(child):
                self._ended(child)
        if self._seconds() > self._settings.start_timeout:
            raise late(self._children[waiting_for], self._settings.start_timeout)
        self._interrupts.pause(POLL_SECONDS)

    def _check_parts(self) -> None:
        for child in self._children.values():
            if child.exit_code() is not None:
                self._ended(child)

    def _ended(self, child: Child) -> NoReturn:
        self._interrupts.pause(SIGNAL_SECONDS)  # scancel signals the parts as well as us, in any order
        raise ended(child)

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _end(self, child: Child, seconds: float, signals_before: int) -> None:
        child.send(signal.SIGTERM)
        end = time.monotonic() + seconds
        while child.exit_code() is None and time.monotonic() < end and self._interrupts.count == signals_before:
            self._interrupts.sleep(POLL_SECONDS)
        child.kill()


def services(url: str | None, job_id: str | None, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return what ``services.json`` holds. Keys are only ever added.

    Args:
        url: the frontend's; None where there is none.
        job_id: Slurm's.
        environment: what workers need in theirs.
    """
    return {
        "schema": SCHEMA,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "job_id": job_id,
        "url": url,
        "environment": dict(environment),
    }


def ended(child: Child) -> PartError:
    """Return the error for a part that ended although it was to go on."""
    status = ExitCode.ENGINE if child.name == "frontend" else ExitCode.UNAVAILABLE
    found = f"{child.name} ended with exit code {child.exit_code()}"
    return _part_error(child, found, status, f"read {child.log}")


def late(child: Child, seconds: float) -> PartError:
    """Return the error for a part that was not ready in time."""
    found = f"{child.name} does not answer after {seconds:g} s"
    return _part_error(child, found, ExitCode.DEADLINE, f"read {child.log}, or a longer --start-timeout")


def _part_error(child: Child, found: str, status: int, fix: str) -> PartError:
    return PartError(found, part=child.name, status=status, log="\n".join(child.last_lines(LOG_LINES)), fix=fix)
