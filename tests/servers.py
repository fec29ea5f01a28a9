# SPDX-License-Identifier: Apache-2.0
"""Real etcd and NATS servers on free loopback ports, and ports on which something else than a server waits."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dynamo_mpi.common.ports import free_port
from dynamo_mpi.deploy.certificates import Certificates, Credentials
from dynamo_mpi.deploy.programs import find_etcd, find_nats_server
from dynamo_mpi.deploy.services import Etcd, Nats

START_SECONDS = 20.0
"""A server is up in a fraction of one; a busy machine may take longer."""


@contextlib.contextmanager
def running(make: Callable[[Path], Etcd | Nats]) -> Iterator[str]:
    """Run a service until the block ends; its address is the value.

    Args:
        make: builds the service, given an empty folder for its data.
    """
    with tempfile.TemporaryDirectory(prefix="service-") as folder:
        service = make(Path(folder))
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(service.command(), stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not service.answers():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{service.name} did not start: {(Path(folder) / 'log').read_text()[-2000:]}")
                time.sleep(0.02)
            yield service.url
        finally:
            process.kill()
            process.wait()


def running_etcd(port: int | None = None) -> contextlib.AbstractContextManager[str]:
    """Run etcd on ``port``, or a free one; the value is its ``http://HOST:PORT``."""
    return running(lambda folder: Etcd(find_etcd(), port or free_port(), folder))


def running_secured_etcd(certificates: Certificates) -> contextlib.AbstractContextManager[str]:
    """Run an etcd with TLS in both directions; the value is its ``https://HOST:PORT``."""
    return running(lambda folder: Etcd(find_etcd(), free_port(), folder, certificates=certificates))


def running_nats(config: str = "", port: int | None = None) -> contextlib.AbstractContextManager[str]:
    """Run NATS on ``port``, or a free one; the value is its ``nats://HOST:PORT``.

    Args:
        config: of the server, credentials say.
        port: a certain one.
    """

    def make(folder: Path) -> Nats:
        file = folder / "nats.conf"
        file.write_text(config)
        credentials = Credentials(Certificates(folder), file, {}) if config else None
        return Nats(find_nats_server(), port or free_port(), folder / "data", credentials=credentials)

    return running(make)


@contextlib.contextmanager
def listening(behave: Callable[[socket.socket], None] = lambda connection: None, port: int = 0) -> Iterator[int]:
    """Accept connections on a loopback port until the block ends; the port is the value.

    Args:
        behave: what to do with each connection; by default nothing at all. Connections stay open until the block ends.
        port: a certain one, instead of any that is free.
    """
    connections: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # shut down below
            connections.append(connection)
            threading.Thread(target=_quietly, args=(behave, connection), daemon=True).start()

    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            # close() alone wouldn't wake the thread from accept()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in connections:
                connection.close()


def _quietly(behave: Callable[[socket.socket], None], connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other side, or the end of the test, may close it at any time
        behave(connection)


def say(text: bytes) -> Callable[[socket.socket], None]:
    """Return a behaviour that sends ``text`` and then waits."""
    return lambda connection: connection.sendall(text)


def reply(text: bytes) -> Callable[[socket.socket], None]:
    """Return a behaviour that reads a request, sends ``text`` and closes."""

    def behave(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(text)
        connection.shutdown(socket.SHUT_RDWR)

    return behave


def drip(text: bytes, seconds: float) -> Callable[[socket.socket], None]:
    """Return a behaviour that reads a request and sends ``text`` over and over, one byte every ``seconds``."""

    def behave(connection: socket.socket) -> None:
        connection.recv(65536)
        while True:
            for byte in text:
                connection.sendall(bytes([byte]))
                # the pace is what this stands in for
                time.sleep(seconds)

    return behave


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """Hold a loopback port without a listener, so that no other process takes it meanwhile."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
