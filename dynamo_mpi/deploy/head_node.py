# SPDX-License-Identifier: Apache-2.0
"""The services of one job on its head node: etcd, NATS and the Dynamo frontend.

``python -m dynamo_mpi.head_node --run-dir DIR`` starts them, writes their addresses and credentials to ``DIR/services.json``, and stops them
with the job. It is one Slurm task, or a command in a terminal.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.display import without_controls
from dynamo_mpi.common.errors import DiscoveryError, DynamoMpiError, ExitCode, UsageError, of_signal
from dynamo_mpi.common.files import private_dir
from dynamo_mpi.common.host_address import service_address
from dynamo_mpi.common.os_errors import exhausted, of_os_error
from dynamo_mpi.common.ports import ANY_ADDRESS, LOOPBACK, holder, is_free
from dynamo_mpi.common.process import forbid_core_dumps
from dynamo_mpi.common.signals import Interrupted, Interrupts
from dynamo_mpi.common.subprocess import with_pdeathsig
from dynamo_mpi.deploy import programs
from dynamo_mpi.deploy.certificates import Credentials
from dynamo_mpi.deploy.head_node_settings import MAX_PORT, Port, Settings, load_settings
from dynamo_mpi.deploy.programs import frontend_environment, server_environment
from dynamo_mpi.deploy.run_dir import ServicesDir
from dynamo_mpi.deploy.service_stack import ServiceStack
from dynamo_mpi.deploy.services import Etcd, Frontend, Nats, ServiceError
from dynamo_mpi.discovery.etcd import SAFE_ETCD, is_outdated_etcd

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo_mpi.common.subprocess import LoggedProcess

SPREAD, FURTHER = 500, 10


def offset(job_id: str | None) -> int:
    """Return the offset for a port in use: 1 to 500, from the job's id, so that jobs on one node rarely collide."""
    digits = job_id if job_id is not None and job_id.isdecimal() else "0"
    return 1 + int(digits) % SPREAD


def candidates(port: Port, job_id: str | None) -> list[int]:
    """Return the ports to try, in order: the requested one; unless the user named it, that + offset; then in steps of 500."""
    if port.fixed:
        return [port.number]
    further = [port.number + offset(job_id) + SPREAD * step for step in range(FURTHER)]
    return [port.number, *(number for number in further if number <= MAX_PORT)]


class Ports:
    """The ports of one address that a service may still try.

    Args:
        port: the requested one.
        host: the address.
        job_id: Slurm's job id.
        others: ports of the job's other services, which this one must not use.
    """

    def __init__(self, port: Port, host: str, job_id: str | None, others: Collection[int] = ()) -> None:
        self._port, self._host = port, host
        self._all = [number for number in candidates(port, job_id) if number not in others]
        self._left: Iterator[int] = iter(self._all)

    def next(self) -> int:
        """Return the next free port.

        Raises:
            UsageError: the port that the user named is in use.
            DiscoveryError: all are in use.
        """
        for number in self._left:
            if is_free(number, self._host):
                return number
        wanted, setting = self._port.number, self._port.setting
        by = holder(wanted)
        taken = f"port {wanted} of {self._host} is taken" + (f" by {by}" if by else ", or this user may not have it")
        if self._port.fixed:
            raise UsageError(taken, expected="a free port", fix=f"another {setting}, or none: then a free one is taken")
        raise DiscoveryError(
            f"{taken}, and so are the {len(self._all) - 1} others that this job tries, up to {self._all[-1]}",
            expected="one free port of these",
            fix=f"name a free one by {setting}, or look for what earlier jobs have left on this node",
        )


SCHEMA = 1


