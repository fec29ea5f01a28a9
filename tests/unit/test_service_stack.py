# SPDX-License-Identifier: Apache-2.0
"""The stack of services with small servers in place of etcd, NATS and the frontend: real processes and ports."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.common.ports import free_port, loopback_ports
from dynamo_mpi.common.signals import Interrupted, Interrupts
from dynamo_mpi.common.subprocess import LoggedProcess, await_exit, stop
from dynamo_mpi.deploy.service_stack import ServiceStack
from dynamo_mpi.deploy.services import ProcessExited, StartTimeout
from tests.dynamo.running import eventually

SERVE = "import socket, sys, time; server = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(600)"
SECONDS = 60.0


@dataclass(frozen=True)
class Server:
    """A service that is ready once it listens, if it ever answers."""

    port: int
    name: str = "etcd"
    script: str = SERVE
    ready: bool = True

    @property
    def url(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def command(self) -> tuple[str, ...]:
        return (sys.executable, "-I", "-S", "-c", self.script, str(self.port))

    def environment(self) -> dict[str, str]:
        return {}

    def answers(self) -> bool:
        return self.ready


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    with Interrupts() as noted:
        yield noted


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def stack(tmp_path: Path, interrupts: Interrupts, said: list[str]) -> Iterator[ServiceStack]:
    made = ServiceStack(tmp_path, interrupts, said.append, SECONDS)
    yield made
    made.stop()
    assert not any(made.processes.values())


def test_a_service_is_ready_when_it_answers(stack: ServiceStack, said: list[str]) -> None:
    service = stack.wait_ready(stack.start_service(Server, loopback_ports(), os.environ))
    assert said[0].endswith(f" s  etcd at {service.url}")
    assert stack.seconds.keys() == {"etcd"}
    stack.check()


def test_a_lost_port_is_replaced_by_the_next(stack: ServiceStack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = iter([taken.getsockname()[1], free := free_port()])
        assert stack.wait_ready(stack.start_service(Server, lambda: next(ports, None), os.environ)).port == free


def test_a_lost_port_without_another_ends_the_start(stack: ServiceStack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        start = stack.start_service(Server, loopback_ports(taken.getsockname()[1]), os.environ)
        with pytest.raises(ProcessExited, match="etcd ended with exit code 1") as caught:
            stack.wait_ready(start)
    assert (caught.value.part, caught.value.status) == ("etcd", ExitCode.UNAVAILABLE)
    assert "already in use" in caught.value.log


def test_the_end_of_another_service_ends_the_wait(stack: ServiceStack) -> None:
    start = stack.start_service(lambda port: Server(port, ready=False), loopback_ports(), os.environ)
    stack.start_service(lambda port: Server(port, "nats", "raise SystemExit('no disk')"), loopback_ports(), os.environ)
    with pytest.raises(ProcessExited, match="nats ended with exit code 1") as caught:
        stack.wait_ready(start)
    assert caught.value.log == "no disk"


def test_a_service_that_does_not_answer_in_time_is_named(
    tmp_path: Path, interrupts: Interrupts, said: list[str]
) -> None:
    stack = ServiceStack(tmp_path, interrupts, said.append, 0.0)
    try:
        with pytest.raises(StartTimeout, match="etcd is not ready after 0 s: it does not answer") as caught:
            stack.wait_ready(stack.start_service(Server, loopback_ports(), os.environ))
    finally:
        stack.stop()
    assert caught.value.status == ExitCode.DEADLINE


def test_a_signal_is_no_failure_of_the_service_that_it_ends(stack: ServiceStack) -> None:
    """What ends a whole job signals the services as well as us, in any order."""
    stack.wait_ready(stack.start_service(Server, loopback_ports(), os.environ))
    (pid,) = stack.processes["etcd"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not stack.processes["etcd"], "it has ended", 10)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted):
        stack.watch()


def deaf(tmp_path: Path) -> LoggedProcess:
    """Return a process that ignores SIGTERM, once it does."""
    command = ["/bin/sh", "-c", "trap '' TERM; echo ready; while :; do sleep 600; done"]
    process = LoggedProcess("deaf", command, environment=os.environ, log=tmp_path / "deaf.log")
    eventually(lambda: process.last_lines(1) == ["ready"], "it ignores SIGTERM", 10)
    return process


def test_what_does_not_end_in_time_is_killed_with_its_session(tmp_path: Path, interrupts: Interrupts) -> None:
    process = deaf(tmp_path)
    stop([process], 0.1, interrupts, 0)
    assert (process.exit_code(), process.members()) == (128 + signal.SIGKILL, [])


def test_a_further_signal_ends_the_wait_for_an_end(tmp_path: Path, interrupts: Interrupts) -> None:
    process = deaf(tmp_path)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        began = time.monotonic()
        await_exit([process], 600, interrupts, 0)
        assert time.monotonic() - began < 60
        assert process.exit_code() is None
    finally:
        process.kill()
