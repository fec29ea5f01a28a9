# SPDX-License-Identifier: Apache-2.0
"""The head node's services with all their real parts: who gets in, who doesn't, and that nothing of them stays."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from dynamo_mpi.common.errors import ExitCode, of_signal
from dynamo_mpi.common.files import private_dir
from dynamo_mpi.common.ports import free_port, is_free
from dynamo_mpi.common.signals import Interrupts
from dynamo_mpi.common.subprocess import LoggedProcess
from dynamo_mpi.deploy.head_node import HeadNode, candidates
from dynamo_mpi.deploy.head_node_settings import Port, load_settings
from dynamo_mpi.deploy.run_dir import ServicesDir
from tests.conftest import ROOT, find_mpirun, mpi_environment
from tests.dynamo.head_node_command import HeadNodeCommand
from tests.dynamo.running import eventually, http_get

pytestmark = pytest.mark.dynamo

MODEL = "the job's model"
ETCD_SECRETS = {"ETCD_AUTH_CA", "ETCD_AUTH_CLIENT_CERT", "ETCD_AUTH_CLIENT_KEY"}
NATS_SECRETS = {"NATS_AUTH_USERNAME", "NATS_AUTH_PASSWORD"}
PART_ENDS = [("etcd", ExitCode.UNAVAILABLE), ("nats", ExitCode.UNAVAILABLE), ("frontend", ExitCode.ENGINE)]


def ask(url: str, model: str) -> dict[str, Any] | None:
    """Ask the frontend; None while it doesn't route to the model yet."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    request = urllib.request.Request(  # noqa: S310 - the frontend's own address
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310 - as above
            answer: dict[str, Any] = json.load(reply)
            return answer
    except urllib.error.HTTPError as error:
        assert error.code in (404, 503), error.read()
        return None


@contextlib.contextmanager
def sample_worker(folder: Path, environment: Mapping[str, str], model_dir: Path) -> Iterator[None]:
    """Run Dynamo's sample engine with nothing but what ``services.json`` has."""
    command = [sys.executable, str(ROOT / "tests" / "bench" / "sample_worker.py"), str(model_dir), MODEL]
    variables = mpi_environment({**environment, "DYN_LOG": "warn"})
    child = LoggedProcess("sample worker", command, environment=variables, log=folder / "sample_worker.log")
    try:
        yield
    finally:
        child.kill()


def check_etcd(environment: Mapping[str, str], credentials: Mapping[str, str] | None, folder: Path) -> str:
    """Ask etcd for its health with somebody's credentials, or none; return what comes back, or why nothing does."""
    context = ssl.create_default_context(cadata=environment["ETCD_AUTH_CA"])
    if credentials is not None:
        pair = folder / "pair.pem"
        pair.write_text(credentials["ETCD_AUTH_CLIENT_CERT"] + credentials["ETCD_AUTH_CLIENT_KEY"])
        context.load_cert_chain(str(pair))
    url = environment["ETCD_ENDPOINTS"] + "/health"
    try:
        with urllib.request.urlopen(url, timeout=5, context=context) as reply:  # noqa: S310 - https
            return str(reply.read().decode())
    except OSError as error:
        return str(error)


def check_nats(server: str, user: str | None, password: str | None) -> str:
    """Log in to NATS, and return what it says first: PONG, or an error."""
    place = urlsplit(server)
    login = {"user": user, "pass": password} if user is not None else {}
    with socket.create_connection((place.hostname, place.port or 0), timeout=5) as connection:
        lines = connection.makefile()
        assert lines.readline().startswith("INFO")
        connection.sendall(f"CONNECT {json.dumps({'verbose': False, **login})}\r\nPING\r\n".encode())
        return lines.readline().strip()


def test_a_worker_serves_through_services_json_and_nothing_is_left(tmp_path: Path, model_dir: Path) -> None:
    foreign = {"ETCD_ENDPOINTS": "http://other:1", "NATS_SERVER": "nats://other:2", "NATS_AUTH_TOKEN": "x"}
    with HeadNodeCommand(tmp_path, SLURM_JOB_ID="4711", **foreign) as head:
        services = head.services()
        environment = services["environment"]
        assert set(services) == {"schema", "pid", "host", "job_id", "url", "environment"}
        assert (services["schema"], services["host"], services["job_id"]) == (1, socket.gethostname(), "4711")
        assert set(environment) == {"ETCD_ENDPOINTS", "NATS_SERVER", *ETCD_SECRETS, *NATS_SECRETS}
        assert environment["ETCD_ENDPOINTS"].startswith("https://")
        files = [head.services_file, *(head.run_dir / "services").iterdir()]
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
        assert stat.S_IMODE(head.run_dir.stat().st_mode) == 0o700
        with sample_worker(tmp_path, environment, model_dir):
            answer = eventually(lambda: ask(services["url"], MODEL), "an answer", 60)
        assert answer["usage"]["completion_tokens"] > 0

        secrets = (environment["NATS_AUTH_PASSWORD"], *environment["ETCD_AUTH_CLIENT_KEY"].splitlines()[1:-1])
        argv = " ".join(word.decode() for words in head.command_lines().values() for word in words)
        logs = "".join(log.read_text() for log in (head.run_dir / "services").iterdir())
        assert "dynamo.frontend" in argv
        assert not [secret for secret in secrets if secret in argv + logs + head.err]
        assert head.end() == 0
        head.assert_nothing_left()
        for line in ("etcd at https://", "nats at nats://", f"frontend at {services['url']}", "ready: ", "SIGTERM"):
            assert line in head.err


