# SPDX-License-Identifier: Apache-2.0
"""Secrets are in no process's environment: what a rank takes out of its own, the services file, and how a child gets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from dynamo_mpi.common import credentials
from dynamo_mpi.common.credentials import (
    CLIENT_VARIABLES,
    SECRETS,
    SERVICES_FILE,
    clients_environ,
    clients_of,
    held,
    hold,
    load_services,
    read_services_file,
    split_clients,
)
from dynamo_mpi.common.errors import AuthorizationError, ExitCode, UsageError
from dynamo_mpi.common.own_files import OwnFolder
from dynamo_mpi.common.redact import process_redactor
from dynamo_mpi.common.subprocess import ManagedProcess, Streams
from dynamo_mpi.deploy.run_files import read_services
from tests.conftest import ROOT
from tests.unit.neighbour import NOBODY, needs_root

SECRET = "hunter2-correct-horse"  # noqa: S105 - of no server
RUNNER = "dynamo_mpi.common.run_with_services"
# what a process can read about itself, and what another process of its user can
REPORT = (
    "import json, os, resource, sys; print(json.dumps({"
    "'variable': os.environ.get('NATS_AUTH_PASSWORD'), 'endpoints': os.environ.get('ETCD_ENDPOINTS'), "
    "'started with': open('/proc/self/environ', 'rb').read().decode(), 'file': os.environ.get('DYN_MPI_SERVICES_FILE'), "
    "'core': resource.getrlimit(resource.RLIMIT_CORE)[0], 'words': sys.argv, "
    "'descriptors': [os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if os.path.lexists(f'/proc/self/fd/{n}')]}))"
)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process without secrets, before and after."""
    before = dict(os.environ)
    for name in (*CLIENT_VARIABLES, SERVICES_FILE):
        os.environ.pop(name, None)
    monkeypatch.setattr(credentials, "_loaded", "")
    hold({})
    yield
    hold({})
    os.environ.clear()
    os.environ.update(before)


def services_file(folder: Path, environment: object) -> str:
    path = folder / "services.json"
    path.write_text(json.dumps({"schema": 1, "environment": environment}))
    path.chmod(0o600)
    return str(path)


def run(code: str, **variables: str) -> str:
    """Return what a Python program of ours prints."""
    words = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_rank_takes_secrets_out_of_its_environment() -> None:
    code = (
        "import os; from dynamo_mpi.common.credentials import hide_secrets, held; hide_secrets(); "
        "child = os.popen('env').read(); "
        "print(held(), '|', open('/proc/self/environ', 'rb').read(), child, os.environ)"
    )
    kept, _, seen = run(code, NATS_AUTH_PASSWORD=SECRET, ETCD_ENDPOINTS="http://e:1", NATS_AUTH_TOKEN="").partition("|")
    assert kept.strip() == repr({"NATS_AUTH_PASSWORD": SECRET})
    assert "http://e:1" in seen
    assert SECRET not in seen


@pytest.mark.parametrize("name", SECRETS)
def test_every_secret_is_hidden(name: str) -> None:
    code = "from dynamo_mpi.common.credentials import hide_secrets; hide_secrets(); print(open('/proc/self/environ').read())"
    assert SECRET not in run(code, **{name: SECRET})


def test_the_services_file_replaces_what_the_environment_says(tmp_path: Path) -> None:
    os.environ |= {"ETCD_ENDPOINTS": "http://other:1", "ETCD_AUTH_USERNAME": "of another etcd", "NATS_SERVER": "n"}
    given = {
        "ETCD_ENDPOINTS": "https://ours:1",
        "NATS_AUTH_PASSWORD": SECRET,
        "LD_PRELOAD": "x",
        "NATS_TLS_INSECURE": "",
    }
    os.environ[SERVICES_FILE] = services_file(tmp_path, given)
    load_services()
    assert os.environ["ETCD_ENDPOINTS"] == "https://ours:1"
    assert not {"ETCD_AUTH_USERNAME", "NATS_SERVER", "LD_PRELOAD", "NATS_AUTH_PASSWORD"} & os.environ.keys()
    assert held() == {"NATS_AUTH_PASSWORD": SECRET}
    assert clients_environ()["NATS_AUTH_PASSWORD"] == SECRET
    assert clients_environ()["ETCD_ENDPOINTS"] == "https://ours:1"
    # once: what the process has set since stays
    os.environ["ETCD_ENDPOINTS"] = "https://ours:2"
    load_services()
    assert os.environ["ETCD_ENDPOINTS"] == "https://ours:2"