class HeadNode(ServiceStack):
    """The services of a job. Use it from the main thread.

    Args:
        settings: the services' settings.
        run: the job's folder, locked.
        private: a folder on this node, for data and keys.
        interrupts: checked in every wait.
        say: prints one line of progress.
    """

    def __init__(
        self, settings: Settings, run: ServicesDir, private: Path, interrupts: Interrupts, say: Callable[[str], None]
    ) -> None:
        super().__init__(private, interrupts, say, settings.start_timeout)
        self._settings, self._run = settings, run

    def start(self) -> None:
        """Start all services, wait until they answer, and publish their addresses and credentials.

        Raises:
            UsageError: something is missing, or a setting can't be used.
            DiscoveryError: no port is free.
            ProcessExited: a service ended.
            StartTimeout: a service was not ready in time.
            Interrupted: a signal requests the end.
        """
        settings = self._settings
        etcd_binary, nats_binary = programs.find_etcd(settings.etcd), programs.find_nats_server()
        if settings.frontend:
            programs.require_packages(programs.FRONTEND_PACKAGES)
        address = service_address(settings.address, "--address / DYN_MPI_ADDRESS / HEAD_NODE_IP")
        http_host = self._http_host(address)
        self._scratch.mkdir()
        credentials = self._credentials(address)
        certificates = None if credentials is None else credentials.certificates

        def make_etcd(port: int) -> Etcd:
            return Etcd(etcd_binary, port, self._folder / "etcd", host=address, certificates=certificates)

        def make_nats(port: int) -> Nats:
            return Nats(nats_binary, port, self._folder / "nats", host=address, credentials=credentials)

        variables = server_environment(os.environ, self._scratch)
        starting_etcd = self.start_service(make_etcd, self._ports(settings.etcd_port, address), variables)
        starting_nats = self.start_service(make_nats, self._ports(settings.nats_port, address), variables)
        etcd, nats = self.wait_ready(starting_etcd), self.wait_ready(starting_nats)
        if is_outdated_etcd(version := etcd.version()):
            self._say(
                f"etcd {version} ({etcd_binary}) has known security holes: a client without credentials can make it refuse all others; "
                f"expected: {SAFE_ETCD}; fix: put one on PATH, or --etcd PATH (DYN_MPI_ETCD)"
            )
        secrets = {} if credentials is None else credentials.client_environment
        environment = {"ETCD_ENDPOINTS": etcd.url, "NATS_SERVER": nats.url, **secrets}
        url = None
        if settings.frontend:
            clients = self.write_services(environment)

            def make_frontend(port: int) -> Frontend:
                arguments = settings.frontend_arguments
                return Frontend(port, clients, host=http_host, reach=address, arguments=arguments)

            variables = frontend_environment(os.environ, self._scratch, (address, http_host))
            ports = self._ports(settings.http_port, http_host)
            url = self.wait_ready(self.start_service(make_frontend, ports, variables)).url
        self._run.publish(services(url, settings.job_id, environment))
        self.mark("ready", f"ready: {self._run.services_file}")

    def stop(self) -> None:
        """End all services, etcd last. After another signal, or at the time limit, they are killed. Idempotent."""
        with contextlib.suppress(OSError):  # an error of the file system must not leave them running
            self._run.retract()
        super().stop()

    def _http_host(self, address: str) -> str:
        chosen = self._settings.http_host
        if chosen is None:
            return address
        return chosen if chosen in ANY_ADDRESS else service_address(chosen, "--http-host / DYN_MPI_HTTP_HOST")

    def _credentials(self, address: str) -> Credentials | None:
        if not self._settings.credentials:
            self._say("without credentials: every process that can reach etcd and NATS can use them")
            return None
        if ":" in address:
            raise UsageError(
                f"etcd is to listen at {address} with certificates, and Dynamo's runtime takes no IPv6 address in an https:// endpoint",
                expected="an IPv4 address, or etcd without certificates",
                fix="an IPv4 --address, or --credentials none",
            )
        return self.make_credentials(address, LOOPBACK, "localhost", socket.gethostname())

    def _ports(self, port: Port, host: str) -> Callable[[], int]:
        settings = self._settings
        wanted = {settings.etcd_port.number, settings.nats_port.number, settings.http_port.number}
        return Ports(port, host, settings.job_id, wanted - {port.number}).next

    def _new_log(self, name: str) -> Path:
        return self._run.new_log(name)

    def _exit_fix(self, process: LoggedProcess) -> str:
        return exhausted(self._folder, process.output()) or f"read {process.log}"

    def _timeout_fix(self, process: LoggedProcess) -> str:
        return f"read {process.log}, or a longer --start-timeout"


def services(url: str | None, job_id: str | None, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of ``services.json``. Keys are added, never removed.

    Args:
        url: the frontend's URL; None if there is no frontend.
        job_id: Slurm's.
        environment: variables that workers need.
    """
    return {
        "schema": SCHEMA,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "job_id": job_id,
        "url": url,
        "environment": dict(environment),
    }


PREFIX = "dynamo-mpi-services-"
CHECKED = "head node: check: passed"
"""The line after which the services start; `launch` waits for it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Start the services and wait for the end.

    Args:
        argv: the arguments; None for ``sys.argv``.

    Returns:
        the exit code: 0 after SIGTERM or Ctrl-C, 128 + n if they came before everything was ready; else see ``dynamo_mpi.common.errors``.
    """
    os.umask(0o077)  # all files of the services are for this user only
    forbid_core_dumps()
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except ServiceError as error:
        if error.log:
            _say("\n".join(f"[{error.part}] {line}" for line in error.log.splitlines()))
        _say(str(error))
        return error.status
    except DynamoMpiError as error:
        _say(str(error))
        return error.exit_code
    except OSError as error:
        refused = of_os_error(error)
        _say(str(refused))
        return refused.exit_code


def _run(argv: list[str]) -> int:
    settings = load_settings(argv, os.environ)
    if settings.check:
        if code := _run_check(settings.check):
            return code
        _say(CHECKED.partition(": ")[2])
    ready = False
    try:
        with (
            Interrupts() as interrupts,
            contextlib.closing(ServicesDir(settings.run_dir, settings.job_id, _say)) as run,
            private_dir(prefix=PREFIX) as private,
        ):
            head_node = HeadNode(settings, run, private, interrupts, _say)
            try:
                head_node.start()
                ready = True
                head_node.watch()
            except Interrupted as end:
                _say(f"{end}: stopping (again: at once)")
                raise
            finally:
                head_node.stop()
    except Interrupted as end:
        return ExitCode.OK if ready else end.exit_code
    return ExitCode.OK  # pragma: no cover - the services are watched until something is raised


def _run_check(flags: Sequence[str]) -> int:
    """Run `dynamo-mpi check`, whose output is ours; return its exit code."""
    command = [sys.executable, "-m", "dynamo_mpi", "check", *flags]
    code = subprocess.run(with_pdeathsig(command, parent=os.getpid()), stdin=subprocess.DEVNULL, check=False).returncode
    return code if code >= 0 else of_signal(-code)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the reader of our output has exited: no reason to end the services
        print(without_controls(f"head node: {text}"), file=sys.stderr, flush=True)
