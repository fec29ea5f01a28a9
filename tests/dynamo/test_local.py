# SPDX-License-Identifier: Apache-2.0
"""``dynamo-mpi local`` with all its real parts: what it answers, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_mpi.common import ports as service_ports
from dynamo_mpi.common.errors import DynamoMpiError, ExitCode, of_signal
from dynamo_mpi.common.files import private_dir
from dynamo_mpi.common.ports import free_port
from dynamo_mpi.common.signals import Interrupts
from dynamo_mpi.deploy.local.stack import LocalStack, StackSettings
from dynamo_mpi.deploy.local.workers import WorkerSpec
from dynamo_mpi.discovery.etcd import EtcdAuth
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient
from dynamo_mpi.discovery.runtime_compat import has_nats_tls, runtime_version
from dynamo_mpi.ops.listeners import find_listeners
from dynamo_mpi.telemetry.startup_trace import read_traces
from tests.conftest import run_command
from tests.dynamo.local_command import LocalCommand
from tests.dynamo.running import eventually, listening, pem_lines, started_with

pytestmark = pytest.mark.dynamo

QUESTION = "What is the capital of France?"
ENDINGS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
# as any other end, and not the 40 s of a drain more
STOPPED_SECONDS = 10.0
# Moments of a start, each by the line that precedes it.
MOMENTS = {"first service": "etcd at", "ranks": "frontend at", "serving": "serving until"}


def test_ask_answers_on_stdout_and_leaves_nothing(tmp_path: Path) -> None:
    with LocalCommand(tmp_path, "--ask", QUESTION) as command:
        assert command.wait() == 0, command.err
        command.assert_nothing_left()
        assert "Paris" in command.out
        times = re.search(r"verdict .* s, load .* s, ready .* s, first token .* s, .* tokens/s", command.err)
        assert times, command.err
        assert "\r" not in command.err


def test_no_other_user_or_host_can_use_its_services(tmp_path: Path) -> None:
    with LocalCommand(tmp_path, "--tp", "3", "--keep", "--output", "json") as command:
        command.wait_for_text("serving until")
        # Open MPI's launcher itself listens at all addresses, whatever its parameters (PRRTE 3.0)
        names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in command.survivors()}
        ours = [pid for pid, name in names.items() if name not in ("mpirun", "prterun", "orterun")]
        assert {address for address, _ in listening(ours)} == {"127.0.0.1"}
        (clients,) = command.temporary.glob("*/clients.json")
        environment = json.loads(clients.read_text())["environment"]
        secrets = [environment["NATS_AUTH_PASSWORD"], *pem_lines(environment["ETCD_AUTH_CLIENT_KEY"])]
        assert len(names) >= 9
        assert started_with(names, secrets) == {}
        found = find_listeners(names)
        assert {each.kind for each in found} == {"etcd", "NATS", "frontend", "rank", "mpirun"}
        assert [each for each in found if not each.rows] == []
        etcd = re.search(r"etcd at (\S+)", command.err)
        assert etcd is not None
        with contextlib.closing(GrpcEtcdClient([etcd[1]], EtcdAuth(), 2)) as client, pytest.raises(DynamoMpiError):
            client.get_prefix("v1/")


@pytest.mark.full
def test_without_ask_one_completion_is_the_proof(tmp_path: Path) -> None:
    page = tmp_path / "start.html"
    with LocalCommand(
        tmp_path, "--tp", "1", "--max-batch-size", "2", "--output", "json", "--timeline", str(page)
    ) as command:
        report = command.report()
        assert command.wait() == 0, command.err
        command.assert_nothing_left()
    assert report["ok"] is True
    assert report["answer"]["completion_tokens"] >= 1
    assert report["worker"]["ranks"] == report["tp_size"] == 1
    assert all(report["seconds"][name] > 0 for name in ("verdict", "load", "ready", "first_token", "answer"))
    services, worker = read_traces(page)
    assert [rank.spans[0].phase for rank in services.ranks] == ["etcd", "nats", "frontend"]
    assert (worker.outcome, len(worker.ranks), services.origin < worker.origin) == ("ended", 1, True)


def test_nats_plane_answers_too(tmp_path: Path) -> None:
    with LocalCommand(tmp_path, "--request-plane", "nats", "--verbose", "--ask", QUESTION) as command:
        assert command.wait() == 0, command.err
        command.assert_nothing_left()
        assert "Paris" in command.out
        # with TLS where Dynamo's runtime has it
        assert f"nats at {'tls' if has_nats_tls(runtime_version()) else 'nats'}://" in command.err
        assert "eof_received" not in command.err


@pytest.mark.landing("agg")
@pytest.mark.parametrize("role", ["agg", "disagg"])
def test_a_machine_with_loopback_alone_will_do(role: str) -> None:
    words = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    if os.geteuid() or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("no network namespace here: needs root and iproute2")
    command = [*words, sys.executable, "-m", "dynamo_mpi.cli.main", "local", "--role", role, "--output", "json"]
    done = run_command(command, env=os.environ, timeout=150)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answer"]


def test_an_impossible_layout_is_refused_in_the_workers_words(tmp_path: Path) -> None:
    with LocalCommand(tmp_path, "--tp", "2") as command:
        assert command.wait() == ExitCode.ILLEGAL_LAYOUT, command.err
        command.assert_nothing_left()
        assert command.out == ""
        assert "error B1: 9 attention heads can't be divided over tp_size = 2" in command.err.splitlines()
        assert "prterun" not in command.err, "the launcher's own words are not ours to show"


def test_a_layout_of_many_ranks_is_refused_before_they_start(tmp_path: Path) -> None:
    with LocalCommand(tmp_path, "--tp", "500") as command:
        assert command.wait() == ExitCode.ILLEGAL_LAYOUT, command.err
        command.assert_nothing_left()
        assert "9 attention heads can't be divided over tp_size = 500" in command.err
        assert "set tensor_parallel_size to one of 1, 3" in command.err
        assert "etcd at" not in command.err


def test_without_home(tmp_path: Path) -> None:
    """As a service's environment; Open MPI doesn't start without it."""
    words = [sys.executable, "-m", "dynamo_mpi", "local", "--tp", "1", "--ask", QUESTION, "--max-tokens", "4"]
    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | {"TMPDIR": str(tmp_path)}
    done = run_command(words, env=environment, timeout=150)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_goes_away_is_no_failure_of_the_stack(tmp_path: Path) -> None:
    """Its stdout is a pipe whose reader has gone, as with ``| head``."""
    reader, writer = os.pipe()
    os.close(reader)
    with LocalCommand(tmp_path, "--tp", "1", "--ask", QUESTION, stdout=writer) as command:
        os.close(writer)
        assert command.wait() == of_signal(signal.SIGPIPE), command.err
        command.assert_nothing_left()
        assert "Traceback" not in command.err
        assert "broke" not in command.err.lower()


@pytest.mark.full
def test_verbose_shows_each_rank(tmp_path: Path) -> None:
    with LocalCommand(tmp_path, "--tp", "2", "--verbose") as command:
        assert command.wait() == ExitCode.ILLEGAL_LAYOUT
        assert re.search(r"^\[rank-0\] error B1:", command.err, re.MULTILINE)
        assert command.err.count("error B1:") == 1, "not once more at the end"


@pytest.mark.landing("SIGINT-ranks", "SIGTERM-serving", "SIGHUP-first service")
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
def test_a_signal_ends_everything(tmp_path: Path, number: signal.Signals, moment: str) -> None:
    with LocalCommand(tmp_path, "--keep") as command:
        command.wait_for_text(MOMENTS[moment])
        command.process.send_signal(number)
        assert command.wait(30) == of_signal(number), command.err
        command.assert_nothing_left()
        assert "Traceback" not in command.err


@pytest.mark.landing("ranks")
@pytest.mark.parametrize("moment", MOMENTS)
def test_even_sigkill_leaves_no_process(tmp_path: Path, moment: str) -> None:
    with LocalCommand(tmp_path, "--keep") as command:
        command.wait_for_text(MOMENTS[moment])
        assert len(command.survivors()) > 1
        command.process.kill()
        command.wait()
        eventually(lambda: not command.survivors(), "all processes are gone", 5)


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    with LocalCommand(tmp_path, "--keep") as command:
        command.wait_for_text("etcd at")
        command.process.kill()
        command.wait()
        eventually(lambda: not command.survivors(), "all processes are gone", 5)
        assert list(command.folder.iterdir()) != []
        with private_dir(command.folder) as folder:
            assert list(command.folder.iterdir()) == [folder]


def test_a_second_signal_ends_the_drain(tmp_path: Path) -> None:
    with LocalCommand(tmp_path, "--keep", "--output", "json") as command:
        report = command.report()
        with open_stream(report["url"], report["model"], max_tokens=2000) as stream:
            stream.readline()
            command.process.send_signal(signal.SIGINT)
            command.wait_for_text("again: at once")
            stream.readline()  # the request in flight goes on
            assert command.process.poll() is None
            second = time.monotonic()
            command.process.send_signal(signal.SIGINT)
            assert command.wait(30) == of_signal(signal.SIGINT)
        assert time.monotonic() - second < 10
        command.assert_nothing_left()


def test_a_stopped_mpirun_holds_nothing_up(tmp_path: Path) -> None:
    with LocalCommand(tmp_path, "--keep") as command:
        command.wait_for_text("serving until")
        lines = command.command_lines()
        (mpirun,) = [
            pid for pid, words in lines.items() if b"-n" in words and words[0].endswith((b"mpirun", b"prterun"))
        ]
        os.kill(mpirun, signal.SIGSTOP)
        began = time.monotonic()
        assert command.end(signal.SIGINT) == of_signal(signal.SIGINT)
        assert time.monotonic() - began < STOPPED_SECONDS
        command.assert_nothing_left()


@pytest.mark.landing("nats-69")
@pytest.mark.parametrize(("part", "code"), [("etcd", 69), ("nats", 69), ("frontend", 70)])
def test_a_part_that_dies_is_named(tmp_path: Path, part: str, code: int) -> None:
    with LocalCommand(tmp_path, "--keep", "--output", "json") as command:
        victim = command.report()["processes"][part][0]
        command.wait_for_text("serving until")
        os.kill(victim, signal.SIGKILL)
        assert command.wait(60) == code, command.err
        command.assert_nothing_left()
        assert f"{part} ended with exit code 137" in command.err


@pytest.mark.full
def test_a_killed_rank_ends_the_run_with_its_code(tmp_path: Path) -> None:
    with LocalCommand(tmp_path, "--keep", "--output", "json") as command:
        report = command.report()
        command.wait_for_text("serving until")
        leader = report["worker"]["pid"]
        os.kill(leader, signal.SIGKILL)
        assert command.wait(60) not in (0, ExitCode.UNAVAILABLE), command.err
        command.assert_nothing_left()
        assert "worker ended with exit code" in command.err


def test_time_up_is_124(tmp_path: Path) -> None:
    with LocalCommand(tmp_path, "--timeout", "1.5", "--output", "json") as command:
        assert command.wait(60) == ExitCode.DEADLINE, command.err
        command.assert_nothing_left()
        report = json.loads(command.out)
        assert (report["ok"], report["exit_code"]) == (False, 124)
        assert "is not ready after 1.5 s" in command.err


def test_a_model_that_is_none_is_66(tmp_path: Path) -> None:
    file = tmp_path / "no.gguf"
    file.write_bytes(b"not a model")
    with LocalCommand(tmp_path, "--model", str(file)) as command:
        assert command.wait(60) == ExitCode.NO_MODEL, command.err
        command.assert_nothing_left()


@pytest.mark.full
def test_a_model_folder_is_taken_as_it_is(tmp_path: Path, model_dir: Path) -> None:
    with LocalCommand(tmp_path, "--model", str(model_dir), "--tp", "1", "--output", "json") as command:
        assert command.report()["model"] == model_dir.name
        assert command.wait() == 0, command.err


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    """Signals, taken note of."""
    with Interrupts() as noted:
        yield noted


def test_a_port_taken_meanwhile_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupts: Interrupts
) -> None:
    """Etcd's and the frontend's first ports are NATS's: the second one must find another."""
    contested = free_port()
    ports = iter([contested] * 3)
    monkeypatch.setattr(service_ports, "free_port", lambda: next(ports, None) or free_port())
    said: list[str] = []
    stack = LocalStack(StackSettings((WorkerSpec("agg", 1),)), tmp_path, interrupts, said.append)
    try:
        ready = stack.start()
        assert stack.ask(ready, QUESTION, max_tokens=16, on_text=said.append).completion_tokens > 0
    finally:
        stack.stop()
    assert sum(str(contested) in line for line in said) == 1
    assert next(ports, None) is None


def open_stream(url: str, model: str, *, max_tokens: int):  # type: ignore[no-untyped-def]  # urllib's is unnamed
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(  # noqa: S310 - the run's own loopback address
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=60)  # noqa: S310 - the run's own loopback address
