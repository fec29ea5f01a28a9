# SPDX-License-Identifier: Apache-2.0
"""etcd, NATS and Dynamo's frontend as child processes: command lines, environments, addresses, readiness, and the errors of their end."""

from __future__ import annotations

import http.client
import json
import site
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import urlsplit

from dynamo_mpi.common.display import shell_word
from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.ports import ANY_ADDRESS, LOOPBACK, holds_port, in_url

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping
    from pathlib import Path

    from dynamo_mpi.common.subprocess import LoggedProcess
    from dynamo_mpi.deploy.certificates import Certificates, Credentials

LOG_LINES = 20


class ServiceError(DynamoMpiError):
    """A process of the stack failed.

    Args:
        problem: one sentence without a full stop.
        status: the exit code; any code is possible, as a worker's own is passed on.
        log: the end of its log, to be printed unchanged.
        part: the name of the process.
        expected: what is expected.
        fix: the fix.
    """

    def __init__(
        self, problem: str, *, status: int, log: str, part: str = "", expected: str = "", fix: str = ""
    ) -> None:
        super().__init__(problem, expected=expected, fix=fix)
        self.part, self.status, self.log = part, status, log


class ProcessExited(ServiceError):
    """A process ended unexpectedly."""


class StartTimeout(ServiceError):
    """A process was not ready in time."""


class StepFailed(ServiceError):
    """A step of a deployment ended, and the deployment with it."""


class Service(Protocol):
    """A service with one port."""

    @property
    def name(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def url(self) -> str: ...
    def command(self) -> tuple[str, ...]: ...
    def environment(self) -> dict[str, str]: ...
    def answers(self) -> bool: ...


ServiceT = TypeVar("ServiceT", bound=Service)


@dataclass(frozen=True)
class Etcd:
    """etcd, for discovery. Its data isn't needed after the run, so it skips fsync.

    Args:
        binary: etcd's program.
        port: the port for clients.
        data: its data folder, which it creates.
        host: the address for clients.
        certificates: for mutual TLS with clients and peers; None accepts all clients.
    """

    binary: Path
    port: int
    data: Path
    name: str = "etcd"
    host: str = LOOPBACK
    certificates: Certificates | None = None

    @property
    def url(self) -> str:
        scheme = "http" if self.certificates is None else "https"
        return f"{scheme}://{in_url(self.host)}:{self.port}"

    def command(self) -> tuple[str, ...]:
        # Port 0: no other member joins, so the peer port may be any.
        peer = f"{'http' if self.certificates is None else 'https'}://{LOOPBACK}:0"
        return (
            *(str(self.binary), "--data-dir", str(self.data), "--log-level", "warn", "--unsafe-no-fsync"),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"default={peer}"),
            *(
                "--heartbeat-interval",
                "20",
                "--election-timeout",
                "100",
            ),  # it elects itself: no need to wait for a second
            *self._tls_flags(),
        )

    def environment(self) -> dict[str, str]:
        # with this variable, it would notify our service manager, such as systemd, that we are ready
        return {"NOTIFY_SOCKET": ""}

    def answers(self) -> bool:
        tls = None if self.certificates is None else self.certificates.client_context
        status, body = get_json(self.port, "/health", host=self.host, tls=tls)
        return status == 200 and str(body.get("health")) == "true"

    def version(self) -> str:
        """Return the running server's version; empty if it doesn't answer."""
        tls = None if self.certificates is None else self.certificates.client_context
        return str(get_json(self.port, "/version", host=self.host, tls=tls)[1].get("etcdserver", ""))

    def _tls_flags(self) -> tuple[str, ...]:
        if self.certificates is None:
            return ()
        files = self.certificates
        flags: list[str] = []
        for side, only in (("", "--client-cert-auth"), ("peer-", "--peer-client-cert-auth")):
            flags += [f"--{side}cert-file", str(files.server), f"--{side}key-file", str(files.server_key)]
            flags += [f"--{side}trusted-ca-file", str(files.authority), only]
        return tuple(flags)


