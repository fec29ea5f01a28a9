# SPDX-License-Identifier: Apache-2.0
"""Starts etcd, NATS and the frontend on this host, waits until they are ready, watches them, and ends them.

A service is ready when *its own process* listens at the port and answers: on a shared node another job's etcd may answer at the default port.
"""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic

from dynamo_mpi.common.credentials import SERVICES_FILE
from dynamo_mpi.common.errors import DynamoMpiError, ExitCode
from dynamo_mpi.common.own_files import write_own
from dynamo_mpi.common.process import raise_nofile_limit_to_hard
from dynamo_mpi.common.subprocess import POLL_SECONDS, LoggedProcess, stop
from dynamo_mpi.deploy.certificates import make_credentials
from dynamo_mpi.deploy.services import LOG_LINES, ProcessExited, ServiceT, StartTimeout, is_up, lost_its_port
from dynamo_mpi.discovery.runtime_compat import has_nats_tls, runtime_version

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from dynamo_mpi.common.signals import Interrupts
    from dynamo_mpi.deploy.certificates import Credentials

WATCH_SECONDS, SIGNAL_SECONDS = 0.2, 0.5
_KILLED = "look in the kernel's log (dmesg) whether memory ran out"
# together less than the 30 s between Slurm's SIGTERM and SIGKILL (KillWait); the frontend waits for open streams, 7 to 9 s as seen
STOP_SECONDS = {"frontend": 15.0, "nats": 4.0, "etcd": 5.0}


@dataclass
class StartingService(Generic[ServiceT]):
    """A service that is starting.

    Args:
        make: creates the service for a port.
        next_port: returns the next port to try; None if there is no other.
        environment: its base environment.
        service: the running service.
    """

    make: Callable[[int], ServiceT]
    next_port: Callable[[], int | None]
    environment: Mapping[str, str]
    service: ServiceT