@pytest.mark.full
def test_two_jobs_of_a_node_keep_apart(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        heads = []
        for job in ("7", "8"):
            folder = tmp_path / job
            folder.mkdir()
            heads.append(stack.enter_context(HeadNodeCommand(folder, SLURM_JOB_ID=job)))
        ours, theirs = (head.services()["environment"] for head in heads)
        urls = [urlsplit(head.services()["url"]) for head in heads]
        servers = [
            urlsplit(environment[name]) for environment in (ours, theirs) for name in ("ETCD_ENDPOINTS", "NATS_SERVER")
        ]
        assert len({server.port for server in (*servers, *urls)}) == 6
        wanted = [2379, 4222, 2379, 4222, 8000, 8000]
        for number, server, job in zip(wanted, (*servers, *urls), "778878", strict=True):
            assert server.port in candidates(Port(number, False, ""), job)

        assert '"health":"true"' in check_etcd(ours, ours, tmp_path)
        for credentials in (None, theirs):
            assert re.search("(?i)alert.*(certificate|unknown ca)", check_etcd(ours, credentials, tmp_path))
        password = theirs["NATS_AUTH_PASSWORD"]
        assert check_nats(theirs["NATS_SERVER"], "dynamo", password) == "PONG"
        assert check_nats(ours["NATS_SERVER"], "dynamo", password) == "-ERR 'Authorization Violation'"
        assert check_nats(ours["NATS_SERVER"], None, None) == "-ERR 'Authorization Violation'"
        assert [head.end() for head in heads] == [0, 0]


def test_after_kill_9_nothing_runs_and_the_next_start_sweeps(tmp_path: Path) -> None:
    with HeadNodeCommand(tmp_path) as head:
        head.services()
        assert len(head.survivors()) == 4
        assert head.end(signal.SIGKILL) == -signal.SIGKILL
        eventually(lambda: not head.survivors(), "all parts are gone", 10)
        left = list(head.temporary.iterdir())
        assert len(left) == 1
        assert head.services_file.exists()
    with HeadNodeCommand(tmp_path) as head:
        head.services()
        assert not left[0].exists()
        assert head.end(signal.SIGINT) == 0
        head.assert_nothing_left()


@pytest.mark.landing("frontend-70")
@pytest.mark.parametrize(("part", "code"), PART_ENDS)
def test_a_part_that_ends_ends_all_and_is_named(tmp_path: Path, part: str, code: ExitCode) -> None:
    with HeadNodeCommand(tmp_path) as head:
        head.services()
        os.kill(head.part(part), signal.SIGKILL)
        assert head.wait() == code
        head.assert_nothing_left()
        assert f"head node: {part} ended with exit code 137: killed by SIGKILL" in head.err
        assert f"[{part}] " in head.err
        assert f"; read {head.run_dir}/services/{part}.log" in head.err


@pytest.mark.full
def test_scancel_signals_all_processes_at_once(tmp_path: Path) -> None:
    with HeadNodeCommand(tmp_path) as head:
        head.services()
        parts = [pid for pid in head.survivors() if pid != head.process.pid]
        for pid in (*parts, head.process.pid):
            os.kill(pid, signal.SIGTERM)
        assert head.wait() == 0, head.err
        head.assert_nothing_left()


@pytest.mark.full
def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with HeadNodeCommand(tmp_path) as head:
        head.services()
        os.kill(head.part("frontend"), signal.SIGSTOP)  # so it takes all of its time
        head.process.send_signal(signal.SIGTERM)
        head.wait_for_text("stopping (again: at once)")
        head.process.send_signal(signal.SIGTERM)
        assert head.process.wait(5) == 0
        head.assert_nothing_left()


@pytest.mark.landing("etcd at")
@pytest.mark.parametrize("said", ["etcd at", "nats at"])
def test_a_signal_during_the_start(tmp_path: Path, said: str) -> None:
    with HeadNodeCommand(tmp_path) as head:
        head.wait_for_text(said)
        code = head.end()
        # it may have become ready in the same moment
        assert code == (ExitCode.OK if "ready: " in head.err else of_signal(signal.SIGTERM))
        head.assert_nothing_left()


@pytest.mark.landing("nats")
@pytest.mark.parametrize("part", ["etcd", "nats", "http"])
def test_a_port_that_is_lost_between_look_and_bind(tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another's server stands where the look saw nothing: the part ends, and is started on the next port."""
    run_dir = tmp_path / "run"
    settings = load_settings(["--run-dir", str(run_dir), "--address", "lo"], {"SLURM_JOB_ID": "9"})
    with socket.create_server(("127.0.0.1", 0)) as server, Interrupts() as interrupts:
        lost = Port(server.getsockname()[1], False, f"--{part}-port")
        change: dict[str, Any] = {f"{part}_port": lost}
        settings = replace(settings, **change)
        monkeypatch.setattr(
            "dynamo_mpi.deploy.head_node.is_free",
            lambda port, host: port == lost.number or is_free(port, host),
        )
        said: list[str] = []
        with contextlib.closing(ServicesDir(run_dir, "9", said.append)) as run, private_dir(tmp_path) as private:
            head_node = HeadNode(settings, run, private, interrupts, said.append)
            try:
                head_node.start()
                services = json.loads(run.services_file.read_text())
            finally:
                head_node.stop()
    url = {"etcd": services["environment"]["ETCD_ENDPOINTS"], "nats": services["environment"]["NATS_SERVER"]}
    assert urlsplit(url.get(part, services["url"])).port in candidates(lost, "9")[1:]


def test_a_named_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with HeadNodeCommand(tmp_path, "--address", "lo", "--http-port", str(port)) as head:
            assert head.wait() == ExitCode.USAGE
            head.assert_nothing_left()
            assert f"port {port} of 127.0.0.1 is taken by process {os.getpid()} (" in head.err
            assert "another --http-port" in head.err


def test_a_frontend_that_refuses_its_flags_is_quoted(tmp_path: Path) -> None:
    with HeadNodeCommand(tmp_path, "--", "--no-such-flag") as head:
        assert head.wait() == ExitCode.ENGINE
        head.assert_nothing_left()
        assert "[frontend] " in head.err
        assert "--no-such-flag" in head.err


def test_what_does_not_answer_in_time_is_named(tmp_path: Path) -> None:
    with HeadNodeCommand(tmp_path, "--start-timeout", "0") as head:
        assert head.wait() == ExitCode.DEADLINE
        head.assert_nothing_left()
        assert "etcd is not ready after 0 s: it does not answer" in head.err


def test_etcd_and_nats_alone_and_open(tmp_path: Path) -> None:
    words = ("--no-frontend", "--credentials", "none", "--address", "127.0.0.0/8", "--etcd-port", str(free_port()))
    with HeadNodeCommand(tmp_path, *words) as head:
        services = head.services()
        environment = services["environment"]
        assert (services["url"], services["job_id"]) == (None, os.environ.get("SLURM_JOB_ID"))
        assert set(environment) == {"ETCD_ENDPOINTS", "NATS_SERVER"}
        assert http_get(environment["ETCD_ENDPOINTS"] + "/health")[0] == 200
        assert check_nats(environment["NATS_SERVER"], None, None) == "PONG"
        assert head.end() == 0
        head.assert_nothing_left()
        assert "every process that can reach etcd and NATS can use them" in head.err


def test_a_second_start_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with HeadNodeCommand(tmp_path, "--no-frontend") as first:
        first.services()
        with HeadNodeCommand(tmp_path, "--no-frontend") as second:
            assert second.wait() == ExitCode.USAGE
            assert f"process {first.process.pid} on {socket.gethostname()}" in second.err
        assert first.services()["pid"] == first.process.pid
        assert first.end() == 0


@pytest.mark.full
def test_the_script_is_the_same_command(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "start_frontend_services.sh"
    run_dir = tmp_path / "run"
    environment = os.environ | {"PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen([script, "--run-dir", run_dir, "--no-frontend"], env=environment, stderr=err)
    try:
        eventually((run_dir / "services.json").exists, (tmp_path / "err").read_text(), 60)
        assert json.loads((run_dir / "services.json").read_text())["pid"] == process.pid  # it is no shell in between
    finally:
        process.terminate()
        assert process.wait(60) == 0


def test_a_world_of_ranks_serves_through_it(tmp_path: Path, model_dir: Path) -> None:
    """The reference engine in three ranks: probe, world record, registration and requests with the job's credentials."""
    ready_file = tmp_path / "ready.json"
    flags = ("--model", str(model_dir), "--tensor-parallel-size", "3", "--ready-file", str(ready_file))
    command = [find_mpirun(), "-n", "3", sys.executable, "-m", "dynamo_mpi.worker", "--engine", "reference", *flags]
    with HeadNodeCommand(tmp_path) as head:
        services = head.services()
        environment = mpi_environment({**services["environment"], "DYN_LOG": "error"})
        worker = LoggedProcess("worker", command, environment=environment, log=tmp_path / "worker.log")
        try:

            def ready() -> bool:
                assert worker.exit_code() is None, (tmp_path / "worker.log").read_text()
                return ready_file.exists()

            eventually(ready, "the worker's ready file", 90)
            answer = eventually(lambda: ask(services["url"], model_dir.name), "an answer", 60)
            assert answer["usage"]["completion_tokens"] == 4
            os.kill(json.loads(ready_file.read_text())["pid"], signal.SIGTERM)
            assert eventually(lambda: worker.exit_code() is not None, "the worker ends", 60)
            assert worker.exit_code() == 0, (tmp_path / "worker.log").read_text()
        finally:
            worker.kill()
        assert head.end() == 0
        head.assert_nothing_left()