@dataclass(frozen=True)
class Nats:
    """NATS, for events, and for requests with ``--request-plane nats``.

    Args:
        binary: the program nats-server.
        port: the port for clients.
        data: folder for JetStream's store.
        host: the address for clients.
        credentials: what it asks of clients, by a file, as a password must not appear in a command line; None accepts all clients.
    """

    binary: Path
    port: int
    data: Path
    name: str = "nats"
    host: str = LOOPBACK
    credentials: Credentials | None = None

    @property
    def url(self) -> str:
        is_tls = self.credentials is not None and self.credentials.nats_tls
        return f"{'tls' if is_tls else 'nats'}://{in_url(self.host)}:{self.port}"

    def command(self) -> tuple[str, ...]:
        config = () if self.credentials is None else ("-c", str(self.credentials.nats_config))
        return (str(self.binary), *config, "-a", self.host, "-p", str(self.port), "-js", "-sd", str(self.data))

    def environment(self) -> dict[str, str]:
        return {}

    def answers(self) -> bool:
        try:
            with socket.create_connection((self.host, self.port), timeout=PROBE_SECONDS) as connection:
                return connection.recv(5) == b"INFO "
        except OSError:
            return False


@dataclass(frozen=True)
class Frontend:
    """Dynamo's OpenAI-compatible HTTP server.

    It copies every model's tokenizer to ``~/.cache/dynamo``.

    Args:
        port: its HTTP port.
        discovery: variables by which it finds etcd and NATS, see `ServiceStack.write_services`.
        home: its ``HOME``; None for the user's own.
        host: the address to listen at.
        reach: the address to connect to, if ``host`` means all addresses.
        arguments: further words for its command line.
    """

    port: int
    discovery: Mapping[str, str]
    home: Path | None = None
    name: str = "frontend"
    host: str = LOOPBACK
    reach: str = LOOPBACK
    arguments: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"http://{in_url(self._reached_at)}:{self.port}"

    def command(self) -> tuple[str, ...]:
        own = (sys.executable, "-m", "dynamo_mpi.common.run_with_services", "dynamo.frontend")
        return (*own, "--http-host", in_url(self.host), "--http-port", str(self.port), *self.arguments)

    def environment(self) -> dict[str, str]:
        if self.home is None:
            return dict(self.discovery)
        # Python also finds packages of pip's --user by HOME.
        return {**self.discovery, "HOME": str(self.home), "PYTHONUSERBASE": site.getuserbase()}

    def answers(self) -> bool:
        return get_json(self.port, "/live", host=self._reached_at)[0] == 200

    def models(self) -> list[str]:
        """Return the names of the models it serves now."""
        return listed_models(self.url, PROBE_SECONDS) or []

    @property
    def _reached_at(self) -> str:
        return self.reach if self.host in ANY_ADDRESS else self.host


def is_up(service: Service, child: LoggedProcess) -> bool:
    """Return whether a service answers, and is this child: another process may have taken its port."""
    return holds_port(child.pid, service.port) and service.answers()


def lost_its_port(child: LoggedProcess) -> bool:
    """Return whether a service ended because its port was taken."""
    return any("already in use" in line for line in child.last_lines(LOG_LINES))


def listed_models(url: str, seconds: float = 5.0) -> list[str] | None:
    """Return the models that a frontend lists; None if it doesn't answer.

    Args:
        url: the frontend's.
        seconds: time limit for the answer.
    """
    parts = urlsplit(url)
    status, body = get_json(parts.port or 80, "/v1/models", host=parts.hostname or "", seconds=seconds)
    try:
        return [str(model["id"]) for model in body["data"]] if status == 200 else None
    except (KeyError, TypeError):
        return None


def curl_line(url: str, model: str, **options: int) -> str:
    """Return a command that asks a frontend, for a person to paste.

    Args:
        url: the frontend's.
        model: the model's served name.
        options: further members of the request.
    """
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}], **options})
    words = ("curl", "-s", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body)
    return " ".join(map(shell_word, words))


PROBE_SECONDS = 1.0


def get_json(
    port: int, path: str, *, host: str = LOOPBACK, tls: ssl.SSLContext | None = None, seconds: float = PROBE_SECONDS
) -> tuple[int, dict[str, Any]]:
    """Send a GET request; the status is 0 if the service doesn't answer.

    Args:
        port: the service's port.
        path: the URL's path.
        host: the service's address.
        tls: TLS context; None for plain HTTP.
        seconds: the timeout of each read.
    """
    connection = (
        http.client.HTTPConnection(host, port, timeout=seconds)
        if tls is None
        else http.client.HTTPSConnection(host, port, timeout=seconds, context=tls)
    )
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = json.loads(response.read() or b"{}")
        return response.status, body if isinstance(body, dict) else {}
    except (OSError, http.client.HTTPException, ValueError):
        return 0, {}
    finally:
        connection.close()