class ServiceStack:
    """The processes of one stack on this host. Use it from the main thread.

    Args:
        folder: private folder of this run, for data, logs and scratch files.
        interrupts: checked in every wait.
        say: prints one line of progress.
        start_timeout: time limit in seconds until all are ready.
    """

    def __init__(self, folder: Path, interrupts: Interrupts, say: Callable[[str], None], start_timeout: float) -> None:
        self._folder, self._scratch = folder, folder / "scratch"
        self._interrupts, self._say, self._start_timeout = interrupts, say, start_timeout
        self._began = time.monotonic()
        self._processes: dict[str, LoggedProcess] = {}
        self._starting: set[str] = set()
        self.seconds: dict[str, float] = {}
        """Seconds since the start, by milestone."""

    @property
    def age(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    @property
    def processes(self) -> dict[str, list[int]]:
        """The running processes of each part."""
        return {name: process.members() for name, process in self._processes.items()}

    def mark(self, milestone: str, text: str) -> None:
        """Record when a milestone was reached, and print it."""
        self.seconds[milestone] = seconds = self.age
        self._say(f"{seconds:5.1f} s  {text}")

    def make_credentials(self, *names: str) -> Credentials:
        """Create the credentials of this run's services, which have these addresses and host names.

        Raises:
            UsageError: openssl isn't installed.
            DynamoMpiError: it failed.
            Interrupted: a signal requests the end.
        """
        try:
            return make_credentials(self._folder, names, nats_tls=has_nats_tls(runtime_version()))
        except DynamoMpiError:
            self._interrupts.check()  # Ctrl-C and scancel also end openssl
            raise

    def write_services(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Write addresses and credentials to a file in the private folder; return the variable that names it, for clients of the services."""
        place = self._folder / "clients.json"
        write_own(place, json.dumps({"environment": dict(environment)}).encode())
        return {SERVICES_FILE: str(place)}

    def start_service(
        self, make: Callable[[int], ServiceT], next_port: Callable[[], int | None], environment: Mapping[str, str]
    ) -> StartingService[ServiceT]:
        """Start a service; `wait_ready` waits for it.

        Args:
            make: creates the service for a port.
            next_port: returns a port to try, each time another; None if there is no other. May raise.
            environment: its base environment.

        Raises:
            Interrupted: a signal requests the end.
        """
        raise_nofile_limit_to_hard()
        port = next_port()
        assert port is not None  # noqa: S101 - the first always is
        start = StartingService(make, next_port, environment, make(port))
        self._spawn_service(start)
        return start

    def wait_ready(self, start: StartingService[ServiceT]) -> ServiceT:
        """Wait until a service answers; if its port was taken meanwhile, start it on the next.

        Raises:
            ProcessExited: it or another one ended.
            StartTimeout: the time limit is reached.
            Interrupted: a signal requests the end.
        """
        while True:
            service, process = start.service, self._processes[start.service.name]
            if process.exit_code() is not None:
                port = start.next_port() if lost_its_port(process) else None
                if port is None:
                    raise self._exited(process)
                start.service = start.make(port)
                self._spawn_service(start)
            elif is_up(service, process):
                self._starting.discard(service.name)
                self.mark(service.name, f"{service.name} at {service.url}")
                return service
            self.wait(service.name, "it does not answer")

    def spawn(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a process.

        Raises:
            Interrupted: a signal requests the end.
        """
        self._interrupts.check()
        self._processes[name] = LoggedProcess(name, command, environment=environment, log=self._new_log(name))

    def wait(self, name: str, state: str) -> None:
        """Wait a moment for a process to become ready.

        Args:
            name: the process's name.
            state: why it isn't ready, for the error.

        Raises:
            ProcessExited: any process ended.
            StartTimeout: the time limit is reached.
            Interrupted: a signal requests the end.
        """
        self.check()
        if self.age > self._start_timeout:
            process = self._processes[name]
            raise StartTimeout(
                f"{name} is not ready after {self._start_timeout:g} s: {state}",
                part=name,
                status=ExitCode.DEADLINE,
                log=self._log_of(process),
                expected=f"an answer within {self._start_timeout:g} s",
                fix=self._timeout_fix(process),
            )
        self._interrupts.pause(POLL_SECONDS)

    def check(self) -> None:
        """Raise `ProcessExited` if a process has ended, unless it is a service that can still be started on another port."""
        for name, process in self._processes.items():
            if process.exit_code() is not None and not (name in self._starting and lost_its_port(process)):
                raise self._exited(process)

    def watch(self) -> None:
        """Does not return: raises ``Interrupted``, or `ProcessExited` when a process ends."""
        while True:
            self.check()
            self._interrupts.pause(WATCH_SECONDS)

    def stop(self) -> None:
        """End the services, etcd last. After another signal, or at the time limit, they are killed. Idempotent."""
        # at most one: a second may have arrived since the first was handled
        signals_before = min(self._interrupts.count, 1)
        for name, seconds in STOP_SECONDS.items():
            if name in self._processes:
                stop([self._processes[name]], seconds, self._interrupts, signals_before)

    def _spawn_service(self, start: StartingService[ServiceT]) -> None:
        service = start.service
        self._starting.add(service.name)
        self.spawn(service.name, service.command(), {**start.environment, **service.environment()})

    def _exited(self, process: LoggedProcess) -> ProcessExited:
        self._interrupts.pause(
            SIGNAL_SECONDS
        )  # a command that ends us, such as scancel, also signals our children, in any order
        code = process.exit_code()
        # not a launcher's code for a rank that was killed
        killed = process.popen.returncode == -signal.SIGKILL
        return ProcessExited(
            f"{process.name} ended with exit code {code}" + (": killed by SIGKILL" if killed else ""),
            part=process.name,
            status=self._status_of(process),
            log=self._log_of(process),
            expected="a process that runs until it is asked to end",
            fix=f"{_KILLED}; {self._exit_fix(process)}" if killed else self._exit_fix(process),
        )

    # methods that differ between stacks

    def _new_log(self, name: str) -> Path:
        """Return the log file of a process."""
        return self._folder / f"{name}.log"

    def _status_of(self, process: LoggedProcess) -> int:
        """Return the exit code after a process has ended."""
        return ExitCode.ENGINE if process.name == "frontend" else ExitCode.UNAVAILABLE

    def _log_of(self, process: LoggedProcess) -> str:
        """Return the end of a process's log."""
        return "\n".join(process.last_lines(LOG_LINES))

    def _exit_fix(self, process: LoggedProcess) -> str:
        """Return the fix after a process has ended."""
        return "correct what the lines above name"

    def _timeout_fix(self, process: LoggedProcess) -> str:
        """Return the fix for a process that isn't ready in time."""
        return ""