def test_a_command_sees_the_file_too(tmp_path: Path) -> None:
    path = services_file(tmp_path, {"ETCD_ENDPOINTS": "https://ours:1"})
    environ = {"PATH": "/bin", "ETCD_AUTH_USERNAME": "x", SERVICES_FILE: path}
    assert clients_of(environ) == {"PATH": "/bin", SERVICES_FILE: path, "ETCD_ENDPOINTS": "https://ours:1"}
    assert clients_of({"ETCD_AUTH_USERNAME": "x"}) == {"ETCD_AUTH_USERNAME": "x"}


def test_secrets_of_the_file_are_redacted(tmp_path: Path) -> None:
    text = f"it says {SECRET}"
    assert process_redactor().redact(text) == text
    os.environ[SERVICES_FILE] = services_file(tmp_path, {"NATS_AUTH_PASSWORD": SECRET})
    load_services()
    assert SECRET not in process_redactor().redact(text)


@pytest.mark.parametrize(
    "environment", [None, [], "x", {"ETCD_ENDPOINTS": 1}, {"ETCD_ENDPOINTS": "a\0b"}], ids=lambda value: repr(value)
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, environment: object) -> None:
    with pytest.raises(UsageError, match="is no services file"):
        read_services_file(services_file(tmp_path, environment))
    with OwnFolder(tmp_path) as folder:
        assert read_services(folder) is None


def test_a_run_folders_file_is_read_as_a_services_file_is(tmp_path: Path) -> None:
    given = {
        "ETCD_ENDPOINTS": "https://ours:1",
        "NATS_AUTH_PASSWORD": SECRET,
        "ETCD_AUTH_USERNAME": "",
        "PATH": "/theirs",
    }
    path = services_file(tmp_path, given)
    with OwnFolder(tmp_path) as folder:
        found = read_services(folder)
    assert found is not None
    assert (
        found.environment
        == read_services_file(path)
        == {"ETCD_ENDPOINTS": "https://ours:1", "NATS_AUTH_PASSWORD": SECRET}
    )


MADE_BY: dict[str, tuple[Callable[[Path], object], str]] = {
    "fifo": (os.mkfifo, "no regular file"),
    "folder": (os.mkdir, "Is a directory"),
    "nothing": (lambda path: None, "No such file"),
    "text": (lambda path: path.write_text("{"), "no services file"),
}


@pytest.mark.parametrize("kind", MADE_BY)
def test_no_file_holds_up_a_start(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "services.json"
    make, problem = MADE_BY[kind]
    make(path)
    with pytest.raises(UsageError, match=problem) as caught:
        read_services_file(str(path))
    assert SERVICES_FILE in caught.value.problem
    assert caught.value.fix


@needs_root
def test_another_users_file_is_not_believed(tmp_path: Path) -> None:
    path = services_file(tmp_path, {"ETCD_ENDPOINTS": "http://theirs:1"})
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(AuthorizationError, match=f"belongs to user {NOBODY}"):
        read_services_file(path)


def child(environment: Mapping[str, str], *words: str) -> dict[str, object]:
    """Return the report of a child to which the variables in ``environment`` that are for clients go by a file in memory."""
    rest, services = split_clients(environment)
    reading, writing = os.pipe()
    with open(writing, "wb") as output:
        streams = Streams(stdout=output)
        process = ManagedProcess("child", words, environment=rest, streams=streams, services=services)
    with open(reading, "rb") as output:
        text = output.read()
    assert process.wait(30)
    assert process.exit_code() == 0
    found: dict[str, object] = json.loads(text)
    return found


def test_a_child_gets_secrets_by_a_file_in_memory(tmp_path: Path) -> None:
    (tmp_path / "reporter.py").write_text(REPORT)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
        "NATS_AUTH_PASSWORD": SECRET,
        "ETCD_ENDPOINTS": "https://ours:1",
    }
    found = child(environment, sys.executable, "-m", RUNNER, "reporter", "--flag", "value")
    assert found["variable"] == SECRET
    assert found["endpoints"] == "https://ours:1"
    assert SECRET not in str(found["started with"])
    assert found["file"] is None
    assert not any("memfd" in place for place in found["descriptors"])  # type: ignore[attr-defined]
    assert found["core"] == 0
    assert found["words"] == [str(tmp_path / "reporter.py"), "--flag", "value"]


def test_without_a_file_the_module_runs_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "reporter.py").write_text(REPORT)
    found = child({**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}, sys.executable, "-m", RUNNER, "reporter")
    assert (found["variable"], found["endpoints"]) == (None, None)


def test_a_module_whose_file_is_gone_is_reported(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), SERVICES_FILE: str(tmp_path / "gone.json")}
    words = [sys.executable, "-m", RUNNER, "json.tool"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ExitCode.USAGE
    assert "gone.json can't be read: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr
